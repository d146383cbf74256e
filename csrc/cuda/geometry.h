// Which tile, slice, row and byte belongs to whom. Plain C++: the kernel, its launcher, the CPU mirror and the tests all
// take their indices from here.
//
// One cluster of n thread blocks serves one tile of `Tokens` tokens:
//
//   shrink   block p multiplies columns slice(d_in, p, n) of x and w_in: a partial [Tokens, Ranks], float32
//   reduce   block p adds the partials of its rows(Tokens, p, n) over all blocks, in the order of the blocks
//   mid      on those rows, whole: what a token has per adapter never crosses blocks
//   gather   block p writes its rows of c to every block
//   expand   block p computes columns slice(d_out, p, n) of the output
//
// Every operand in shared memory is a tile of 64 columns: rows of 128 bytes whose eight 16-byte chunks are exchanged by
// tile_offset(), so that eight rows of one column of chunks lie in eight different groups of banks.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NSC_HD __host__ __device__ __forceinline__
#else
#define NSC_HD inline
#endif

namespace nsc::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 64;         // columns of a tile
constexpr int kRowBytes = 128;       // of a row of a tile
constexpr int kChunk = 8;            // elements in 16 bytes; d is a multiple of it
constexpr int kWarpRows = 32;        // tokens of one warp's part of a product
constexpr int kMostStages = 4;
constexpr int kMostRank = 512;
constexpr int kMostAdapters = 64;
constexpr int kMostCluster = 16;     // beyond 8 the device has to allow it
constexpr int kSharedLimit = 227 << 10;      // of one block on compute capability 9.0
constexpr int kSharedOfTwo = (228 << 10) / 2 - (1 << 10);  // of one of two blocks on a processor; 1 KiB each is reserved

struct Range {
  int begin, end;
};

NSC_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps of 64 columns through d.
NSC_HD constexpr int steps(int64_t d) { return int(ceil_div(d, kColumns)); }

// Part p of n of [0, count): consecutive, disjoint, complete, and no part larger than another by more than one.
NSC_HD constexpr Range part(int count, int p, int n) {
  return {int(int64_t(count) * p / n), int(int64_t(count) * (p + 1) / n)};
}

// Block p's steps of d columns, and its rows of a tile.
NSC_HD constexpr Range slice(int64_t d, int p, int n) { return part(steps(d), p, n); }
NSC_HD constexpr Range rows(int tokens, int p, int n) { return part(tokens, p, n); }

// Byte of chunk `chunk` (0..7) of row `row` in a tile.
NSC_HD constexpr int tile_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// The adapter that owns column j: the number of adapters that end at or before it. K for padding.
template <class Offset>
NSC_HD int owner(const Offset* offsets, int K, int j) {
  int k = 0;
  for (int i = 1; i <= K; ++i) k += offsets[i] <= j;
  return k;
}

// Rows and chunks as the lanes of a warp address them for ldmatrix; matrix i is addressed by lanes 8 i .. 8 i + 7.
// x and c, 16 rows x 16 inner columns: (rows 0-7 | 8-15) x (inner 0-7), then the same x (inner 8-15).
NSC_HD constexpr int left_row(int lane) { return lane & 15; }
NSC_HD constexpr int left_chunk(int lane) { return lane >> 4; }
// w_in, 16 rows (columns of the product) x 16 inner columns: rows 0-7 x (inner 0-7 | 8-15), then rows 8-15.
NSC_HD constexpr int shrink_row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
NSC_HD constexpr int shrink_chunk(int lane) { return (lane >> 3) & 1; }
// w_out, 16 inner rows x 16 columns of the product, transposed on the way: (inner 0-7 | 8-15) x columns 0-7, then 8-15.
NSC_HD constexpr int expand_row(int lane) { return lane & 15; }
NSC_HD constexpr int expand_chunk(int lane) { return lane >> 4; }
// An accumulator of 16 x 8: elements 0, 1 in this row, 2, 3 eight rows below; columns this one and the next.
NSC_HD constexpr int acc_row(int lane) { return lane >> 2; }
NSC_HD constexpr int acc_column(int lane) { return (lane & 3) << 1; }

// Rows of a box of weights as TMA loads it: 256 at most.
NSC_HD constexpr int weight_box(int ranks) { return ranks <= 256 ? ranks : ranks / 2; }

