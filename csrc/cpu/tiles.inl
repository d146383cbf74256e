// The two register tiles, and the copies that prepare their operands; part of kernels.inl.
//
// Shrink has the long dimension d_in innermost in both operands, so its tile is rows x 4 dot products kept as vectors
// and summed across lanes once at the end: no operand is transposed or packed. Expand has the short dimension R
// innermost, so its tile is rows x a strip of columns, the strip of w_out copied next to itself first (rows of w_out
// are d_out apart, which for d_out a power of two would map them all to one set of the L1 cache). Narrow types are
// widened while they are copied, so there is one pair of tiles for all of them, and a second pair for bfloat16 where
// the processor multiplies it.

constexpr int kDotRows = NSC_DOT_ROWS;
constexpr int kDotCols = 4;
constexpr int kExpandRows = 6;
constexpr int kExpandVectors = NSC_EXPAND_VECTORS;

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

// Shrink tile: u[i, j] (+)= x_i . w_j over k elements

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

// norm[m] += x_m . x_m over k elements, of all rows of a tile at a time: one sum waits for itself in every turn.
template <int M, class E, class Acc>
inline void add_norms(const E* const* x, int64_t k, Acc* norm) {
  Vec<Acc> sum[M] = {};
  for_vectors<Acc>(k, [&](int64_t c, int64_t n) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<Acc> value = load_n(x[m] + c, n);
      sum[m] += value * value;
    }
  });
  for (int m = 0; m < M; ++m) norm[m] += sum_lanes<Acc>(sum[m]);
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

template <int M, class V>
inline void hand_over(const V (&sum)[M][kExpandVectors], V (&acc)[M][kExpandVectors]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) acc[m][v] = sum[m][v];
}

// Expand tile: acc[m, :] = sum_r c[m, r] * strip[r, :]

// The sums are the tile's own while it adds: those of the caller, whose address others have, would be written to memory
// in every turn.
template <int M, class Acc>
inline void expand_tile(const Acc* c, int64_t c_stride, const Acc* strip, int64_t strip_stride, int64_t R,
                        Vec<Acc> (&acc)[M][kExpandVectors]) {
  Vec<Acc> sum[M][kExpandVectors] = {};
  const Acc* upper = c;
  const Acc* lower = c + (M > 3 ? 3 : 0) * c_stride;
  for (int64_t r = 0; r < R; ++r) {
    // Two pointers reach six rows. The compiler would keep one for each, more than there are registers, and reload
    // them from the stack in every turn, if it could see that they move in step.
    asm("" : "+r"(upper), "+r"(lower));
    Vec<Acc> w[kExpandVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) w[v] = load(strip + v * kLanes<Acc>);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<Acc> factor = broadcast(m < 3 ? upper + m * c_stride : lower + (m - 3) * c_stride);
#pragma GCC unroll 8
      for (int v = 0; v < kExpandVectors; ++v) sum[m][v] += factor * w[v];
    }
    ++upper, ++lower, strip += strip_stride;
  }
  hand_over(sum, acc);
}

template <class E, class Acc>
inline void pack_strip(const E* w, int64_t d, int64_t R, int64_t column, int64_t columns, Acc* strip) {
  constexpr int width = kExpandVectors * kLanes<Acc>;
  if (columns < width) std::memset(strip, 0, R * width * sizeof(Acc));
  widen_rows(w + column, d, R, columns, strip, width);
}

#if defined(NSC_PACKED_SHRINK)
// 8 x 8 numbers transposed.
inline void transpose(Vec<float> (&rows)[8]) {
  __m256 pair[8], four[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Vec<float>)_mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
    rows[i + 4] = (Vec<float>)_mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
  }
}

// strip[c, j] = w[j, c] for k columns c of up to a strip's width of rows, zero for rows that are not there.
template <class E>
inline void pack_transposed(const E* w, int64_t d, int64_t rows, int64_t k, float* strip) {
  constexpr int width = kExpandVectors * 8;
  for (int v = 0; v < kExpandVectors; ++v)
    for_vectors<float>(k, [&](int64_t c, int64_t m) {
      Vec<float> block[8];
      for (int j = 0; j < 8; ++j)
        block[j] = v * 8 + j < rows ? load_n(w + (v * 8 + j) * d + c, m) : Vec<float>{};
      transpose(block);
      for (int i = 0; i < m; ++i) store(strip + (c + i) * width + v * 8, block[i]);
    });
}

inline void pack_transposed(const double* w, int64_t d, int64_t rows, int64_t k, double* strip) {
  constexpr int width = kExpandVectors * kLanes<double>;
  for (int64_t c = 0; c < k; ++c)
    for (int j = 0; j < width; ++j) strip[c * width + j] = j < rows ? w[j * d + c] : 0.0;
}
#endif

#if defined(NSC_AVX512_BF16)
// Pairs of rows (r, r + 1) side by side in 32 bits, as the instruction wants both operands.
template <int M>
inline void expand_tile(const bf16* c, int64_t c_stride, const bf16* strip, int64_t strip_stride, int64_t R,
                        Vec<float> (&acc)[M][kExpandVectors]) {
  Vec<float> sum[M][kExpandVectors] = {};
  for (int64_t r = 0; r < R; r += 2) {
    __m512bh w[kExpandVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kExpandVectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(strip + r * strip_stride + v * 32);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, c + m * c_stride + r, 4);
      __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < kExpandVectors; ++v)
        sum[m][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[m][v], factor, w[v]);
    }
  }
  hand_over(sum, acc);
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
