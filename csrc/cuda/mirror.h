// The kernel's arithmetic as plain loops on a CPU: the same tiles, the same slices, every sum in the same order and
// every rounding in the same place. Only what a matrix instruction does inside is not specified: matrix_unit.h has two
// models of it. `E` has float widen(half_bits) and half_bits round(float).
#pragma once

#include <algorithm>
#include <vector>

#include "matrix_unit.h"
#include "problem.h"

namespace nsc::cuda {

// A sum over 2^n lanes as shuffle_xor makes it: neighbours first.
inline float tree(std::vector<float> lanes) {
  for (size_t width = lanes.size(); width > 1; width /= 2)
    for (size_t i = 0; i < width / 2; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
  return lanes[0];
}

template <class E>
struct Mirror {
  const Problem& p;
  const bool backward;
  const int ranks, tokens, blocks, warps_n;
  const Unit unit;
  const int64_t tiles;
  std::vector<float> partial, norms, c, block_sums, parts;  // of the current tile, but for parts [K, tiles]

  Mirror(const Problem& p, bool backward, int ranks, int tokens, int blocks, bool warpgroup, Unit unit)
      : p(p),
        backward(backward),
        ranks(ranks),
        tokens(tokens),
        blocks(blocks),
        warps_n(kWarps / (tokens / (warpgroup ? 16 : kWarpRows))),
        unit(unit),
        tiles(ceil_div(p.T, tokens)) {}

  // x . w_in^T over one block's slice: the inner sum runs through 64 columns a step, in the order of the columns.
  void shrink(int64_t first, int block) {
    const Range own = p.x ? slice(p.d_in, block, blocks) : Range{0, 0};
    const int64_t begin = int64_t(own.begin) * kColumns, end = std::min<int64_t>(int64_t(own.end) * kColumns, p.d_in);
    for (int row = 0; row < tokens && first + row < p.T; ++row) {
      const half_bits* x = p.x + (first + row) * p.x_stride;
      for (int j = 0; j < p.R; ++j) {
        float acc = 0.0f;
        for (int64_t i = begin; i < end; i += 16)
          acc = inner_sum(unit, acc, int(std::min<int64_t>(16, end - i)), [&](int64_t k) {
            return double(E::widen(x[i + k])) * E::widen(p.w_in[j * p.d_in + i + k]);
          });
        partial[(size_t(block) * tokens + row) * ranks + j] = acc;
      }
      // Four lanes per row: lane l has columns 2 l, 2 l + 1, 2 l + 8 and 2 l + 9 of every 16.
      for (int w = 0; w < warps_n && !backward && p.sqnorm; ++w) {
        std::vector<float> lanes(4, 0.0f);
        for (int64_t k = begin; k < int64_t(own.end) * kColumns; k += 16) {
          if (k / 16 % warps_n % (kColumns / 16) != w) continue;
          for (int l = 0; l < 4; ++l)
            for (int64_t i : {k + 2 * l, k + 2 * l + 8}) {
              const float low = i < end ? E::widen(x[i]) : 0.0f, high = i < end ? E::widen(x[i + 1]) : 0.0f;
              lanes[l] += low * low + high * high;
            }
        }
        norms[(size_t(block) * warps_n + w) * tokens + row] = tree(lanes);
      }
    }
  }

  void middle(int64_t first, int block) {
    const Range own = rows(tokens, block, blocks);
    std::vector<float> warp_sums(size_t(kWarps) * p.K, 0.0f), product(ranks);
    for (int row = own.begin; row < own.end && first + row < p.T; ++row) {
      const int64_t t = first + row;
      for (int j = 0; j < p.R; ++j) {
        const int k = owner(p.offsets, p.K, j);
        float sum = 0.0f;
        for (int b = 0; b < blocks; ++b) sum += partial[(size_t(b) * tokens + row) * ranks + j];
        float value = p.lam[(p.lam_per_row ? t * p.K : 0) + k] * sum;
        if (backward) {
          const float saved = E::widen(p.u[t * p.R + j]);
          product[j] = saved * sum;
          if (p.dquad) value += 2.0f * p.dquad[t * p.K + k] * saved;
        } else {
          product[j] = sum * sum;
          if (p.u_out) p.u_out[t * p.R + j] = E::round(sum);
        }
        c[size_t(row) * ranks + j] = E::widen(E::round(value));
      }
      if (backward ? p.dlam != nullptr : p.quad != nullptr) {
        for (int k = 0; k < p.K; ++k) {
          std::vector<float> lanes(8, 0.0f);
          for (int j = p.offsets[k]; j < p.offsets[k + 1]; ++j) lanes[(j - p.offsets[k]) % 8] += product[j];
          const float sum = tree(lanes);
          if (!backward)
            p.quad[t * p.K + k] = sum;
          else if (p.lam_per_row)
            p.dlam[t * p.K + k] = sum;
          else
            warp_sums[(row - own.begin) % kWarps * p.K + k] += sum;
        }
      }
      if (!backward && p.sqnorm) {
        std::vector<float> lanes(32, 0.0f);
        for (int i = 0; i < blocks * warps_n; ++i) lanes[i % 32] += norms[size_t(i) * tokens + row];
        p.sqnorm[t] = tree(lanes);
      }
    }
    for (int k = 0; k < p.K; ++k) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += warp_sums[size_t(w) * p.K + k];
      block_sums[size_t(block) * p.K + k] = sum;
    }
  }

  void expand(int64_t first) {
    for (int row = 0; row < tokens && first + row < p.T; ++row) {
      const int64_t t = first + row;
      for (int64_t n = 0; n < p.d_out; ++n) {
        float acc = 0.0f;
        for (int j = 0; j < p.R; j += 16)
          acc = inner_sum(unit, acc, std::min(16, p.R - j), [&](int64_t k) {
            return double(c[size_t(row) * ranks + j + k]) * E::widen(p.w_out[(j + k) * p.d_out + n]);
          });
        if (p.base) acc += E::widen(p.base[t * p.base_stride + n]);
        if (backward && p.dsqnorm) acc += 2.0f * p.dsqnorm[t] * E::widen(p.z[t * p.z_stride + n]);
        p.out[t * p.out_stride + n] = E::round(acc);
      }
    }
  }

  void run() {
    const bool sum_dlam = backward && p.dlam && !p.lam_per_row;
    parts.assign(size_t(p.K) * tiles, 0.0f);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      partial.assign(size_t(blocks) * tokens * ranks, 0.0f);
      norms.assign(size_t(blocks) * warps_n * tokens, 0.0f);
      c.assign(size_t(tokens) * ranks, 0.0f);
      block_sums.assign(size_t(blocks) * p.K, 0.0f);
      for (int b = 0; b < blocks; ++b) shrink(tile * tokens, b);
      for (int b = 0; b < blocks; ++b) middle(tile * tokens, b);
      if (p.out) expand(tile * tokens);
      for (int k = 0; k < p.K; ++k)
        for (int b = 0; b < blocks; ++b) parts[size_t(k) * tiles + tile] += block_sums[size_t(b) * p.K + k];
    }
    for (int k = 0; k < p.K && sum_dlam; ++k) {
      std::vector<float> lanes(32, 0.0f);
      for (int64_t i = 0; i < tiles; ++i) lanes[i % 32] += parts[size_t(k) * tiles + i];
      p.dlam[k] = tree(lanes);
    }
  }
};

template <class E>
void mirror(const Problem& p, bool backward, int ranks, int tokens, int blocks, bool warpgroup = false,
            Unit unit = Unit::rounding) {
  Mirror<E>(p, backward, ranks, tokens, blocks, warpgroup, unit).run();
}

}  // namespace nsc::cuda
