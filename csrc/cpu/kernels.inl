// The CPU kernels, compiled once per instruction set. The including file defines
//
//   NSC_NAMESPACE       a namespace of its own
//   NSC_VECTOR_BYTES    16, 32 or 64
//   NSC_DOT_ROWS        rows of a shrink tile
//   NSC_EXPAND_VECTORS  vectors of columns of an expand tile
//   NSC_F16C, NSC_AVX512, NSC_AVX512_BF16, NSC_AMX   what the compiler may use, where defined
//   NSC_PACKED_SHRINK   where defined, many rows are shrunk by the expand tile, on a transposed copy of w_in
//
// Everything is in an unnamed namespace and no standard-library template is used: a function that the linker could
// share between these files might be taken from the file compiled for a processor that this one is not.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace nsc {
namespace NSC_NAMESPACE {
namespace {

#include "vectors.inl"
#include "ahead.inl"
#include "tiles.inl"
#if defined(NSC_AMX)
#include "tiles_amx.inl"
#endif

// Of a row of x and of w_in at a time: kDotRows + kDotCols such pieces stay in a 32 KiB L1 cache.
constexpr int64_t kChunkBytes = 3072;
// The same for tiles: long pieces, which the processor fetches ahead, as long as all of w_in's stay in the L2 cache.
constexpr int64_t kTiledChunkBytes = 4096, kTiledPanelBytes = 512 * 1024;
// Few rows read every weight once and reuse none: whole rows of weights then, as memory delivers them, one after
// another. Of out that many columns at a time, which stay in the L1 cache.
constexpr int64_t kFewRows = 2, kFewColumns = 4096, kFewTogether = 4;
// For a transposed copy of w_in: a strip of it stays in the L1 cache, all strips in the L2 cache.
constexpr int64_t kPackedChunkBytes = 1024, kPackedPanelBytes = 256 * 1024, kPackedSumsBytes = 512 * 1024;
// Rows that repay the copy.
constexpr int64_t kPackedRows = 12;
// Rows of w_in at a time: with kChunkBytes each they stay in the L2 cache while all rows of x pass by.
constexpr int64_t kPanelRows = 96;
// Of w_out at a time: strips side by side, as many as stay in the L2 cache. Wide panels matter where R is small: rows
// of base and out are then visited a few KiB at a time and not a few lines at a time.
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int64_t kPanelStrips = 16;

static_assert(kGranule % kExpandRows == 0, "a granule is a whole number of expand tiles");

// What the tiles multiply: the element itself, or Acc where a narrow type is widened first.
template <class E>
struct OperandOf {
  using type = typename AccOf<E>::type;
};
#if defined(NSC_AVX512_BF16)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

#if defined(NSC_AMX)
// Whether a problem is worth the packing that the matrix unit wants. Of all rows, so that the bits of one do not depend
// on the block that it is in.
template <class E>
inline bool tiled(const Problem& p) {
  return kSame<E, bf16> && p.T >= kTiledRows;
}
#else
constexpr int64_t kTiledRows = 1;
template <class E>
constexpr bool tiled(const Problem&) {
  return false;
}
#endif

// Whether w_in is transposed, so that the expand tile does the shrink as well. Of all rows, as above.
inline bool packed([[maybe_unused]] const Problem& p) {
#if defined(NSC_PACKED_SHRINK)
  return p.T >= kPackedRows;
#else
  return false;
#endif
}

// Not for narrow types, whose pieces are widened first.
template <class E>
inline bool few(const Problem& p) {
  return kSame<E, typename AccOf<E>::type> && p.T <= kFewRows;
}

template <class E>
struct Block {
  using Acc = typename AccOf<E>::type;
  using Operand = typename OperandOf<E>::type;
  static constexpr bool kWiden = !kSame<E, Operand>;
  static constexpr int64_t kStripColumns = int64_t(kExpandVectors) * kLanes<Acc>;

