#include "instances.cuh"

namespace nsc::cuda {
const Kernel* bf16_forward() { return table<Bf16, false>(); }
}  // namespace nsc::cuda
