// Tiles of the updates, what is done to their entries, and what is made of them; compiled once per instruction set, as
// kernels.inl is, and without contraction: a product and a sum are rounded apart, as PyTorch rounds them, except where
// `fma` is written.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "entries.h"

namespace nsc {
namespace NSC_NAMESPACE {
namespace {

#include "vectors.inl"

using V = Vec<float>;
constexpr int64_t kLane = kLanes<float>;
// Of a tile. Its entries of six tasks and the panel of A that they come from stay in an L2 cache of 512 KiB at rank 16.
constexpr int64_t kRows = 8, kColumns = 512;
// Of a product at a time: as many sums as there are registers for.
constexpr int64_t kSumRows = NSC_VECTOR_BYTES == 64 ? 8 : 4, kSumColumns = 2 * kLane;
static_assert(kColumns % 64 == 0 && kColumns % kSumColumns == 0 && kStripRows % kRows == 0, "whole tiles");

inline V splat(float x) { return x - V{}; }
inline V keep(Flags where, V x) { return reinterpret_cast<V>(where & reinterpret_cast<Flags>(x)); }
inline V magnitude(V x) { return reinterpret_cast<V>(reinterpret_cast<Words>(x) & 0x7fffffffu); }
// Rounded once, as PyTorch's own additions with a factor are, where the processor can.
inline V fma(V a, V b, V c) {
#if defined(NSC_AVX512)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline V either(Flags where, V yes, V no) {
  return reinterpret_cast<V>((where & reinterpret_cast<Flags>(yes)) | (~where & reinterpret_cast<Flags>(no)));
}
// As numbers, 1 and 0.
inline V ones(Flags where) { return keep(where, splat(1.0f)); }
// What is not finite times zero is not a number, as in PyTorch.
inline V where_alike(V unified, V value) {
  return unified * ones(((unified > 0) & (value > 0)) | ((unified < 0) & (value < 0)));
}

// A sum in double of vectors of floats.
struct Sum {
  typedef float Half __attribute__((vector_size(NSC_VECTOR_BYTES / 2)));
  Vec<double> low = {}, high = {};
  void add(V x) {
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    low += __builtin_convertvector(halves[0], Vec<double>);
    high += __builtin_convertvector(halves[1], Vec<double>);
  }
  double total() const { return sum_lanes<double>(low + high); }
};

// Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011).
typedef uint64_t Pairs __attribute__((vector_size(NSC_VECTOR_BYTES)));

inline Pairs times(Pairs a, uint32_t m) {
#if defined(NSC_AVX512)
  // Masked by ones: GCC warns of its own unmasked intrinsic.
  return (Pairs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi32(int32_t(m)));
#elif defined(__AVX2__)
  return (Pairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int32_t(m)));
#elif defined(__SSE2__)
  return (Pairs)_mm_mul_epu32((__m128i)a, _mm_set1_epi32(int32_t(m)));
#else
  return (a & 0xffffffffu) * m;
#endif
}

inline void multiply(Words a, uint32_t m, Words* high, Words* low) {
  const Pairs even = times(reinterpret_cast<Pairs>(a), m), odd = times(reinterpret_cast<Pairs>(a) >> 32, m);
  *high = reinterpret_cast<Words>((even >> 32) | (odd & 0xffffffff00000000u));
  *low = reinterpret_cast<Words>((even & 0xffffffffu) | (odd << 32));
}

// Four random words for each of the counters (c0, row).
inline void philox(Words c0, uint64_t row, uint64_t key, Words (&c)[4]) {
  c[0] = c0;
  c[1] = Words{} + uint32_t(row);
  c[2] = Words{} + uint32_t(row >> 32);
  c[3] = Words{};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    Words high0, low0, high1, low1;
    multiply(c[0], 0xd2511f53u, &high0, &low0);
    multiply(c[2], 0xcd9e8d57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
  }
}

// f(column, words) for `columns` rounded up to 64 of a row: every 64 columns share 16 counters, the first 16 take their
// first words, and so on. The numbers are those of nsc_merge/methods/task_vectors/draws.py on every processor.
template <class F>
inline void draws(uint64_t key, uint64_t row, int64_t first_column, int64_t columns, F f) {
  Words lane;
  for (int64_t i = 0; i < kLane; ++i) lane[i] = uint32_t(i);
  for (int64_t c = 0; c < columns; c += 64)
    for (int64_t g = 0; g < 16; g += kLane) {
      Words words[4];
      philox(lane + uint32_t((first_column + c) / 64 * 16 + g), row, key, words);
      for (int64_t w = 0; w < 4; ++w) f(c + 16 * w + g, words[w]);
    }
}

struct Tile {
  int64_t row, column, rows, columns, padded;  // columns of 64 at least; what is beyond `columns` is zero
  float* values;                               // [tasks + 1, kRows, kColumns]: each task's, and one more
  float* of(int64_t task, int64_t r) const { return values + (task * kRows + r) * kColumns; }
};

inline int64_t panel_floats(const Entries& e) { return kColumns * e.offsets[e.tasks]; }

int64_t scratch_bytes(const Entries& e) {
  return (panel_floats(e) + (e.tasks + 1) * kRows * kColumns) * int64_t(sizeof(float));
}

// Columns of A side by side as the products read them: [kColumns / kSumColumns, R, kSumColumns].
void pack(const Entries& e, int64_t column, int64_t columns, float* panel) {
  const int64_t R = e.offsets[e.tasks];
  for (int64_t c = 0; c < kColumns; c += kSumColumns)
    for (int64_t j = 0; j < R; ++j) {
      float* to = panel + c * R + j * kSumColumns;
      const int64_t n = columns <= c ? 0 : min(columns - c, kSumColumns);
      std::memcpy(to, e.A + j * e.columns + column + c, n * sizeof(float));
      std::memset(to + n, 0, (kSumColumns - n) * sizeof(float));
    }
}

// The products of one task, every entry by itself from the first rank to the last.
void form(const Entries& e, const Tile& t, int64_t task, const float* panel) {
  const int64_t R = e.offsets[e.tasks], begin = e.offsets[task], r = e.offsets[task + 1] - begin;
  for (int64_t i0 = 0; i0 < t.rows; i0 += kSumRows) {
    const float* b[kSumRows];
    for (int64_t i = 0; i < kSumRows; ++i) b[i] = e.B + (t.row + min(i0 + i, t.rows - 1)) * R + begin;
    for (int64_t c = 0; c < t.padded; c += kSumColumns) {
      const float* a = panel + c * R + begin * kSumColumns;
      V sum[kSumRows][2] = {};
      for (int64_t j = 0; j < r; ++j, a += kSumColumns) {
        const V left = load(a), right = load(a + kLane);
        for (int64_t i = 0; i < kSumRows; ++i) {
          const V x = splat(b[i][j]);
          sum[i][0] = fma(x, left, sum[i][0]);
          sum[i][1] = fma(x, right, sum[i][1]);
        }
      }
      for (int64_t i = 0; i < kSumRows; ++i) {
        store(t.of(task, i0 + i) + c, sum[i][0]);
        store(t.of(task, i0 + i) + c + kLane, sum[i][1]);
      }
    }
  }
  // A factor that is not finite, times the zeros of the padding, is no zero.
  for (int64_t i = 0; i < t.rows; ++i)
    std::memset(t.of(task, i) + t.columns, 0, (t.padded - t.columns) * sizeof(float));
}

void trim(const Entries& e, const Tile& t, int64_t task) {
  const float least = e.least[task];
  for (int64_t i = 0; i < t.rows; ++i) {
    float* v = t.of(task, i);
    const int64_t first = (e.first_row + t.row + i) * e.columns + t.column, last = e.last[task];
    if (last >= first + t.columns - 1) {
      for (int64_t c = 0; c < t.padded; c += kLane) store(v + c, keep(magnitude(load(v + c)) >= least, load(v + c)));
    } else if (last < first) {
      for (int64_t c = 0; c < t.padded; c += kLane) store(v + c, keep(magnitude(load(v + c)) > least, load(v + c)));
    } else {
      for (int64_t c = 0; c < t.columns; ++c) {
        const float m = __builtin_fabsf(v[c]);
        if (!(m > least || (m == least && first + c <= last))) v[c] = 0;
      }
    }
  }
}

void drop(const Entries& e, const Tile& t, int64_t task) {
  const uint32_t threshold = uint32_t(e.threshold);
  const V multiplier = splat(e.multipliers[task]);
  for (int64_t i = 0; i < t.rows; ++i) {
    float* v = t.of(task, i);
    draws(uint64_t(e.keys[task]), uint64_t(e.first_row + t.row + i), t.column, t.padded, [&](int64_t c, Words words) {
      store(v + c, load(v + c) * keep(reinterpret_cast<Flags>(words >= threshold), multiplier));
    });
  }
}

// Bits of a magnitude.
inline uint32_t pattern(const float* v) {
  uint32_t bits;
  std::memcpy(&bits, v, 4);
  return bits & 0x7fffffffu;
}

void count_upper(const Tile& t, int64_t task, uint32_t* table) {
  uint32_t* bins = table + task * (kUpperBins + kZeroBins);
  static_assert(kZeroBins == 64, "as many as there are columns of padding");
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t c = 0; c < t.columns; c += 64) {
      alignas(64) uint32_t bin[64];
      for (int64_t k = 0; k < 64; k += kLane) {
        const Words bits = reinterpret_cast<Words>(magnitude(load(t.of(task, i) + c + k)));
        Words zero;
        for (int64_t lane = 0; lane < kLane; ++lane) zero[lane] = uint32_t(kUpperBins + k + lane);
        const Words is_zero = reinterpret_cast<Words>(bits == 0);
        const Words chosen = (is_zero & zero) | (~is_zero & (bits >> 16));
        std::memcpy(bin + k, &chosen, sizeof chosen);
      }
      const int64_t n = min(64, t.columns - c);
      for (int64_t k = 0; k < n; ++k) ++bins[bin[k]];
    }
}

void count_lower(const Entries& e, const Tile& t, int64_t task, uint32_t* table) {
  uint32_t* bins = table + task * kLowerBins;
  const uint32_t sought = uint32_t(e.sought[task]);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* v = t.of(task, i);
    for (int64_t c = 0; c < t.columns; c += 16) {
      const int64_t n = min(16, t.columns - c);
      uint32_t any = 0;
      for (int64_t k = 0; k < 16; ++k) any |= (pattern(v + c + k) >> 16) == sought;
      if (!any) continue;
      for (int64_t k = 0; k < n; ++k)
        if (pattern(v + c + k) >> 16 == sought) ++bins[pattern(v + c + k) & 0xffff];
    }
  }
}

