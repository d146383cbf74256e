// The kernel: shrink -> exchange -> expand of one tile of tokens by one cluster, for both directions.
//
// Written against a dozen primitives (copies, matrix instructions, barriers, remote shared memory). hardware.cuh gives
// them on the GPU; tests/cuda/emulator.h gives them on a CPU, where the same source is run thread by thread.
// Indices are derived in geometry.h.
#include "problem.h"

namespace nsc::cuda {

// One thread's share of copying tiles: chunk `chunk` of rows `row`, row + 32, ... A multiple of 8 rows apart, so the
// place within the swizzled row is the same for all of them.
struct Copier {
  int row = thread_index() / 8;
  int chunk = thread_index() % 8;

  NSC_DEVICE int at(int i) const { return tile_offset(row, chunk) + i * (kThreads / 8) * kRowBytes; }

  // Rows first .. first + Rows of source, 64 columns from `column`; zero outside of [0, count) x [0, columns).
  template <int Rows>
  NSC_DEVICE void load(unsigned char* tile, const half_bits* source, int64_t stride, int64_t first, int64_t count,
                       int64_t column, int64_t columns) const {
    static_assert(Rows % (kThreads / 8) == 0 || Rows < kThreads / 8, "threads must tile the rows");
    const int64_t c = column + chunk * kChunk;
    const half_bits* from = source + (first + row) * stride + c;
    const bool inside = c < columns;
#pragma unroll
    for (int i = 0; i < Rows / (kThreads / 8); ++i) {
      const bool valid = inside && first + row + i * (kThreads / 8) < count;
      copy_async(tile + at(i), valid ? from + int64_t(i) * (kThreads / 8) * stride : source, valid);
    }
  }

  template <int Rows>
  NSC_DEVICE void store(half_bits* to, const unsigned char* tile, int64_t stride, int64_t first, int64_t count,
                        int64_t column, int64_t columns) const {
    const int64_t c = column + chunk * kChunk;
    half_bits* start = to + (first + row) * stride + c;
#pragma unroll
    for (int i = 0; i < Rows / (kThreads / 8); ++i)
      if (c < columns && first + row + i * (kThreads / 8) < count)
        store16(start + int64_t(i) * (kThreads / 8) * stride, tile + at(i));
  }
};

// Accumulators of one warp: 2 x 16 tokens by N x 8 columns.
template <int N>
struct Accumulators {
  float of[2][N][4];

  NSC_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) of[m][n][i] = 0.0f;
  }
};

// x[tile, slice] . w_in[:, slice]^T into acc, and the sums of x^2 of this thread's rows into squares.
template <class E, class P>
NSC_DEVICE void shrink(const Problem& p, unsigned char* shared, int64_t first, Range slice,
                       Accumulators<P::shrink_tiles>& acc, float (&squares)[4]) {
  constexpr int S = P::shrink_stages;
  const Copier copier;
  const int lane = lane_index(), warp_m = warp_index() % P::warps_m, warp_n = warp_index() / P::warps_m;
  const int count = slice.end - slice.begin;
  const bool norms = !P::Backward && p.sqnorm != nullptr;

  auto load = [&](int step) {
    if (step < count) {
      unsigned char* slot = shared + (step % S) * P::shrink_slot;
      const int64_t column = int64_t(slice.begin + step) * kColumns;
      copier.load<P::Tokens>(slot, p.x, p.x_stride, first, p.T, column, p.d_in);
      copier.load<P::Ranks>(slot + P::Tokens * kRowBytes, p.w_in, p.d_in, 0, p.R, column, p.d_in);
    }
    commit_copies();
  };

#pragma unroll
  for (int step = 0; step < S - 1; ++step) load(step);
  for (int step = 0; step < count; ++step) {
    wait_copies<S - 2>();
    sync_block();
    load(step + S - 1);
    const unsigned char* x_tile = shared + (step % S) * P::shrink_slot;
    const unsigned char* w_tile = x_tile + P::Tokens * kRowBytes;
    float of_step[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // then added as one: a chain of all columns would lose a digit
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices4(a[m], x_tile + tile_offset(warp_m * kWarpRows + m * 16 + left_row(lane), 2 * k + left_chunk(lane)));
      // The warps beside each other hold the same rows of x: each squares its share of the inner columns.
      if (norms && k % P::warps_n == warp_n) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) of_step[2 * m + i % 2] += square_sum<E>(a[m][i]);
      }
#pragma unroll
      for (int n = 0; n < P::shrink_tiles / 2 * 2; n += 2) {
        uint32_t b[4];
        const int row = warp_n * P::shrink_tiles * 8 + n * 8 + shrink_row(lane);
        load_matrices4(b, w_tile + tile_offset(row, 2 * k + shrink_chunk(lane)));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<E>(acc.of[m][n], a[m], b[0], b[1]);
          multiply_add<E>(acc.of[m][n + 1], a[m], b[2], b[3]);
        }
      }
      if constexpr (P::shrink_tiles % 2 == 1) {
        constexpr int n = P::shrink_tiles - 1;
        uint32_t b[2];
        const int row = warp_n * P::shrink_tiles * 8 + n * 8 + (lane & 7);  // lanes 16 .. 31 are not looked at
        load_matrices2(b, w_tile + tile_offset(row, 2 * k + shrink_chunk(lane)));
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add<E>(acc.of[m][n], a[m], b[0], b[1]);
      }
    }
    for (int i = 0; i < 4; ++i) squares[i] += of_step[i];
  }
  wait_copies<0>();
  sync_block();
}