// Everything that is fixed at compile time for `Ranks` padded columns of the rank axis and `Tokens` tokens per tile.
// Warpgroup: products by wgmma and copies by TMA (warpgroup.inl), not mma.sync and cp.async (kernel.inl).
template <int Ranks_, int Tokens_, bool Backward_, bool Warpgroup_ = false>
struct Plan {
  static constexpr int Ranks = Ranks_, Tokens = Tokens_;
  static constexpr bool Backward = Backward_, Warpgroup = Warpgroup_;

  // Warps over the product: 32 tokens each, and the columns shared among the rest. A warpgroup has four warps on 64
  // tokens; two share the columns where the tile has no more tokens.
  static constexpr int warps_m = Tokens / (Warpgroup ? 16 : kWarpRows);
  static constexpr int warps_n = kWarps / warps_m;
  static constexpr int shrink_tiles = Ranks / warps_n / 8;     // accumulators of 8 columns, per 16 tokens
  static constexpr int expand_tiles = kColumns / warps_n / 8;
  static constexpr bool c_in_registers = Ranks <= 96;

  // Bytes of a stage: x and w_in; or w_out, the output on top of base, and z in the backward.
  static constexpr int shrink_slot = (Tokens + Ranks) * kRowBytes;
  static constexpr int expand_slot = (Ranks + Tokens * (Backward ? 2 : 1)) * kRowBytes;

  // The exchange, in the same place as the stages: between the two cluster barriers no stage is in use.
  static constexpr int partial_stride = Ranks + 8;  // floats: four rows of eight bytes per lane in different banks
  static constexpr int norms_at = Tokens * partial_stride * 4;             // float [warps_n, Tokens]
  static constexpr int warp_sums_at = norms_at + warps_n * Tokens * 4;     // float [kWarps, kMostAdapters]
  static constexpr int block_sums_at = warp_sums_at + kWarps * kMostAdapters * 4;  // float [kMostCluster, kMostAdapters]
  static constexpr int exchange = block_sums_at + kMostCluster * kMostAdapters * 4;

  // c has rows of its own stride: 16 bytes more than a multiple of 64, so that eight rows differ in their banks.
  static constexpr int c_stride = Ranks * 2 + 16;
  static constexpr int c_bytes = Tokens * c_stride;
  static constexpr int owner_bytes = Ranks;
  static constexpr int barrier_bytes = Warpgroup ? 3 * kMostStages * 8 : 0;  // full and empty of shrink, full of expand
  static constexpr int fixed = c_bytes + owner_bytes + 16 + barrier_bytes;

  // Two blocks per processor where they fit, in memory and in registers: one loads while the other is in its middle.
  static constexpr int least(int slot) { return 2 * slot > exchange ? 2 * slot : exchange; }
  static constexpr int two_slots = least(shrink_slot) > least(expand_slot) ? least(shrink_slot) : least(expand_slot);
  static constexpr int resident = Ranks <= (Tokens == 64 ? 192 : 64) && two_slots + fixed <= kSharedOfTwo ? 2 : 1;
  static constexpr int budget = (resident == 2 ? kSharedOfTwo : kSharedLimit) - fixed;
  static constexpr int stages(int slot) {
    return budget / slot < 2 ? 2 : budget / slot > kMostStages ? kMostStages : budget / slot;
  }
  static constexpr int shrink_stages = stages(shrink_slot);
  static constexpr int expand_stages = stages(expand_slot);

  static constexpr int most(int a, int b) { return a > b ? a : b; }
  static constexpr int ring = most(most(shrink_stages * shrink_slot, expand_stages * expand_slot), exchange);
  static constexpr int c_at = ring;
  static constexpr int owner_at = c_at + c_bytes;
  static constexpr int flag_at = owner_at + owner_bytes;
  static constexpr int barriers_at = flag_at + 16;
  static constexpr int shared = ring + fixed;

  // Warpgroups: columns of one wgmma of the shrink; stages of the expand that each of the two has to itself.
  static constexpr int wgmma_columns = Ranks / warps_n % 64 == 0 ? 64 : 32;
  static constexpr int own_stages = expand_stages / 2;
  static constexpr int weight_box = nsc::cuda::weight_box(Ranks);

  static_assert(Tokens % kWarpRows == 0 && kWarps % warps_m == 0, "warps must tile the tokens");
  static_assert(Ranks % (8 * warps_n) == 0 && Ranks % 16 == 0, "warps must tile the ranks");
  static_assert(Warpgroup || kColumns % (16 * warps_n) == 0, "warps must tile the output in pairs of accumulators");
  static_assert(!Warpgroup || Ranks / warps_n % wgmma_columns == 0, "wgmma must tile the ranks");
  static_assert(shared <= kSharedLimit, "more shared memory than a block can have");
};