  const Problem& p;
  const int64_t first, rows, padded_rows;
  const int64_t stride;  // of u and c, in elements
  const int64_t piece;   // of d_in, in elements
  Acc* u;                // [padded_rows, stride]: the accumulators of shrink
  Operand* c;            // [padded_rows, stride]: the operand of expand, rounded to E; u itself where that is nothing
  Acc* norm;             // [padded_rows]
  Acc* lam_columns;      // [stride]: lam of the row at hand, repeated over each adapter's columns
  Operand* panel;        // strips of w_out, each [R rounded up to even, kStripColumns]
  Operand* x_wide;       // [padded_rows, piece]; for tiles [kTiledRows, piece]
  Operand* w_wide;       // [kPanelRows, piece]; for tiles [stride, piece]
  Acc* sums;             // for tiles, [kTiledRows, kStripColumns]; for few rows, [kFewRows, kFewColumns]
  int64_t bytes = 0;     // of scratch

  // With a null scratch it only counts the bytes.
  Block(const Problem& problem, int64_t begin, int64_t end, void* scratch)
      : p(problem),
        first(begin),
        rows(end - begin),
        padded_rows(round_up(rows, tiled<E>(p) ? kTiledRows : kGranule)),
        stride(round_up(p.R, tiled<E>(p) ? 32 : 16)),
        piece(few<E>(p) ? p.d_in : chunk(p.d_in, chunk_bytes())) {
    auto take = [&](auto*& member, int64_t count) {
      member = reinterpret_cast<decltype(+member)>(static_cast<char*>(scratch) + bytes);
      bytes += round_up(count * int64_t(sizeof(*member)), 64);
    };
    take(u, padded_rows * stride);
    if constexpr (kSame<E, Operand> && kSame<E, Acc>)
      c = u;  // what is not rounded need not be copied
    else
      take(c, padded_rows * stride);
    take(norm, padded_rows);
    take(lam_columns, stride);
    take(panel, panel_strips() * strip_size());
    take(x_wide, (packed(p) ? kExpandRows : kWiden ? padded_rows : tiled<E>(p) ? kTiledRows : 0) * piece);
    take(w_wide, (packed(p) || tiled<E>(p) ? stride : kWiden ? kPanelRows : 0) * piece);
    take(sums, tiled<E>(p) ? kTiledRows * kStripColumns : few<E>(p) ? kFewRows * kFewColumns : 0);
  }

  int64_t tiled_chunk() const {
    const int64_t fit = kTiledPanelBytes / (stride + 1) / 64 * 64;
    return fit < 1024 ? 1024 : min(fit, kTiledChunkBytes);
  }

  int64_t chunk_bytes() const { return tiled<E>(p) ? tiled_chunk() : packed(p) ? packed_chunk() : kChunkBytes; }

  int64_t packed_chunk() const {
    const int64_t fit = kPackedPanelBytes / (stride + 1) / 256 * 256;
    return fit < 256 ? 256 : min(fit, kPackedChunkBytes);
  }

  static int64_t chunk(int64_t d, int64_t bytes) {
    const int64_t most = bytes / int64_t(sizeof(Operand));
    const int64_t pieces = (d + most - 1) / most;
    return round_up((d + pieces - 1) / pieces, 64);
  }

  int64_t strip_rows() const { return tiled<E>(p) ? stride : round_up(p.R, 2); }
  int64_t strip_size() const { return strip_rows() * kStripColumns; }
  int64_t panel_strips() const {
    const int64_t fit = kPanelBytes / (strip_size() * int64_t(sizeof(Operand)) + 1);
    return min(min(kPanelStrips, fit < 1 ? 1 : fit), (p.d_out + kStripColumns - 1) / kStripColumns);
  }

  // What is read after rows [r0, r0 + most) of a piece of w_in. Few rows of x read weights as they lie in memory, which
  // nobody has to foresee.
  Ahead after_panel(int64_t k0, int64_t r0, int64_t most, int64_t parts) const {
    const E* w = static_cast<const E*>(p.w_in);
    const int64_t k1 = k0 + piece, r1 = r0 + most;
    if (few<E>(p)) return Ahead();
    if (r1 < p.R) return Ahead(w + r1 * p.d_in + k0, p.d_in, min(most, p.R - r1), min(piece, p.d_in - k0), parts);
    if (k1 < p.d_in) return Ahead(w + k1, p.d_in, min(most, p.R), min(piece, p.d_in - k1), parts);
    if (!p.out) return Ahead();
    return Ahead(static_cast<const E*>(p.w_out), p.d_out, p.R, min(panel_strips() * kStripColumns, p.d_out), parts);
  }

