#include "instances_warpgroup.cuh"

namespace nsc::cuda {
const Kernel* f16_forward_warpgroup() { return warpgroup_table<F16, false>(); }
}  // namespace nsc::cuda
