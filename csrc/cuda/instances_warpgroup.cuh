// instances.cuh for the kernels of warpgroup.inl.
#pragma once

#include "hardware_async.cuh"
#include "kernel.inl"
#include "launch.h"
#include "warpgroup.inl"

namespace nsc::cuda {

template <class E, int Ranks, int Tokens, bool Backward>
__global__ void __launch_bounds__(kThreads, (Plan<Ranks, Tokens, Backward, true>::resident))
    merged_lora_wgmma_kernel(const __grid_constant__ Problem problem, const __grid_constant__ Maps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  merged_lora_warpgroups<E, Plan<Ranks, Tokens, Backward, true>>(problem, maps, shared);
#endif
}

#define NSC_KERNEL(ranks, tokens)                                                          \
  {reinterpret_cast<const void*>(&merged_lora_wgmma_kernel<E, ranks, tokens, Backward>),   \
   Plan<ranks, tokens, Backward, true>::shared},

// In the order of kWarpgroupVariants.
template <class E, bool Backward>
const Kernel* warpgroup_table() {
  static const Kernel all[] = {NSC_WARPGROUP_VARIANTS(NSC_KERNEL)};
  return all;
}

}  // namespace nsc::cuda