  void shrink(bool with_norm) {
    const E* x = static_cast<const E*>(p.x) + first * p.x_stride;
    const E* w = static_cast<const E*>(p.w_in);
    if (with_norm) std::memset(norm, 0, padded_rows * sizeof(Acc));
    for (int64_t k0 = 0; k0 < p.d_in; k0 += piece) {
      const int64_t k = min(piece, p.d_in - k0);
      const Operand* xk;
      int64_t xk_stride;
      if constexpr (kWiden) {
        widen_rows(x + k0, p.x_stride, rows, k, x_wide, piece);
        xk = x_wide, xk_stride = piece;
      } else {
        xk = x + k0, xk_stride = p.x_stride;
      }
      // Once without adapters, for the norms.
      for (int64_t r0 = 0; r0 == 0 || r0 < p.R; r0 += kPanelRows) {
        const int64_t panel = min(kPanelRows, p.R - r0);
        Ahead ahead = after_panel(k0, r0, kPanelRows, ceil_div(rows, kDotRows) * ceil_div(panel, kDotCols));
        const Operand* wk;
        int64_t wk_stride;
        if constexpr (kWiden) {
          widen_rows(w + r0 * p.d_in + k0, p.d_in, panel, k, w_wide, piece);
          wk = w_wide, wk_stride = piece;
        } else {
          wk = w + r0 * p.d_in + k0, wk_stride = p.d_in;
        }
        for_tiles<kDotRows>(rows, [&](int64_t i, auto tile) {
          // Past the last row and column the tile repeats them; what it writes there is never read.
          const Operand* xi[tile.rows];
          for (int a = 0; a < tile.rows; ++a) xi[a] = xk + min(i + a, rows - 1) * xk_stride;
          if (with_norm && r0 == 0) add_norms<tile.rows>(xi, k, norm + i);
          for (int64_t j = 0; j < panel; j += kDotCols) {
            if (!kWiden && r0 == 0)
              prefetch_piece(xk + (i + tile.rows) * xk_stride, xk_stride, rows - i - tile.rows, k, j, panel);
            const Operand* wj[kDotCols];
            for (int b = 0; b < kDotCols; ++b) wj[b] = wk + min(j + b, panel - 1) * wk_stride;
            ahead.fetch();
            dot_tile<tile.rows>(xi, wj, k, u + i * stride + r0 + j, stride, k0 > 0);
          }
        });
      }
    }
  }

#if defined(NSC_PACKED_SHRINK)
  void shrink_packed(bool with_norm) {
    const E* x = static_cast<const E*>(p.x) + first * p.x_stride;
    const E* w = static_cast<const E*>(p.w_in);
    if (with_norm) std::memset(norm, 0, padded_rows * sizeof(Acc));
    for (int64_t k0 = 0; k0 < p.d_in; k0 += piece) {
      const int64_t k = min(piece, p.d_in - k0);
      Ahead ahead = after_panel(k0, 0, p.R, ceil_div(rows, kExpandRows) * ceil_div(p.R, kStripColumns));
      for (int64_t j = 0; j < p.R; j += kStripColumns)
        pack_transposed(w + j * p.d_in + k0, p.d_in, min(kStripColumns, p.R - j), k, w_wide + j * piece);
      for_tiles<kExpandRows>(rows, [&](int64_t i, auto tile) {
        const int64_t there = min(tile.rows, rows - i);
        const E* from = x + i * p.x_stride + k0;
        const Acc* xi = x_wide;
        int64_t xi_stride = piece;
        if constexpr (kSame<E, Acc>) {
          if (there == tile.rows) xi = from, xi_stride = p.x_stride;
        }
        if (xi == x_wide) widen_rows(from, p.x_stride, there, k, x_wide, piece);
        if (with_norm) {
          const Acc* row[tile.rows];
          for (int64_t m = 0; m < tile.rows; ++m) row[m] = xi + min(m, there - 1) * xi_stride;
          add_norms<tile.rows>(row, k, norm + i);
        }
        for (int64_t j = 0; j < p.R; j += kStripColumns) {
          Vec<Acc> acc[tile.rows][kExpandVectors];
          ahead.fetch();
          expand_tile<tile.rows>(xi, xi_stride, w_wide + j * piece, kStripColumns, k, acc);
          for (int m = 0; m < tile.rows; ++m)
            for (int v = 0; v < kExpandVectors; ++v) {
              Acc* to = u + (i + m) * stride + j + v * kLanes<Acc>;
              store(to, k0 > 0 ? load(to) + acc[m][v] : acc[m][v]);
            }
        }
      });
    }
  }
#endif