void count_equals(const Entries& e, const Tile& t, int64_t task) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* v = t.of(task, i);
    int32_t count = 0;
    for (int64_t c = 0; c < t.columns; ++c) count += __builtin_fabsf(v[c]) == e.least[task];
    e.equal[task * e.rows + t.row + i] += count;
  }
}

double sum_magnitudes(const Tile& t, int64_t task) {
  Sum sum;
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t c = 0; c < t.padded; c += kLane) sum.add(magnitude(load(t.of(task, i) + c)));
  return sum.total();
}

// f(row of the tile, column, whole vector or less) -> what is written there, if anything is.
template <class F>
inline void each(const Entries& e, const Tile& t, F f) {
  for (int64_t i = 0; i < t.rows; ++i) {
    float* out = e.out == nullptr ? nullptr : e.out + (t.row + i) * e.columns + t.column;
    for (int64_t c = 0; c < t.padded; c += kLane) {
      const V x = f(i, c);
      if (out != nullptr && c < t.columns) store_n(out + c, x, min(kLane, t.columns - c));
    }
  }
}

void add(const Entries& e, const Tile& t) {
  each(e, t, [&](int64_t i, int64_t c) {
    V sum = load(t.of(0, i) + c);
    for (int64_t k = 1; k < e.tasks; ++k) sum += load(t.of(k, i) + c);
    return sum;
  });
}