// What the middle adds dlam of its rows to.
template <class P>
NSC_DEVICE void clear_sums(const Problem& p, unsigned char* shared) {
  if (!P::Backward || p.dlam == nullptr) return;
  float* sums = reinterpret_cast<float*>(shared + P::warp_sums_at);
  for (int i = thread_index(); i < kWarps * kMostAdapters; i += kThreads) sums[i] = 0.0f;
}

template <class P>
NSC_DEVICE void store_owners(const Problem& p, unsigned char* shared) {
  for (int j = thread_index(); j < P::Ranks; j += kThreads)
    shared[P::owner_at + j] = static_cast<unsigned char>(owner(p.offsets, p.K, j));
}

// This block's partial of u, and of the norms, to where the cluster can read it.
template <class P>
NSC_DEVICE void publish(const Problem& p, unsigned char* shared, const Accumulators<P::shrink_tiles>& acc,
                        float (&squares)[4]) {
  const int lane = lane_index(), warp_m = warp_index() % P::warps_m, warp_n = warp_index() / P::warps_m;
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < P::shrink_tiles; ++n) {
      float* at = partial + (warp_m * kWarpRows + m * 16 + acc_row(lane)) * P::partial_stride +
                  (warp_n * P::shrink_tiles + n) * 8 + acc_column(lane);
      store_pair(at, acc.of[m][n][0], acc.of[m][n][1]);
      store_pair(at + 8 * P::partial_stride, acc.of[m][n][2], acc.of[m][n][3]);
    }
  if (!P::Backward && p.sqnorm != nullptr) {
    float* norms = reinterpret_cast<float*>(shared + P::norms_at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = squares[i];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if ((lane & 3) == 0) norms[warp_n * P::Tokens + warp_m * kWarpRows + i * 8 + acc_row(lane)] = sum;
    }
  }
  clear_sums<P>(p, shared);
}

// sum over each adapter's columns of `products` [R], in an order fixed by the offsets: eight lanes per adapter, four
// adapters at a time. `found(k, sum)` is called by one lane.
template <class Found>
NSC_DEVICE void per_adapter(const Problem& p, const float* products, Found found) {
  const int group = lane_index() / 8, lane = lane_index() % 8;
  for (int k0 = 0; k0 < p.K; k0 += 4) {
    const int k = k0 + group;
    float sum = 0.0f;
    if (k < p.K)
      for (int j = p.offsets[k] + lane; j < p.offsets[k + 1]; j += 8) sum += products[j];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    sum += shuffle_xor(sum, 4);
    if (k < p.K && lane == 0) found(k, sum);
  }
}