  // c <- u rounded to E, one row; columns past R are zero because expand reads them in pairs, or whole tiles.
  void round_row(int64_t i) {
    Acc* from = u + i * stride;
    Operand* to = c + i * stride;
    for (int64_t r = p.R; r < strip_rows(); ++r) from[r] = 0;
    if constexpr (kSame<E, Operand> && kSame<E, Acc>) return;
    for_vectors<Acc>(strip_rows(), [&](int64_t r, int64_t m) {
      if constexpr (kSame<E, Operand>) {
        store_n(to + r, load_n(from + r, m), m);
      } else {
        alignas(64) E rounded[kLanes<Acc>];
        store(rounded, load_n(from + r, m));
        store_n(to + r, load(rounded), m);
      }
    });
  }

  // Fills lam_columns for a row; where lam is shared it stays as it is for the first row.
  void spread_lam(int64_t i) {
    if (i > 0 && !p.lam_per_row) return;
    const Acc* lam = static_cast<const Acc*>(p.lam) + (p.lam_per_row ? (first + i) * p.K : 0);
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t r = p.offsets[k]; r < p.offsets[k + 1]; ++r) lam_columns[r] = lam[k];
  }

  void mid_forward() {
    for (int64_t i = 0; i < rows; ++i) {
      Acc* ui = u + i * stride;
      const int64_t t = first + i;
      spread_lam(i);
      if (p.sqnorm) static_cast<Acc*>(p.sqnorm)[t] = norm[i];
      if (p.u_out) {
        E* saved = static_cast<E*>(p.u_out) + t * p.R;
        for_vectors<Acc>(p.R, [&](int64_t r, int64_t m) { store_n(saved + r, load_n(ui + r, m), m); });
      }
      if (p.quad)
        for (int64_t k = 0; k < p.K; ++k) {
          const int64_t a = p.offsets[k];
          static_cast<Acc*>(p.quad)[t * p.K + k] = dot<Acc>(ui + a, ui + a, p.offsets[k + 1] - a);
        }
      for_vectors<Acc>(p.R, [&](int64_t r, int64_t m) {
        store_n(ui + r, load_n(ui + r, m) * load_n(lam_columns + r, m), m);
      });
      round_row(i);
    }
  }

  void mid_backward() {
    for (int64_t i = 0; i < rows; ++i) {
      Acc* vi = u + i * stride;
      const int64_t t = first + i;
      const E* ui = static_cast<const E*>(p.u) + t * p.R;
      spread_lam(i);
      if (p.dlam) {
        Acc* dlam = static_cast<Acc*>(p.dlam) + (p.lam_per_row ? t : t / kGranule) * p.K;
        const bool add = !p.lam_per_row && t % kGranule != 0;
        for (int64_t k = 0; k < p.K; ++k) {
          const int64_t a = p.offsets[k];
          const Acc s = p.x ? dot<Acc>(ui + a, vi + a, p.offsets[k + 1] - a) : Acc(0);
          dlam[k] = add ? dlam[k] + s : s;
        }
      }
      if (!p.out) continue;
      if (p.x)
        for_vectors<Acc>(p.R, [&](int64_t r, int64_t m) {
          store_n(vi + r, load_n(vi + r, m) * load_n(lam_columns + r, m), m);
        });
      else
        std::memset(vi, 0, p.R * sizeof(Acc));
      if (p.dquad)
        for (int64_t k = 0; k < p.K; ++k) {
          const int64_t a = p.offsets[k];
          const Acc slope = 2 * static_cast<const Acc*>(p.dquad)[t * p.K + k];
          for_vectors<Acc>(p.offsets[k + 1] - a, [&](int64_t r, int64_t m) {
            store_n(vi + a + r, load_n(vi + a + r, m) + load_n(ui + a + r, m) * slope, m);
          });
        }
      round_row(i);
    }
  }

