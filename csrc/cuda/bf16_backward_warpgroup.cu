#include "instances_warpgroup.cuh"

namespace nsc::cuda {
const Kernel* bf16_backward_warpgroup() { return warpgroup_table<Bf16, true>(); }
}  // namespace nsc::cuda
