// The entry points of one element type and direction; included by four sources, which compile side by side.
#pragma once

#include "hardware.cuh"
#include "kernel.inl"
#include "launch.h"

namespace nsc::cuda {

template <class E, int Ranks, int Tokens, bool Backward>
__global__ void __launch_bounds__(kThreads, (Plan<Ranks, Tokens, Backward>::resident))
    merged_lora_kernel(const __grid_constant__ Problem problem) {
  extern __shared__ __align__(128) unsigned char shared[];
  merged_lora<E, Plan<Ranks, Tokens, Backward>>(problem, shared);
}

#define NSC_KERNEL(ranks, tokens)                                                          \
  {reinterpret_cast<const void*>(&merged_lora_kernel<E, ranks, tokens, Backward>),         \
   Plan<ranks, tokens, Backward>::shared},

// In the order of kVariants.
template <class E, bool Backward>
const Kernel* table() {
  static const Kernel all[] = {NSC_VARIANTS(NSC_KERNEL)};
  return all;
}

}  // namespace nsc::cuda