  void expand() {
    const E* w = static_cast<const E*>(p.w_out);
    std::memset(static_cast<void*>(c + rows * stride), 0, (padded_rows - rows) * stride * sizeof(Operand));
    const int64_t width = panel_strips() * kStripColumns;
    for (int64_t start = 0; start < p.d_out; start += width) {
      const int64_t end = min(start + width, p.d_out);
      for (int64_t column = start; column < end; column += kStripColumns)
        pack_strip(w, p.d_out, p.R, column, min(kStripColumns, end - column), strip_at(column - start));
      Ahead ahead(w + end, p.d_out, p.R, min(width, p.d_out - end),
                  ceil_div(rows, kExpandRows) * ceil_div(end - start, kStripColumns));
      for_tiles<kExpandRows>(rows, [&](int64_t i, auto tile) {
        for (int64_t column = start; column < end; column += kStripColumns) {
          const int64_t columns = min(kStripColumns, end - column);
          prefetch_rows(first + i, column, columns);
          ahead.fetch();
          Vec<Acc> acc[tile.rows][kExpandVectors];
          expand_tile<tile.rows>(c + i * stride, stride, strip_at(column - start), kStripColumns, p.R, acc);
          for (int m = 0; m < tile.rows && i + m < rows; ++m) write_row(first + i + m, column, columns, acc[m]);
        }
      });
    }
  }

  // out += c[r] w_out[r], several rows of weights at a time.
  void expand_few() {
    const Acc* w = static_cast<const Acc*>(p.w_out);
    for (int64_t start = 0; start < p.d_out; start += kFewColumns) {
      const int64_t columns = min(kFewColumns, p.d_out - start);
      std::memset(sums, 0, kFewRows * kFewColumns * sizeof(Acc));
      for (int64_t r = 0; r < p.R; r += kFewTogether) {
        // Past the last row of weights it is repeated, times the zeros that follow c.
        const Acc* wr[kFewTogether];
        for (int64_t j = 0; j < kFewTogether; ++j) wr[j] = w + min(r + j, p.R - 1) * p.d_out + start;
        for (int64_t m = 0; m < rows; ++m) {
          Acc* sum = sums + m * kFewColumns;
          Vec<Acc> factor[kFewTogether];
          for (int64_t j = 0; j < kFewTogether; ++j)
            factor[j] = r + j < p.R ? broadcast(c + m * stride + r + j) : Vec<Acc>{};
          for_vectors<Acc>(columns, [&](int64_t v, int64_t n) {
            Vec<Acc> total = load(sum + v);
            for (int64_t j = 0; j < kFewTogether; ++j) total += factor[j] * load_n(wr[j] + v, n);
            store(sum + v, total);
          });
        }
      }
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t column = 0; column < columns; column += kStripColumns) {
          Vec<Acc> acc[kExpandVectors];
          for (int v = 0; v < kExpandVectors; ++v) acc[v] = load(sums + m * kFewColumns + column + v * kLanes<Acc>);
          write_row(first + m, start + column, min(kStripColumns, columns - column), acc);
        }
    }
  }

#if defined(NSC_AMX)
  void shrink_tiled(bool with_norm) {
    const bf16* x = static_cast<const bf16*>(p.x) + first * p.x_stride;
    const bf16* w = static_cast<const bf16*>(p.w_in);
    if (with_norm) std::memset(norm, 0, padded_rows * sizeof(Acc));
    for (int64_t k0 = 0; k0 < p.d_in; k0 += piece) {
      const int64_t k = min(piece, p.d_in - k0), steps = round_up(k, kTileDepth) / kTileDepth;
      for (int64_t j = 0; j < p.R; j += kTileRows)
        for (int64_t s = 0; s < steps; ++s)
          pack_tile(w + j * p.d_in + k0 + s * kTileDepth, p.d_in, min(kTileRows, p.R - j), k - s * kTileDepth,
                    w_wide + (j / kTileRows * steps + s) * kTileNumbers);
      for (int64_t i = 0; i < rows; i += kTiledRows) {
        const int64_t there = min(kTiledRows, rows - i);
        const bf16* xi = x + i * p.x_stride + k0;
        if (with_norm)
          for (int64_t m = 0; m < there; ++m) norm[i + m] += dot<Acc>(xi + m * p.x_stride, xi + m * p.x_stride, k);
        int64_t xi_stride = p.x_stride;
        if (there < kTiledRows || k % kTileDepth != 0) {
          std::memset(static_cast<void*>(x_wide), 0, kTiledRows * piece * sizeof(bf16));
          for (int64_t m = 0; m < there; ++m) std::memcpy(x_wide + m * piece, xi + m * p.x_stride, k * sizeof(bf16));
          xi = x_wide, xi_stride = piece;
        }
        for (int64_t j = 0; j < p.R; j += 2 * kTileRows) {
          const bf16* wj = w_wide + j / kTileRows * steps * kTileNumbers;
          const auto multiply = p.R - j > kTileRows ? multiply_tiles<2> : multiply_tiles<1>;
          const bool fetch = j == 0 && i + 2 * kTiledRows <= rows && xi_stride == p.x_stride;
          multiply(xi, xi_stride, wj, 64, steps * kTileNumbers, kTileNumbers, steps, u + i * stride + j, stride, k0 > 0,
                   fetch ? xi + kTiledRows * p.x_stride : nullptr);
        }
      }
    }
  }

