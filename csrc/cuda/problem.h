// One direction of the operator, as the CUDA kernel and its CPU mirror see it. Plain C++, no torch.
//
//   shrink   u[T, R]   = x[T, d_in] . w_in[R, d_in]^T
//   mid      a diagonal on the R columns, which belong to K adapters; statistics or dlam come from here
//   expand   out[T, d_out] = base + c[T, R] . w_out[R, d_out]  (+ 2 dsqnorm z in the backward)
//
// `half` pointers are to bfloat16 or to float16. Matrices that are read by rows of 16 bytes (x, w_in, w_out, base, z,
// out) start at multiples of 16 bytes and have strides that are multiples of 8 elements. Null: not there, not wanted.
#pragma once

#include <cstdint>

#include "geometry.h"

namespace nsc::cuda {

using half_bits = uint16_t;

struct Problem {
  int64_t T;
  int64_t d_in, d_out;
  int64_t x_stride, base_stride, out_stride, z_stride;
  const half_bits* x;      // [T, d_in]; null in a backward whose y has no gradient
  const half_bits* w_in;   // [R, d_in]
  const half_bits* w_out;  // [R, d_out]
  const half_bits* base;   // [T, d_out]
  half_bits* out;          // [T, d_out]; null: stop after mid; may be base itself
  const float* lam;        // [K], or [T, K] with lam_per_row

  half_bits* u_out;  // forward: [T, R]
  float* quad;       //          [T, K]
  float* sqnorm;     //          [T]

  const half_bits* u;    // backward: [T, R]
  const float* dquad;    //           [T, K]
  const float* dsqnorm;  //           [T]
  const half_bits* z;    //           [T, d_out], with dsqnorm
  float* dlam;           //           shaped like lam
  float* parts;          //           [K, tiles]: sums of each tile, with dlam of shape [K]
  uint32_t* counter;     //           zero between launches

  int32_t R, K;
  int32_t lam_per_row;
  int16_t offsets[kMostAdapters + 1];  // adapter k owns columns offsets[k] .. offsets[k + 1]
};

// A matrix as TMA reads or writes it: boxes of 64 columns by box_rows, zeros outside. Row stride in elements.
struct Box {
  const half_bits* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;
  int box_rows = 0;
};

// x, w_in, w_out, base, z and out, in this order; without data where there is none.
struct Boxes {
  Box of[6];
};
inline Boxes boxes(const Problem& p, int weight_box, int tokens) {
  return {{{p.x, p.T, p.d_in, p.x_stride, tokens},
           {p.w_in, p.R, p.d_in, p.d_in, weight_box},
           {p.w_out, p.R, p.d_out, p.d_out, weight_box},
           {p.base, p.T, p.d_out, p.base_stride, tokens},
           {p.dsqnorm ? p.z : nullptr, p.T, p.d_out, p.z_stride, tokens},
           {p.out, p.T, p.d_out, p.out_stride, tokens}}};
}

enum class Element : int { bf16, f16 };

}  // namespace nsc::cuda
