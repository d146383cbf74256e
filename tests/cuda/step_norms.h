// The norms of mirror.h as the kernels add them now: the 64 columns of a step first, then the steps. It belongs in
// mirror.h and waits for the next change there: any edit in csrc/cuda withdraws what a GPU has shown (docs/gpu.md).
#pragma once

#include "mirror.h"

namespace nsc::cuda {

template <class E>
void step_norms(const Problem& p, int ranks, int tokens, int blocks, bool warpgroup, Unit unit) {
  const Mirror<E> plan(p, false, ranks, tokens, blocks, warpgroup, unit);
  for (int64_t t = 0; t < p.T; ++t) {
    const half_bits* x = p.x + t * p.x_stride;
    std::vector<float> over_blocks(32, 0.0f);
    for (int block = 0; block < blocks; ++block) {
      const Range own = slice(p.d_in, block, blocks);
      for (int w = 0; w < plan.warps_n; ++w) {
        std::vector<float> lanes(4, 0.0f);
        for (int step = own.begin; step < own.end; ++step)
          for (int l = 0; l < 4; ++l) {
            float of_step = 0.0f;
            for (int k = 0; k < kColumns / 16; ++k) {
              if (k % plan.warps_n != w) continue;
              const int64_t column = int64_t(step) * kColumns + 16 * k + 2 * l;
              for (int64_t i : {column, column + 8}) {
                const float low = i < p.d_in ? E::widen(x[i]) : 0.0f, high = i < p.d_in ? E::widen(x[i + 1]) : 0.0f;
                of_step += low * low + high * high;
              }
            }
            lanes[l] += of_step;
          }
        over_blocks[(block * plan.warps_n + w) % 32] += tree(lanes);
      }
    }
    p.sqnorm[t] = tree(over_blocks);
  }
}

}  // namespace nsc::cuda