template <Vote vote>
inline V vote_of(V value, V weight) {
  if constexpr (vote == Vote::weighted) return weight * value;
  if constexpr (vote == Vote::count) return ones(value > 0) - ones(value < 0);
  return value;
}

template <Vote vote>
void elect(const Entries& e, const Tile& t, double* sums) {
  Flags cancelled = {}, balance = {};
  each(e, t, [&](int64_t i, int64_t c) {
    V sum = {};
    Flags voted = {};
    for (int64_t k = 0; k < e.tasks; ++k) {
      const V mine = vote_of<vote>(load(t.of(k, i) + c), splat(e.weights[k]));
      sum = k == 0 ? mine : sum + mine;
      voted |= mine != 0;
    }
    const Flags above = sum > 0, below = sum < 0, tied = ~(above | below);
    cancelled |= tied & voted;
    balance += below - above;
    const Flags positive = e.tie > 0 ? above | tied : above, negative = e.tie > 0 ? below : below | tied;
    V total = {}, divisor = {};
    for (int64_t k = 0; k < e.tasks; ++k) {
      const V value = load(t.of(k, i) + c), weight = splat(e.weights[k]), mine = vote_of<vote>(value, weight);
      const V agrees = ones((positive & (mine > 0)) | (negative & (mine < 0)));
      total = fma(value * agrees, weight, total);
      divisor += e.divide == Divide::by_weight ? agrees * weight : agrees;
    }
    if (e.divide == Divide::not_at_all) return total;
    return total / (divisor + ones(divisor == 0));
  });
  for (int64_t i = 0; i < kLane; ++i) sums[0] += cancelled[i] != 0, sums[1] += balance[i];
}

