#include "instances.cuh"

namespace nsc::cuda {
const Kernel* bf16_backward() { return table<Bf16, true>(); }
}  // namespace nsc::cuda
