// Single entries of the low-rank updates B_k A_k of one layer by K tasks, as methods see them that trim, drop or elect
// entries (nsc_kernels/entries.py). The updates are formed a tile at a time and never lie in memory as a whole. No torch
// here: the binding fills this in.
#pragma once

#include <cstdint>

namespace nsc {

enum class Work : int32_t {
  upper_counts,  // histogram of the upper 16 bits of the magnitudes
  lower_counts,  // histogram of the lower 16 bits of those whose upper 16 bits are `sought`
  equals,        // how many entries of a row have the magnitude `least`
  sums,          // of the magnitudes before and after dropping
  add,           // out = sum_k
  elect,         // out = what TIES makes of the tasks
  unify,         // out = what EMR makes of them; sums of its own and of the masked magnitudes of each
  mask,          // out = scale * unified where the one task has its sign
};

enum class Vote : int32_t { sum, weighted, count };
enum class Divide : int32_t { by_count, not_at_all, by_weight };

// Of bins beyond those of the upper halves: entries that are exactly zero. They are the rule after dropping, and are
// spread over the bins that follow, as increments of one and the same bin wait for each other.
constexpr int64_t kUpperBins = 1 << 15, kZeroBins = 64, kLowerBins = 1 << 16;

// Sums are formed per strip of so many rows and added in order: the same bits at any number of threads.
constexpr int64_t kStripRows = 64;

struct Entries {
  int64_t rows, columns, tasks;
  const int64_t* offsets;  // [tasks + 1], task k owns rows offsets[k] .. offsets[k + 1] of A
  const float* A;          // [R, columns]
  const float* B;          // [rows, R]
  int64_t first_row;       // number of the first row, where these are some of a layer's rows

  // Dropping: an entry is kept, times multiplier, where its random number reaches the threshold. Null: none.
  const int64_t* keys;
  int64_t threshold;
  const float* multipliers;

  // Trimming: entries stay whose magnitude is above least, or equal to it up to the entry number `last`. Null: none.
  const float* least;
  // The magnitude that is counted, not trimmed by, for Work::equals.
  const int64_t* last;
  int32_t trim_first;  // before dropping and not after it

  Work work;
  Vote vote;
  Divide divide;
  float tie;                // sign of an entry whose votes add up to zero
  const float* weights;     // elect: [tasks]
  const int32_t* sought;    // lower_counts: [tasks], negative where nothing is sought
  const float* unified;     // mask: [rows, columns]
  float scale;              // mask
  int64_t* counts;          // upper_counts: [tasks, kUpperBins + 1]; lower_counts: [tasks, kLowerBins]
  int64_t* equal;           // equals: [tasks, rows], zeros at first
  double* sums;             // sums, unify: [tasks, 2]; elect: cancelled entries, and positive less negative ones
  float* out;               // [rows, columns]; null where only the sums are wanted
};

// Kernels of one instruction set.
struct EntriesKernels {
  int64_t (*scratch_bytes)(const Entries&);
  // One strip. `table` is the thread's histogram, [tasks, bins]; `sums` the strip's own. Scratch is aligned to 64 bytes.
  void (*run)(const Entries&, int64_t strip, void* scratch, uint32_t* table, double* sums);
  // For every entry, whether its random number reaches the threshold.
  void (*draw)(int64_t key, int64_t threshold, int64_t rows, int64_t columns, bool* kept);
};

}  // namespace nsc
