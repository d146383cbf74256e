#include "instances_warpgroup.cuh"

namespace nsc::cuda {
const Kernel* f16_backward_warpgroup() { return warpgroup_table<F16, true>(); }
}  // namespace nsc::cuda