// Reduce and middle on this block's rows, one warp per row; c to every block of the cluster.
template <class E, class P>
NSC_DEVICE void middle(const Problem& p, unsigned char* shared, int64_t first) {
  const int lane = lane_index(), warp = warp_index(), blocks = cluster_size();
  const Range own = rows(P::Tokens, cluster_rank(), blocks);
  float* partial = reinterpret_cast<float*>(shared);
  const float* norms = reinterpret_cast<const float*>(shared + P::norms_at);
  float* warp_sums = reinterpret_cast<float*>(shared + P::warp_sums_at) + warp * kMostAdapters;
  const unsigned char* owners = shared + P::owner_at;
  const bool products = P::Backward ? p.dlam != nullptr : p.quad != nullptr;

  for (int row = own.begin + warp; row < own.end; row += kWarps) {
    const int64_t t = first + row;
    if (t >= p.T) break;
    const float* lam = p.lam + (p.lam_per_row ? t * p.K : 0);
    float* own_row = partial + row * P::partial_stride;
#pragma unroll
    for (int j0 = 0; j0 < P::Ranks; j0 += 128) {
      const int j = j0 + lane * 4;
      if (j >= P::Ranks) break;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int b = 0; b < blocks; ++b) {
        float there[4];
        remote_load4(there, own_row + j, b);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += there[i];
      }
      float c[4], product[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[i] = product[i] = 0.0f;
        if (j + i < p.R) {
          const int k = owners[j + i];
          c[i] = lam[k] * sum[i];
          if (P::Backward) {
            const float saved = to_float<E>(p.u[t * p.R + j + i]);
            product[i] = saved * sum[i];
            if (p.dquad != nullptr) c[i] += 2.0f * p.dquad[t * p.K + k] * saved;
          } else {
            product[i] = sum[i] * sum[i];
            if (p.u_out != nullptr) p.u_out[t * p.R + j + i] = to_half<E>(sum[i]);
          }
        }
      }
      if (p.out != nullptr) {
        const uint32_t low = pack<E>(c[0], c[1]), high = pack<E>(c[2], c[3]);
        unsigned char* at = shared + P::c_at + row * P::c_stride + j * 2;
        for (int b = 0; b < blocks; ++b) remote_store8(at, low, high, b);
      }
      // Nobody else reads this block's partial of its own rows, and this lane has.
      if (products) store4(own_row + j, product);
    }
    sync_warp();
    if (products) {
      per_adapter(p, own_row, [&](int k, float sum) {
        if (!P::Backward)
          p.quad[t * p.K + k] = sum;
        else if (p.lam_per_row)
          p.dlam[t * p.K + k] = sum;
        else
          warp_sums[k] += sum;
      });
    }
    if (!P::Backward && p.sqnorm != nullptr) {
      float sum = 0.0f;
      for (int i = lane; i < blocks * P::warps_n; i += 32)
        sum += remote_load(norms + (i % P::warps_n) * P::Tokens + row, i / P::warps_n);
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0) p.sqnorm[t] = sum;
    }
  }
}

// dlam [K] in three steps, each in a fixed order: rows of a block (before the second barrier: to block 0),
template <class P>
NSC_DEVICE void send_dlam(const Problem& p, unsigned char* shared) {
  sync_block();
  const float* warp_sums = reinterpret_cast<const float*>(shared + P::warp_sums_at);
  float* block_sums = reinterpret_cast<float*>(shared + P::block_sums_at) + cluster_rank() * kMostAdapters;
  const int k = thread_index();
  if (k >= p.K) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * kMostAdapters + k];
  remote_store(block_sums + k, sum, 0);
}

// blocks of a cluster (after it, block 0: to memory; true for the last cluster to do so),
template <class P>
NSC_DEVICE bool store_dlam(const Problem& p, unsigned char* shared, int64_t tile, int64_t tiles) {
  const float* block_sums = reinterpret_cast<const float*>(shared + P::block_sums_at);
  int* flag = reinterpret_cast<int*>(shared + P::flag_at);
  const int k = thread_index();
  if (k < p.K) {
    float sum = 0.0f;
    for (int b = 0; b < cluster_size(); ++b) sum += block_sums[b * kMostAdapters + k];
    p.parts[k * tiles + tile] = sum;
  }
  sync_block();
  if (thread_index() == 0) {
    *flag = count_arrival(p.counter) == uint32_t(tiles - 1);
    if (*flag) *p.counter = 0;
  }
  sync_block();
  return *flag != 0;
}

// and the tiles (the last cluster).
NSC_DEVICE void finish_dlam(const Problem& p, int64_t tiles) {
  for (int k = warp_index(); k < p.K; k += kWarps) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t i = lane_index(); i < tiles; i += 32) sum += load_fresh(p.parts + k * tiles + i);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) p.dlam[k] = sum;
  }
}

// out[tile, slice] = base + c . w_out[:, slice] + 2 dsqnorm z, rounded once.
template <class E, class P>
NSC_DEVICE void expand(const Problem& p, unsigned char* shared, int64_t first, Range slice) {
  constexpr int S = P::expand_stages, N = P::expand_tiles;
  const Copier copier;
  const int lane = lane_index(), warp_m = warp_index() % P::warps_m, warp_n = warp_index() / P::warps_m;
  const int count = slice.end - slice.begin;
  const unsigned char* c = shared + P::c_at;
  const bool tail = P::Backward && p.dsqnorm != nullptr;

  auto load = [&](int step) {
    if (step < count) {
      unsigned char* slot = shared + (step % S) * P::expand_slot;
      const int64_t column = int64_t(slice.begin + step) * kColumns;
      copier.load<P::Ranks>(slot, p.w_out, p.d_out, 0, p.R, column, p.d_out);
      slot += P::Ranks * kRowBytes;
      if (p.base != nullptr) copier.load<P::Tokens>(slot, p.base, p.base_stride, first, p.T, column, p.d_out);
      if (tail) copier.load<P::Tokens>(slot + P::Tokens * kRowBytes, p.z, p.z_stride, first, p.T, column, p.d_out);
    }
    commit_copies();
  };
  auto load_c = [&](uint32_t (&a)[2][4], int k) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      load_matrices4(a[m], c + (warp_m * kWarpRows + m * 16 + left_row(lane)) * P::c_stride + k * 32 + left_chunk(lane) * 16);
  };

