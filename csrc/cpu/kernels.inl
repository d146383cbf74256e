// The CPU kernels, compiled once per instruction set. The including file defines
//
//   NSC_NAMESPACE       a namespace of its own
//   NSC_VECTOR_BYTES    16, 32 or 64
//   NSC_DOT_ROWS        rows of a shrink tile
//   NSC_EXPAND_VECTORS  vectors of columns of an expand tile
//   NSC_F16C, NSC_AVX512, NSC_AVX512_BF16   what the compiler may use, where defined
//
// Everything is in an unnamed namespace and no standard-library template is used: a function that the linker could
// share between these files might be taken from the file compiled for a processor that this one is not.
//
// Tiles. Shrink has the long dimension d_in innermost in both operands, so its tile is DOT_ROWS x 4 dot products kept
// as vectors and summed across lanes once at the end: no operand is transposed or packed. Expand has the short
// dimension R innermost, so its tile is 6 rows x a strip of columns, the strip of w_out copied next to itself first
// (rows of w_out are d_out apart, which for d_out a power of two would map them all to one set of the L1 cache).
// Narrow types are widened while they are copied, so there is one pair of tiles for all of them, and a second pair for
// bfloat16 where the processor multiplies it.

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

constexpr int kDotRows = NSC_DOT_ROWS;
constexpr int kDotCols = 4;
constexpr int kExpandRows = 6;
constexpr int kExpandVectors = NSC_EXPAND_VECTORS;
// Of a row of x and of w_in at a time: kDotRows + kDotCols such pieces stay in a 32 KiB L1 cache.
constexpr int64_t kChunkBytes = 3072;
// Rows of w_in at a time: with kChunkBytes each they stay in the L2 cache while all rows of x pass by.
constexpr int64_t kPanelRows = 96;
// Of w_out at a time: strips side by side, as many as stay in the L2 cache. Wide panels matter where R is small: rows
// of base and out are then visited a few KiB at a time and not a few lines at a time.
constexpr int64_t kPanelBytes = 256 * 1024;
constexpr int64_t kPanelStrips = 16;

static_assert(kGranule % kExpandRows == 0, "a granule is a whole number of expand tiles");

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class Acc>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(NSC_VECTOR_BYTES)));
  typedef float memory __attribute__((vector_size(NSC_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(NSC_VECTOR_BYTES)));
  typedef double memory __attribute__((vector_size(NSC_VECTOR_BYTES), aligned(8), may_alias));
};
template <class Acc>
using Vec = typename Vector<Acc>::type;
template <class Acc>
constexpr int kLanes = NSC_VECTOR_BYTES / sizeof(Acc);

