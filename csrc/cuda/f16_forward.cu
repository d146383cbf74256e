#include "instances.cuh"

namespace nsc::cuda {
const Kernel* f16_forward() { return table<F16, false>(); }
}  // namespace nsc::cuda
