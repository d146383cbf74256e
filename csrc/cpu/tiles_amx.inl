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
// its steps next_step, and its rows of pairs b_stride bytes.
template <int Columns>
inline void multiply_tiles(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t next_column,
                           int64_t next_step, int64_t steps, float* sum, int64_t sum_stride, bool add) {
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
// transpose of 16 x 16 words.
inline void pack_tile(const bf16* w, int64_t stride, int64_t rows, int64_t columns, bf16* tile) {
  const __mmask32 valid = columns >= kTileDepth ? ~0u : (1u << columns) - 1;
  __m512i in[16], out[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    in[i] = i < rows ? _mm512_maskz_loadu_epi16(valid, w + i * stride) : _mm512_setzero_si512();
  // Neighbouring words, then pairs of words, then quarters of a register, then halves.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    out[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    out[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    in[i] = _mm512_unpacklo_epi64(out[i], out[i + 2]);
    in[i + 1] = _mm512_unpackhi_epi64(out[i], out[i + 2]);
    in[i + 2] = _mm512_unpacklo_epi64(out[i + 1], out[i + 3]);
    in[i + 3] = _mm512_unpackhi_epi64(out[i + 1], out[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(in[i], in[i + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(in[i], in[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(in[i + 8], in[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(in[i + 8], in[i + 12], 0xdd);
    out[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    out[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    out[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    out[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kTileDepth, out[i]);
}