// The compiled variants: padded ranks, tokens per tile. Ascending in ranks; 64 tokens for all of them.
struct Variant {
  int ranks, tokens;
};
#define NSC_VARIANTS(X)                                                                              \
  X(32, 64) X(64, 64) X(96, 64) X(128, 64) X(192, 64) X(256, 64) X(320, 64) X(384, 64) X(512, 64)   \
  X(32, 128) X(64, 128) X(96, 128) X(128, 128) X(192, 128) X(256, 128)
#define NSC_VARIANT_ENTRY(ranks, tokens) {ranks, tokens},
constexpr Variant kVariants[] = {NSC_VARIANTS(NSC_VARIANT_ENTRY)};
// Those of warpgroup.inl, numbered from kVariantCount on.
#define NSC_WARPGROUP_VARIANTS(X)                                              \
  X(64, 64) X(128, 64) X(192, 64) X(256, 64) X(320, 64) X(384, 64) X(512, 64) \
  X(32, 128) X(64, 128) X(96, 128) X(128, 128) X(192, 128) X(256, 128)
constexpr Variant kWarpgroupVariants[] = {NSC_WARPGROUP_VARIANTS(NSC_VARIANT_ENTRY)};
#undef NSC_VARIANT_ENTRY
constexpr int kVariantCount = int(sizeof(kVariants) / sizeof(Variant));
constexpr int kWarpgroupCount = int(sizeof(kWarpgroupVariants) / sizeof(Variant));

// The least padding with this many tokens per tile; -1 if R is too large for it.
constexpr int find_variant(int R, int tokens) {
  int found = -1, i = 0;
  for (const Variant& v : kVariants) {
    if (v.tokens == tokens && v.ranks >= R && (found < 0 || v.ranks < kVariants[found].ranks)) found = i;
    ++i;
  }
  return found;
}

// 128 tokens per tile halve what is read of the weights from L2, which bounds large T; they need a tile for three
// quarters of the processors, and a padding no worse than that of 64 tokens.
constexpr int choose_variant(int64_t T, int R, int processors) {
  const int narrow = find_variant(R, 64), wide = find_variant(R, 128);
  if (narrow < 0 || wide < 0 || kVariants[wide].ranks > kVariants[narrow].ranks) return narrow;
  return 4 * ceil_div(T, 128) >= 3 * int64_t(processors) ? wide : narrow;
}

// What to run in place of `variant`, which choose_variant() gave, where there is wgmma. On an H100 it takes 4 to 18 % less
// time than mma.sync on tiles of 128 tokens and with more than 96 padded ranks, and up to 8 % more on the others.
constexpr int with_warpgroups(int variant, int R) {
  if (variant < 0 || (kVariants[variant].tokens == 64 && kVariants[variant].ranks <= 96)) return variant;
  int found = -1, i = 0;
  for (const Variant& v : kWarpgroupVariants) {
    const bool serves = v.tokens == kVariants[variant].tokens && v.ranks >= R;
    if (serves && (found < 0 || v.ranks < kWarpgroupVariants[found].ranks)) found = i;
    ++i;
  }
  return found < 0 ? variant : kVariantCount + found;
}

// Blocks per cluster, given how many clusters of 1, 2, 4, 8 and 16 blocks the device runs at a time (0: cannot).
// The estimate counts steps of 64 columns: rounds of clusters, times the steps of one block, times a start and an
// exchange of `kExchangeSteps`, which only measurement can set. Of equal estimates the smaller cluster.
constexpr int kClusterSizes = 5;
constexpr int kExchangeSteps = 4;
constexpr int choose_cluster(int64_t tiles, int64_t d_in, int64_t d_out, const int (&active)[kClusterSizes]) {
  int best = 1;
  int64_t least = -1;
  for (int i = 0; i < kClusterSizes; ++i) {
    const int n = 1 << i;
    if (active[i] <= 0 || (n > 1 && n > steps(d_in) && n > steps(d_out))) continue;
    const int64_t cost = ceil_div(tiles, active[i]) *
                         (ceil_div(steps(d_in), n) + ceil_div(steps(d_out), n) + (n > 1 ? kExchangeSteps : 0));
    if (least < 0 || cost < least) least = cost, best = n;
  }
  return best;
}

}  // namespace nsc::cuda