// Sums of [own, masked] magnitudes for each task.
void unify(const Entries& e, const Tile& t, double* sums) {
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t c = 0; c < t.padded; c += kLane) {
      V sum = load(t.of(0, i) + c), largest = {};
      for (int64_t k = 1; k < e.tasks; ++k) sum += load(t.of(k, i) + c);
      const V sign = ones(sum > 0) - ones(~(sum > 0));
      for (int64_t k = 0; k < e.tasks; ++k) {
        const V x = load(t.of(k, i) + c) * sign;
        largest = either((x > largest) | (x != x), x, largest);
      }
      store(t.of(e.tasks, i) + c, largest * sign);
    }
  for (int64_t k = 0; k < e.tasks; ++k) {
    Sum own, masked;
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t c = 0; c < t.padded; c += kLane) {
        const V value = load(t.of(k, i) + c);
        own.add(magnitude(value));
        masked.add(magnitude(where_alike(load(t.of(e.tasks, i) + c), value)));
      }
    sums[2 * k] += own.total();
    sums[2 * k + 1] += masked.total();
  }
  each(e, t, [&](int64_t i, int64_t c) { return load(t.of(e.tasks, i) + c); });
}

void mask(const Entries& e, const Tile& t) {
  each(e, t, [&](int64_t i, int64_t c) {
    if (c >= t.columns) return V{};
    const float* unified = e.unified + (t.row + i) * e.columns + t.column + c;
    return splat(e.scale) * where_alike(load_n(unified, min(kLane, t.columns - c)), load(t.of(0, i) + c));
  });
}

void make(const Entries& e, const Tile& t, double* sums) {
  switch (e.work) {
    case Work::add:
      return add(e, t);
    case Work::elect:
      switch (e.vote) {
        case Vote::sum:
          return elect<Vote::sum>(e, t, sums);
        case Vote::weighted:
          return elect<Vote::weighted>(e, t, sums);
        case Vote::count:
          return elect<Vote::count>(e, t, sums);
      }
      return;
    case Work::unify:
      return unify(e, t, sums);
    case Work::mask:
      return mask(e, t);
    default:
      return;
  }
}

void run(const Entries& e, int64_t strip, void* scratch, uint32_t* table, double* sums) {
  float* panel = static_cast<float*>(scratch);
  const int64_t end = min(e.rows, (strip + 1) * kStripRows);
  const bool trims = e.least != nullptr && e.work != Work::equals;
  for (int64_t column = 0; column < e.columns; column += kColumns) {
    Tile t{0, column, 0, min(kColumns, e.columns - column), 0, panel + panel_floats(e)};
    t.padded = round_up(t.columns, 64);
    pack(e, column, t.columns, panel);
    for (t.row = strip * kStripRows; t.row < end; t.row += kRows) {
      t.rows = min(kRows, end - t.row);
      for (int64_t k = 0; k < e.tasks; ++k) {
        if (e.work == Work::lower_counts && e.sought[k] < 0) continue;
        form(e, t, k, panel);
        if (trims && e.trim_first) trim(e, t, k);
        if (e.work == Work::sums) sums[2 * k] += sum_magnitudes(t, k);
        if (e.keys != nullptr) drop(e, t, k);
        if (trims && !e.trim_first) trim(e, t, k);
        if (e.work == Work::sums) sums[2 * k + 1] += sum_magnitudes(t, k);
        if (e.work == Work::upper_counts) count_upper(t, k, table);
        if (e.work == Work::lower_counts) count_lower(e, t, k, table);
        if (e.work == Work::equals) count_equals(e, t, k);
      }
      make(e, t, sums);
    }
  }
}

void draw(int64_t key, int64_t threshold, int64_t rows, int64_t columns, bool* kept) {
  for (int64_t row = 0; row < rows; ++row)
    draws(uint64_t(key), uint64_t(row), 0, columns, [&](int64_t c, Words words) {
      for (int64_t i = 0; i < kLane && c + i < columns; ++i)
        kept[row * columns + c + i] = words[i] >= uint32_t(threshold);
    });
}

}  // namespace

extern const EntriesKernels kEntries;
const EntriesKernels kEntries = {scratch_bytes, run, draw};

}  // namespace NSC_NAMESPACE
}  // namespace nsc
