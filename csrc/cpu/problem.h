// One direction of the operator, as the CPU kernels see it. No torch here: the binding fills this in.
//
// Forward and backward are the same three steps with the operands swapped (nsc_kernels/reference.py):
//
//   shrink   u[T, R]   = x[T, d_in] . w_in[R, d_in]^T
//   mid      a diagonal on the R columns, which belong to K adapters; statistics or dlam come from here
//   expand   out[T, d_out] = base + c[T, R] . w_out[R, d_out]  (+ tail * z in the backward)
#pragma once

#include <cstdint>

namespace nsc {

enum class Element : int { f64, f32, bf16, f16 };

// `Acc` pointers are double for Element::f64 and float otherwise. Null means "not there" or "not wanted".
struct Problem {
  Element element;
  bool backward;
  int64_t T, d_in, d_out, R, K;
  const int64_t* offsets;  // [K + 1], adapter k owns columns offsets[k] .. offsets[k + 1]

  const void* x;  // [T, d_in] rows of stride x_stride; null in a backward whose y has no gradient
  int64_t x_stride;
  const void* w_in;   // [R, d_in]
  const void* w_out;  // [R, d_out]
  const void* base;   // [T, d_out]
  int64_t base_stride;
  void* out;  // [T, d_out], contiguous; null: stop after mid

  const void* lam;  // Acc, [K] or [T, K]
  bool lam_per_row;

  // forward mid
  void* u_out;   // [T, R]
  void* quad;    // Acc, [T, K]
  void* sqnorm;  // Acc, [T]

  // backward mid
  const void* u;        // [T, R]
  const void* dquad;    // Acc, [T, K]
  const void* dsqnorm;  // Acc, [T]
  const void* z;        // [T, d_out] rows of stride z_stride: the tail 2 * dsqnorm * z
  int64_t z_stride;
  void* dlam;  // Acc, [T, K], or [granules, K] partial sums when lam is shared
};

// Rows are handled in blocks that are multiples of this. Sums over rows are formed per granule, so that no result
// depends on how many threads there were.
constexpr int64_t kGranule = 12;

inline int64_t granules(int64_t T) { return (T + kGranule - 1) / kGranule; }

// Kernels of one instruction set.
struct Isa {
  const char* name;
  bool (*supported)();
  // Rows that a block should have at most, a multiple of kGranule.
  int64_t (*most_rows)(const Problem&);
  // What a block's rows should be a multiple of, itself one of kGranule. More than is needed would leave the last of a
  // few threads with less to do.
  int64_t (*rows_together)(const Problem&);
  int64_t (*scratch_bytes)(const Problem&, int64_t rows);
  // Rows [begin, end) of the problem; begin is a multiple of kGranule, scratch is aligned to 64 bytes.
  void (*run)(const Problem&, int64_t begin, int64_t end, void* scratch);
};

// Best first; the last one runs everywhere.
const Isa* const* isas(int* count);

// The instruction set in use: the best that this processor has or, if `force` names one, that one.
// Null if `force` is unknown or the processor lacks it.
const Isa* select_isa(const char* force);

}  // namespace nsc
