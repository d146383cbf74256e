// Both steps for bfloat16 on the matrix unit of AMX; part of kernels.inl.
//
// A tile register holds 16 rows of 64 bytes. The instruction multiplies 16 x 32 numbers, as they lie in memory, by
// 32 x 16 numbers, of which those that are multiplied with two neighbours lie side by side: rows of pairs. Four sums of
// 16 x 16 are kept at a time, so that each tile that is loaded is used twice. Operands are filled up with zeros to whole
// tiles, in copies, so that nothing is loaded that is not theirs: zero times what lies behind them may be NaN.

constexpr int64_t kTileRows = 16;     // of both factors' long sides
constexpr int64_t kTileDepth = 32;    // numbers summed by one instruction
constexpr int64_t kTiledRows = 32;    // rows at a time: two tiles
constexpr int64_t kTileNumbers = 512;  // of one tile of a factor

// For as long as it lives, tiles of full size are there.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// sum [32, 16 * Columns] (+)= a [32, 32 * steps] . b; the tiles of b's columns are next_column numbers apart, those of
// its steps next_step, and its rows of pairs b_stride bytes. Meanwhile as much of `next`, rows like a's, is fetched: rows
// so far apart are no pattern that the processor sees.
template <int Columns>
inline void multiply_tiles(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t next_column,
                           int64_t next_step, int64_t steps, float* sum, int64_t sum_stride, bool add,
                           const bf16* next = nullptr) {
  const int64_t bytes = sum_stride * int64_t(sizeof(float)), a_bytes = a_stride * int64_t(sizeof(bf16));
  float* const low = sum + kTileRows * sum_stride;
  if (add) {
    _tile_loadd(0, sum, bytes);
    _tile_loadd(2, low, bytes);
    if constexpr (Columns == 2) {
      _tile_loadd(1, sum + kTileRows, bytes);
      _tile_loadd(3, low + kTileRows, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileDepth, b += next_step) {
    if (next)
      for (int64_t m = 0; m < kTiledRows; ++m) __builtin_prefetch(next + m * a_stride + s * kTileDepth, 0, 2);
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + kTileRows * a_stride, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Columns == 2) {
      _tile_loadd(7, b + next_column, b_stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum, bytes);
  _tile_stored(2, low, bytes);
  if constexpr (Columns == 2) {
    _tile_stored(1, sum + kTileRows, bytes);
    _tile_stored(3, low + kTileRows, bytes);
  }
}

// One tile of pairs from 16 rows of w, of which `rows` are there, and 32 columns, of which `columns` are there: the
// transpose of 16 x 16 words. Quarters of registers are put in their places as they are loaded, which the ports that
// move words about within a register have no part in.
inline void pack_tile(const bf16* w, int64_t stride, int64_t rows, int64_t columns, bf16* tile) {
  alignas(64) bf16 whole[kTileNumbers];
  if (rows < kTileRows || columns < kTileDepth) {
    std::memset(static_cast<void*>(whole), 0, sizeof(whole));
    for (int64_t i = 0; i < min(rows, kTileRows); ++i)
      std::memcpy(whole + i * kTileDepth, w + i * stride, min(columns, kTileDepth) * sizeof(bf16));
    w = whole, stride = kTileDepth;
  }
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512i row[4];  // i, i + 4, i + 8 and i + 12
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const bf16* from = w + i * stride + quarter * 8;
      auto four = [&](int down) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + down * stride)); };
      row[i] = _mm512_castsi128_si512(four(0));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0x00f0, four(4));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0x0f00, four(8));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0xf000, four(12));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
    bf16* to = tile + quarter * 4 * kTileDepth;
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(to + kTileDepth, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(to + 2 * kTileDepth, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(to + 3 * kTileDepth, _mm512_unpackhi_epi64(high01, high23));
  }
}