typedef uint32_t Words __attribute__((vector_size(NSC_VECTOR_BYTES)));
typedef int32_t Flags __attribute__((vector_size(NSC_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(NSC_VECTOR_BYTES / 2)));
typedef uint16_t HalvesMemory __attribute__((vector_size(NSC_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class E>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// ---- elements to and from accumulation vectors

inline Vec<float> load(const float* p) { return *reinterpret_cast<const Vector<float>::memory*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const Vector<double>::memory*>(p); }
inline void store(float* p, Vec<float> v) { *reinterpret_cast<Vector<float>::memory*>(p) = v; }
inline void store(double* p, Vec<double> v) { *reinterpret_cast<Vector<double>::memory*>(p) = v; }

inline Vec<float> load(const bf16* p) {
  Halves h = *reinterpret_cast<const HalvesMemory*>(p);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Words) << 16);
}

inline void store(bf16* p, Vec<float> v) {
#if defined(NSC_AVX512_BF16)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  // Round to nearest even by adding half a unit of the last kept place; a NaN must not carry into infinity.
  Words bits = reinterpret_cast<Words>(v);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Flags is_nan = v != v;
  Words kept = (reinterpret_cast<Words>(~is_nan) & rounded) | (reinterpret_cast<Words>(is_nan) & 0x7fc0u);
  *reinterpret_cast<HalvesMemory*>(p) = __builtin_convertvector(kept, Halves);
#endif
}

#if defined(NSC_AVX512)
inline Vec<float> load(const f16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(f16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(NSC_F16C)
inline Vec<float> load(const f16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float widen(f16 h) {
  // Exponent and mantissa moved into place and rescaled: exact for normal and subnormal numbers.
  uint32_t magnitude = uint32_t(h.bits & 0x7fff) << 13, sign = uint32_t(h.bits & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  std::memcpy(&magnitude, &f, 4);
  if ((h.bits & 0x7c00) == 0x7c00) magnitude = 0x7f800000u | uint32_t(h.bits & 0x03ff) << 13;
  uint32_t bits = magnitude | sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline f16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (bits < 0x38800000) {
    // Subnormal: adding 2^-1 leaves the wanted integer, rounded to nearest even, in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  return {uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13))};
}
inline Vec<float> load(const f16* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
}
inline void store(f16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow(v[i]);
}
#endif

// The first n < lanes elements, the rest zero; and the first n of a vector.
template <class E>
inline Vec<typename AccOf<E>::type> load_part(const E* p, int64_t n) {
  alignas(64) E whole[kLanes<typename AccOf<E>::type>] = {};
  std::memcpy(whole, p, n * sizeof(E));
  return load(whole);
}
template <class E>
inline void store_part(E* p, Vec<typename AccOf<E>::type> v, int64_t n) {
  alignas(64) E whole[kLanes<typename AccOf<E>::type>];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(E));
}

// f(first element, count): whole vectors with count == lanes, then what is left.
template <class Acc, class F>
inline void for_vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<Acc> <= n; i += kLanes<Acc>) f(i, int64_t(kLanes<Acc>));
  if (i < n) f(i, n - i);
}
template <class E>
inline Vec<typename AccOf<E>::type> load_n(const E* p, int64_t n) {
  return n == kLanes<typename AccOf<E>::type> ? load(p) : load_part(p, n);
}
template <class E>
inline void store_n(E* p, Vec<typename AccOf<E>::type> v, int64_t n) {
  if (n == kLanes<typename AccOf<E>::type>)
    store(p, v);
  else
    store_part(p, v, n);
}

// Halves added to halves: the same tree as in the tiles below.
template <class Acc>
inline Acc sum_lanes(Vec<Acc> v) {
  alignas(64) Acc a[kLanes<Acc>];
  store(a, v);
  for (int n = kLanes<Acc> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

template <class Acc, class E, class F>
inline Acc dot(const E* a, const F* b, int64_t n) {
  Vec<Acc> sum = {};
  for_vectors<Acc>(n, [&](int64_t i, int64_t m) { sum += load_n(a + i, m) * load_n(b + i, m); });
  return sum_lanes<Acc>(sum);
}

// f(first row, tile) over tiles of Most rows, and for what is left one of the next even number of rows.
template <int Rows>
struct Tile {
  static constexpr int rows = Rows;
};
template <int Most, class F>
inline void for_tiles(int64_t rows, F f) {
  int64_t i = 0;
  for (; i + Most <= rows; i += Most) f(i, Tile<Most>{});
  const int64_t left = rows - i;
  if (left > 4)
    f(i, Tile<(Most > 4 ? 6 : 4)>{});
  else if (left > 2)
    f(i, Tile<4>{});
  else if (left > 0)
    f(i, Tile<2>{});
}

template <class E, class Acc>
inline void widen_rows(const E* from, int64_t from_stride, int64_t rows, int64_t columns, Acc* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for_vectors<Acc>(columns, [&](int64_t c, int64_t m) {
      store_n(to + i * to_stride + c, load_n(from + i * from_stride + c, m), m);
    });
}

// ---- shrink tile: u[i, j] (+)= x_i . w_j over k elements

#if defined(NSC_AVX512)
// Steps of summing many vectors across lanes at once; the additions of each are those of sum_lanes.
// [a, b] -> the two 256-bit halves of each added, side by side.
inline __m512 halves_added(__m512 a, __m512 b) {
  return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
}
// Two such results -> one vector of four 128-bit quarters.
inline __m512 quarters_added(__m512 ab, __m512 cd) {
  return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}
// Four such results, one per column -> in each quarter the four columns' sums.
inline __m512 lanes_added(const __m512 (&column)[4]) {
  const __m512 c01 = _mm512_unpacklo_ps(column[0], column[1]) + _mm512_unpackhi_ps(column[0], column[1]);
  const __m512 c23 = _mm512_unpacklo_ps(column[2], column[3]) + _mm512_unpackhi_ps(column[2], column[3]);
  return _mm512_shuffle_ps(c01, c23, 0x44) + _mm512_shuffle_ps(c01, c23, 0xee);
}
#endif

template <int M, class Acc>
inline void finish_dots(Vec<Acc> (&sum)[M][kDotCols], Acc* u, int64_t u_stride, bool add) {
#if defined(NSC_AVX512)
  if constexpr (sizeof(Acc) == 4) {
    static_assert(kDotCols == 4, "a quarter holds one row");
    for (int i = 0; i < M; i += 4) {
      __m512 column[4];
      for (int j = 0; j < 4; ++j) {
        const __m512 first = halves_added((__m512)sum[i][j], (__m512)sum[i + 1][j]);
        const __m512 second = i + 2 < M ? halves_added((__m512)sum[i + 2][j], (__m512)sum[i + 3][j]) : first;
        column[j] = quarters_added(first, second);
      }
      const __m512 all = lanes_added(column);
      const __m128 row[4] = {_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1),
                             _mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)};
      for (int m = 0; m < 4 && i + m < M; ++m) {
        Acc* to = u + (i + m) * u_stride;
        _mm_storeu_ps(to, add ? row[m] + _mm_loadu_ps(to) : row[m]);
      }
    }
    return;
  }
#endif
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < kDotCols; ++j) {
      Acc s = sum_lanes<Acc>(sum[i][j]);
      u[i * u_stride + j] = add ? u[i * u_stride + j] + s : s;
    }
}

template <int M, class Acc>
inline void dot_tile(const Acc* const* x, const Acc* const* w, int64_t k, Acc* u, int64_t u_stride, bool add) {
  Vec<Acc> sum[M][kDotCols] = {};
  auto step = [&](auto fetch) {
    Vec<Acc> xi[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) xi[i] = fetch(x[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) {
      Vec<Acc> wj = fetch(w[j]);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] += xi[i] * wj;
    }
  };
  int64_t c = 0;
  for (; c + kLanes<Acc> <= k; c += kLanes<Acc>) step([&](const Acc* p) { return load(p + c); });
  if (c < k) step([&](const Acc* p) { return load_part(p + c, k - c); });
  finish_dots<M>(sum, u, u_stride, add);
}

#if defined(NSC_AVX512_BF16)
template <int M>
inline void dot_tile(const bf16* const* x, const bf16* const* w, int64_t k, float* u, int64_t u_stride, bool add) {
  Vec<float> sum[M][kDotCols] = {};
  auto step = [&](auto fetch) {
    __m512bh xi[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) xi[i] = fetch(x[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) {
      __m512bh wj = fetch(w[j]);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[i][j], xi[i], wj);
    }
  };
  int64_t c = 0;
  for (; c + 32 <= k; c += 32) step([&](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p + c); });
  if (c < k) {
    __mmask32 valid = (1u << (k - c)) - 1;
    step([&](const bf16* p) { return (__m512bh)_mm512_maskz_loadu_epi16(valid, p + c); });
  }
  finish_dots<M>(sum, u, u_stride, add);
}
#endif

// ---- expand tile: acc[m, :] = sum_r c[m, r] * strip[r, :]

template <int M, class Acc>
inline void expand_tile(const Acc* c, int64_t c_stride, const Acc* strip, int64_t R,
                        Vec<Acc> (&acc)[M][kExpandVectors]) {
  constexpr int width = kExpandVectors * kLanes<Acc>;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) acc[m][v] = Vec<Acc>{};
  for (int64_t r = 0; r < R; ++r) {
    Vec<Acc> w[kExpandVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) w[v] = load(strip + r * width + v * kLanes<Acc>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec<Acc> factor = Vec<Acc>{} + c[m * c_stride + r];
#pragma GCC unroll 8
      for (int v = 0; v < kExpandVectors; ++v) acc[m][v] += factor * w[v];
    }
  }
}

template <class E, class Acc>
inline void pack_strip(const E* w, int64_t d, int64_t R, int64_t column, int64_t columns, Acc* strip) {
  constexpr int width = kExpandVectors * kLanes<Acc>;
  if (columns < width) std::memset(strip, 0, R * width * sizeof(Acc));
  widen_rows(w + column, d, R, columns, strip, width);
}

#if defined(NSC_AVX512_BF16)
// Pairs of rows (r, r + 1) side by side in 32 bits, as the instruction wants both operands.
template <int M>
inline void expand_tile(const bf16* c, int64_t c_stride, const bf16* strip, int64_t R,
                        Vec<float> (&acc)[M][kExpandVectors]) {
  constexpr int width = kExpandVectors * 16;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) acc[m][v] = Vec<float>{};
  for (int64_t r = 0; r < R; r += 2) {
    __m512bh w[kExpandVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(strip + r * width + v * 32);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, c + m * c_stride + r, 4);
      __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < kExpandVectors; ++v)
        acc[m][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)acc[m][v], factor, w[v]);
    }
  }
}

