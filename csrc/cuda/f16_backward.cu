#include "instances.cuh"

namespace nsc::cuda {
const Kernel* f16_backward() { return table<F16, true>(); }
}  // namespace nsc::cuda
