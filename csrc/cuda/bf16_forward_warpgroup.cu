#include "instances_warpgroup.cuh"

namespace nsc::cuda {
const Kernel* bf16_forward_warpgroup() { return warpgroup_table<Bf16, false>(); }
}  // namespace nsc::cuda