  void expand_tiled() {
    const bf16* w = static_cast<const bf16*>(p.w_out);
    std::memset(static_cast<void*>(c + rows * stride), 0, (padded_rows - rows) * stride * sizeof(bf16));
    const int64_t width = panel_strips() * kStripColumns, packed = round_up(p.R, 2), steps = stride / kTileDepth;
    for (int64_t start = 0; start < p.d_out; start += width) {
      const int64_t end = min(start + width, p.d_out);
      for (int64_t column = start; column < end; column += kStripColumns) {
        bf16* strip = strip_at(column - start);
        pack_strip(w, p.d_out, p.R, column, min(kStripColumns, end - column), strip);
        std::memset(static_cast<void*>(strip + packed * kStripColumns), 0,
                    (stride - packed) * kStripColumns * sizeof(bf16));
      }
      for (int64_t i = 0; i < rows; i += kTiledRows)
        for (int64_t column = start; column < end; column += kStripColumns) {
          const int64_t columns = min(kStripColumns, end - column), there = min(kTiledRows, rows - i);
          for (int64_t m = 0; m < there; m += kExpandRows) prefetch_rows(first + i + m, column, columns);
          const bf16* strip = strip_at(column - start);
          for (int64_t v = 0; v < kStripColumns; v += 2 * kTileRows)
            multiply_tiles<2>(c + i * stride, stride, strip + 2 * v, 4 * kStripColumns, 2 * kTileRows,
                              kTileDepth * kStripColumns, steps, sums + v, kStripColumns, false);
          for (int64_t m = 0; m < there; ++m) {
            Vec<Acc> acc[kExpandVectors];
            for (int v = 0; v < kExpandVectors; ++v) acc[v] = load(sums + m * kStripColumns + v * kLanes<Acc>);
            write_row(first + i + m, column, columns, acc);
          }
        }
    }
  }
#endif

  Operand* strip_at(int64_t column) const { return panel + column / kStripColumns * strip_size(); }

