// Which variant, how large a cluster, and the launch. Free of torch and of CUDA's headers.
#pragma once

#include <string>

#include "problem.h"

namespace nsc::cuda {

// A compiled kernel and the shared memory of one of its blocks.
struct Kernel {
  const void* function;
  int shared;
};
const Kernel* bf16_forward();
const Kernel* bf16_backward();
const Kernel* f16_forward();
const Kernel* f16_backward();
const Kernel* bf16_forward_warpgroup();
const Kernel* bf16_backward_warpgroup();
const Kernel* f16_forward_warpgroup();
const Kernel* f16_backward_warpgroup();

// How a problem is run: an index into kVariants, or kVariantCount plus one into kWarpgroupVariants; blocks per cluster; tiles.
struct Choice {
  int variant = -1;
  int cluster = 0;
  int64_t tiles = 0;
};

// Why the current device cannot run the kernels, or an empty string. Throws std::runtime_error if CUDA does not answer.
std::string unsupported();

// What a problem is run with on the current device. Non-negative `variant` or positive `cluster` are taken as they are.
Choice choose(const Problem& problem, Element element, bool backward, int variant = -1, int cluster = 0);

// Launches on `stream` (a cudaStream_t) of the current device; does not wait. Throws std::runtime_error.
void launch(const Problem& problem, Element element, bool backward, const Choice& choice, void* stream);

}  // namespace nsc::cuda