#pragma unroll
  for (int step = 0; step < S - 1; ++step) load(step);

  float scale[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (tail) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t t = first + warp_m * kWarpRows + i * 8 + acc_row(lane);
      scale[i] = t < p.T ? 2.0f * p.dsqnorm[t] : 0.0f;
    }
  }
  uint32_t kept[P::c_in_registers ? P::Ranks / 16 : 1][2][4];
  if constexpr (P::c_in_registers) {
#pragma unroll
    for (int k = 0; k < P::Ranks / 16; ++k) load_c(kept[k], k);
  }

  for (int step = 0; step < count; ++step) {
    wait_copies<S - 2>();
    sync_block();
    load(step + S - 1);
    unsigned char* w_tile = shared + (step % S) * P::expand_slot;
    unsigned char* out_tile = w_tile + P::Ranks * kRowBytes;
    const unsigned char* z_tile = out_tile + P::Tokens * kRowBytes;
    Accumulators<N> acc;
    acc.clear();
    auto products = [&](const uint32_t (&a)[2][4], int k) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        load_matrices4_transposed(b, w_tile + tile_offset(k * 16 + expand_row(lane), warp_n * N + n + expand_chunk(lane)));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<E>(acc.of[m][n], a[m], b[0], b[1]);
          multiply_add<E>(acc.of[m][n + 1], a[m], b[2], b[3]);
        }
      }
    };
    if constexpr (P::c_in_registers) {
#pragma unroll
      for (int k = 0; k < P::Ranks / 16; ++k) products(kept[k], k);
    } else {
#pragma unroll 4
      for (int k = 0; k < P::Ranks / 16; ++k) {
        uint32_t a[2][4];
        load_c(a, k);
        products(a, k);
      }
    }
    // Into the output tile in place: each pair has one thread, which reads base there before it writes.
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_m * kWarpRows + m * 16 + half * 8 + acc_row(lane);
          const int at = tile_offset(row, warp_n * N + n) + acc_column(lane) * 2;
          uint32_t* place = reinterpret_cast<uint32_t*>(out_tile + at);
          float low = acc.of[m][n][2 * half], high = acc.of[m][n][2 * half + 1];
          if (p.base != nullptr) add_pair<E>(low, high, *place, 1.0f);
          if (tail) add_pair<E>(low, high, *reinterpret_cast<const uint32_t*>(z_tile + at), scale[2 * m + half]);
          *place = pack<E>(low, high);
        }
    sync_block();
    copier.store<P::Tokens>(p.out, out_tile, p.out_stride, first, p.T, int64_t(slice.begin + step) * kColumns, p.d_out);
  }
  wait_copies<0>();
}

// The whole of one block. `shared` is P::shared bytes, aligned to 128.
template <class E, class P>
NSC_DEVICE void merged_lora(const Problem& p, unsigned char* shared) {
  const int64_t tile = cluster_index(), tiles = ceil_div(p.T, P::Tokens), first = tile * P::Tokens;
  store_owners<P>(p, shared);
  {
    Accumulators<P::shrink_tiles> acc;
    acc.clear();
    float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const Range none{0, 0};
    shrink<E, P>(p, shared, first, p.x != nullptr ? slice(p.d_in, cluster_rank(), cluster_size()) : none, acc, squares);
    publish<P>(p, shared, acc, squares);
  }
  sync_cluster();  // every partial is there
  middle<E, P>(p, shared, first);
  const bool sum_dlam = P::Backward && p.dlam != nullptr && !p.lam_per_row;
  if (sum_dlam) send_dlam<P>(p, shared);
  sync_cluster();  // every c is there, and no block reads another's memory from here on
  bool last = false;
  if (sum_dlam && cluster_rank() == 0) last = store_dlam<P>(p, shared, tile, tiles);
  if (p.out != nullptr) expand<E, P>(p, shared, first, slice(p.d_out, cluster_rank(), cluster_size()));
  if (last) finish_dlam(p, tiles);
}

}  // namespace nsc::cuda