  // Of the next tile's pieces of x the part that falls to columns [j, j + kDotCols): rows so far apart are no pattern
  // that the processor sees, and all of them at once would fill its buffers.
  static void prefetch_piece(const Operand* x, int64_t stride, int64_t left, int64_t k, int64_t j, int64_t columns) {
    const int64_t bytes = k * int64_t(sizeof(Operand)), lines = (bytes + 63) / 64;
    const int64_t begin = j * lines / columns * 64, end = min(j + kDotCols, columns) * lines / columns * 64;
    for (int64_t m = 0; m < min(kDotRows, left); ++m)
      for (int64_t byte = begin; byte < end; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + m * stride) + byte, 0, 2);
  }

  // What write_row will touch, while the tile is computed: too short a run of lines for the processor to see a pattern.
  void prefetch_rows(int64_t t, int64_t column, int64_t columns) const {
    for (int64_t m = 0; m < min(kExpandRows, first + rows - t); ++m)
      for (int64_t byte = 0; byte < columns * int64_t(sizeof(E)); byte += 64) {
        const int64_t at = column * int64_t(sizeof(E)) + byte;
        __builtin_prefetch(static_cast<const char*>(p.out) + (t + m) * p.d_out * int64_t(sizeof(E)) + at, 1);
        if (p.base)
          __builtin_prefetch(static_cast<const char*>(p.base) + (t + m) * p.base_stride * int64_t(sizeof(E)) + at);
      }
  }

  void write_row(int64_t t, int64_t column, int64_t columns, const Vec<Acc> (&acc)[kExpandVectors]) {
    E* out = static_cast<E*>(p.out) + t * p.d_out + column;
    const E* base = p.base ? static_cast<const E*>(p.base) + t * p.base_stride + column : nullptr;
    const bool tail = p.dsqnorm != nullptr;
    const E* z = tail ? static_cast<const E*>(p.z) + t * p.z_stride + column : nullptr;
    const Acc slope = tail ? 2 * static_cast<const Acc*>(p.dsqnorm)[t] : Acc(0);
    for (int v = 0; v < kExpandVectors; ++v) {
      const int64_t done = v * kLanes<Acc>, m = min(kLanes<Acc>, columns - done);
      if (m <= 0) break;
      Vec<Acc> value = acc[v];
      if (base) value += load_n(base + done, m);
      if (tail) value += load_n(z + done, m) * slope;
      store_n(out + done, value, m);
    }
  }

  void run() {
#if defined(NSC_AMX)
    if constexpr (kSame<E, bf16>)
      if (tiled<E>(p)) {
        const Tiles tiles;
        if (p.x) shrink_tiled(p.sqnorm != nullptr);
        mid();
        if (p.out) expand_tiled();
        return;
      }
#endif
    if (p.x) shrink_rows(p.sqnorm != nullptr);
    mid();
    if (p.out) expand_rows();
  }

  void expand_rows() {
    if constexpr (kSame<E, Acc>)
      if (few<E>(p)) return expand_few();
    expand();
  }

  void shrink_rows(bool with_norm) {
#if defined(NSC_PACKED_SHRINK)
    if (packed(p)) return shrink_packed(with_norm);
#endif
    shrink(with_norm);
  }

  void mid() {
    if (p.backward)
      mid_backward();
    else
      mid_forward();
  }
};

template <class F>
inline auto with_element(Element element, F f) {
  switch (element) {
    case Element::f64:
      return f(double{});
    case Element::f32:
      return f(float{});
    case Element::bf16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

// Weights that stay in the L2 cache are cheap to stream again; larger ones come from L3 or memory once per block, which
// at 96 rows was measured to cost a tenth of the time. Weights that are copied first repay that over as many rows as
// have their sums in the L2 cache; at 96 rows, R = 320, d = 4096 the copies cost 16 %.
int64_t most_rows(const Problem& p) {
  constexpr double kStaysInCache = 1 << 18;  // elements
  constexpr int64_t kLeast = 8 * kGranule, kMost = 32 * kGranule;
  if (packed(p)) {
    const int64_t fit = kPackedSumsBytes / (round_up(p.R, 16) * 4 + 1) / kLeast * kLeast;
    return fit < kLeast ? kLeast : min(fit, kMost);
  }
  return double(p.R) * double(p.d_in + p.d_out) <= kStaysInCache ? kLeast : kMost;
}

int64_t rows_together(const Problem& p) {
  constexpr int64_t kTiles = 8 * kGranule;
  static_assert(kTiles % kTiledRows == 0, "whole tiles of the matrix unit");
  return with_element(p.element, [&](auto e) { return tiled<decltype(e)>(p) ? kTiles : kGranule; });
}

int64_t scratch_bytes(const Problem& p, int64_t rows) {
  return with_element(p.element, [&](auto e) { return Block<decltype(e)>(p, 0, rows, nullptr).bytes; });
}

void run(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  with_element(p.element, [&](auto e) { Block<decltype(e)>(p, begin, end, scratch).run(); });
}

}  // namespace
}  // namespace NSC_NAMESPACE
}  // namespace nsc