inline void pack_strip(const bf16* w, int64_t d, int64_t R, int64_t column, int64_t columns, bf16* strip) {
  constexpr int width = kExpandVectors * 16;
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < R; r += 2) {
    const bf16* even = w + r * d + column;
    const __mmask32 has_odd = r + 1 < R ? ~0u : 0u;
    for (int v = 0; v < kExpandVectors; v += 2) {
      const int64_t left = columns - v * 16;
      const __mmask32 valid = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      __m512i a = _mm512_maskz_loadu_epi16(valid, even + v * 16);
      __m512i b = _mm512_maskz_loadu_epi16(valid & has_odd, even + d + v * 16);
      _mm512_storeu_si512(strip + r * width + v * 32, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(strip + r * width + v * 32 + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
#endif

// ---- the three steps on a block of rows

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
  Operand* c;            // [padded_rows, stride]: the operand of expand, rounded to E
  Acc* norm;             // [padded_rows]
  Operand* panel;        // strips of w_out, each [R rounded up to even, kStripColumns]
  Operand* x_wide;       // [padded_rows, piece]
  Operand* w_wide;       // [kPanelRows, piece]
  int64_t bytes = 0;     // of scratch

  // With a null scratch it only counts the bytes.
  Block(const Problem& problem, int64_t begin, int64_t end, void* scratch)
      : p(problem),
        first(begin),
        rows(end - begin),
        padded_rows(round_up(rows, kGranule)),
        stride(round_up(p.R, 16)),
        piece(chunk(p.d_in)) {
    auto take = [&](auto*& member, int64_t count) {
      member = reinterpret_cast<decltype(+member)>(static_cast<char*>(scratch) + bytes);
      bytes += round_up(count * int64_t(sizeof(*member)), 64);
    };
    take(u, padded_rows * stride);
    take(c, padded_rows * stride);
    take(norm, padded_rows);
    take(panel, panel_strips() * strip_size());
    take(x_wide, kWiden ? padded_rows * piece : 0);
    take(w_wide, kWiden ? kPanelRows * piece : 0);
  }

  static int64_t chunk(int64_t d) {
    const int64_t most = kChunkBytes / int64_t(sizeof(Operand));
    const int64_t pieces = (d + most - 1) / most;
    return round_up((d + pieces - 1) / pieces, 64);
  }

  int64_t strip_size() const { return round_up(p.R, 2) * kStripColumns; }
  int64_t panel_strips() const {
    const int64_t fit = kPanelBytes / (strip_size() * int64_t(sizeof(Operand)) + 1);
    return min(min(kPanelStrips, fit < 1 ? 1 : fit), (p.d_out + kStripColumns - 1) / kStripColumns);
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
      if (with_norm)
        for (int64_t i = 0; i < rows; ++i) norm[i] += dot<Acc>(xk + i * xk_stride, xk + i * xk_stride, k);
      for (int64_t r0 = 0; r0 < p.R; r0 += kPanelRows) {
        const int64_t panel = min(kPanelRows, p.R - r0);
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
          for (int64_t j = 0; j < panel; j += kDotCols) {
            const Operand* wj[kDotCols];
            for (int b = 0; b < kDotCols; ++b) wj[b] = wk + min(j + b, panel - 1) * wk_stride;
            dot_tile<tile.rows>(xi, wj, k, u + i * stride + r0 + j, stride, k0 > 0);
          }
        });
      }
    }
  }

  // c <- u rounded to E, one row; columns past R are zero because expand reads them in pairs.
  void round_row(int64_t i) {
    Acc* from = u + i * stride;
    Operand* to = c + i * stride;
    for (int64_t r = p.R; r < round_up(p.R, 2); ++r) from[r] = 0;
    for_vectors<Acc>(round_up(p.R, 2), [&](int64_t r, int64_t m) {
      if constexpr (kSame<E, Operand>) {
        store_n(to + r, load_n(from + r, m), m);
      } else {
        alignas(64) E rounded[kLanes<Acc>];
        store(rounded, load_n(from + r, m));
        store_n(to + r, load(rounded), m);
      }
    });
  }

  const Acc* lam_row(int64_t i) const {
    return static_cast<const Acc*>(p.lam) + (p.lam_per_row ? (first + i) * p.K : 0);
  }

  void mid_forward() {
    for (int64_t i = 0; i < rows; ++i) {
      Acc* ui = u + i * stride;
      const int64_t t = first + i;
      const Acc* lam = lam_row(i);
      if (p.sqnorm) static_cast<Acc*>(p.sqnorm)[t] = norm[i];
      if (p.u_out) {
        E* saved = static_cast<E*>(p.u_out) + t * p.R;
        for_vectors<Acc>(p.R, [&](int64_t r, int64_t m) { store_n(saved + r, load_n(ui + r, m), m); });
      }
      for (int64_t k = 0; k < p.K; ++k) {
        const int64_t a = p.offsets[k], n = p.offsets[k + 1] - a;
        if (p.quad) static_cast<Acc*>(p.quad)[t * p.K + k] = dot<Acc>(ui + a, ui + a, n);
        for (int64_t r = a; r < a + n; ++r) ui[r] *= lam[k];
      }
      round_row(i);
    }
  }

  void mid_backward() {
    for (int64_t i = 0; i < rows; ++i) {
      Acc* vi = u + i * stride;
      const int64_t t = first + i;
      const Acc* lam = lam_row(i);
      const E* ui = static_cast<const E*>(p.u) + t * p.R;
      const Acc* dquad = p.dquad ? static_cast<const Acc*>(p.dquad) + t * p.K : nullptr;
      Acc* dlam = nullptr;
      bool add = false;
      if (p.dlam) {
        dlam = static_cast<Acc*>(p.dlam) + (p.lam_per_row ? t : t / kGranule) * p.K;
        add = !p.lam_per_row && t % kGranule != 0;
      }
      for (int64_t k = 0; k < p.K; ++k) {
        const int64_t a = p.offsets[k], n = p.offsets[k + 1] - a;
        if (dlam) {
          const Acc s = p.x ? dot<Acc>(ui + a, vi + a, n) : Acc(0);
          dlam[k] = add ? dlam[k] + s : s;
        }
        if (!p.out) continue;
        const Acc scale = p.x ? lam[k] : Acc(0), curve = dquad ? 2 * dquad[k] : Acc(0);
        for_vectors<Acc>(n, [&](int64_t r, int64_t m) {
          Vec<Acc> value = {};
          if (p.x) value = load_n(vi + a + r, m) * scale;
          if (dquad) value += load_n(ui + a + r, m) * curve;
          store_n(vi + a + r, value, m);
        });
      }
      if (p.out) round_row(i);
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
      for_tiles<kExpandRows>(rows, [&](int64_t i, auto tile) {
        for (int64_t column = start; column < end; column += kStripColumns) {
          const int64_t columns = min(kStripColumns, end - column);
          prefetch_rows(first + i, column, columns);
          Vec<Acc> acc[tile.rows][kExpandVectors];
          expand_tile<tile.rows>(c + i * stride, stride, strip_at(column - start), p.R, acc);
          for (int m = 0; m < tile.rows && i + m < rows; ++m) write_row(first + i + m, column, columns, acc[m]);
        }
      });
    }
  }

  Operand* strip_at(int64_t column) const { return panel + column / kStripColumns * strip_size(); }

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
    if (p.x) shrink(p.sqnorm != nullptr);
    if (p.backward)
      mid_backward();
    else
      mid_forward();
    if (p.out) expand();
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

int64_t scratch_bytes(const Problem& p, int64_t rows) {
  return with_element(p.element, [&](auto e) { return Block<decltype(e)>(p, 0, rows, nullptr).bytes; });
}

void run(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  with_element(p.element, [&](auto e) { Block<decltype(e)>(p, begin, end, scratch).run(); });
}

}  // namespace
}  // namespace NSC_NAMESPACE
}  // namespace nsc
