// The same kernel with Hopper's own instructions: tiles come by TMA and complete on mbarriers, products are wgmma, tiles of
// the output leave by TMA. Exchange and middle are those of kernel.inl, which is included first.
//
// Two warpgroups. In the shrink they share the stages: with 128 tokens each has 64 of them and all ranks, with 64 tokens
// each has half of the ranks. In the expand each goes through every second tile of the output with stages of its own, so
// that one stores while the other multiplies. Thread 0 of the block (shrink) or of the warpgroup (expand) issues copies.
//
// x and c are read into registers (ldmatrix, the layout of wgmma's left operand; the norms come from there), the weights
// are read by wgmma from shared memory as TMA wrote them, in the swizzle of 128 bytes that tile_offset() computes.

namespace nsc::cuda {

// What TMA reads and writes, as boxes of 64 columns.
struct Maps {
  TensorMap x, w_in, w_out, base, z, out;
};

// Accumulators of one warp: 16 tokens by N x 8 columns.
template <int N>
struct Strip {
  float of[N][4];

  NSC_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) of[n][i] = 0.0f;
  }
  // Before wgmma_fence() and after wgmma_wait().
  NSC_DEVICE void hold() {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) stay(of[n][i]);
  }
};

// By one thread: the hardware reads a map before it can load its first box.
NSC_DEVICE void prefetch_maps(const Problem& p, const Maps& maps) {
  if (p.x != nullptr) prefetch(maps.x), prefetch(maps.w_in);
  if (p.out == nullptr) return;
  prefetch(maps.w_out), prefetch(maps.out);
  if (p.base != nullptr) prefetch(maps.base);
  if (p.dsqnorm != nullptr) prefetch(maps.z);
}

template <class P>
NSC_DEVICE void load_weights(unsigned char* tile, const TensorMap& map, int64_t column, PhaseBarrier* full) {
#pragma unroll
  for (int row = 0; row < P::Ranks; row += P::weight_box) tensor_load(tile + row * kRowBytes, map, column, row, full);
}

template <class P>
NSC_DEVICE PhaseBarrier* barriers(unsigned char* shared) {
  return reinterpret_cast<PhaseBarrier*>(shared + P::barriers_at);
}

// By thread 0, before a barrier of the block.
template <class P>
NSC_DEVICE void start_barriers(unsigned char* shared) {
  PhaseBarrier* all = barriers<P>(shared);
  for (int i = 0; i < kMostStages; ++i) {
    start_barrier(all + i, 1);                          // full of shrink: the thread that announces the bytes
    start_barrier(all + kMostStages + i, kWarps);       // empty: every warp
    start_barrier(all + 2 * kMostStages + i, 1);        // full of expand
  }
  publish_barriers();
}

// kernel.inl's shrink. squares: of this thread's two rows.
template <class E, class P>
NSC_DEVICE void shrink_warpgroups(const Maps& maps, unsigned char* shared, int64_t first, Range slice, bool norms,
                                  Strip<P::shrink_tiles>& acc, float (&squares)[2]) {
  constexpr int S = P::shrink_stages, N = P::wgmma_columns;
  const int lane = lane_index(), warp_m = warp_index() % P::warps_m, warp_n = warp_index() / P::warps_m;
  const int count = slice.end - slice.begin;
  PhaseBarrier* full = barriers<P>(shared);
  PhaseBarrier* empty = full + kMostStages;

  auto load = [&](int step) {
    unsigned char* slot = shared + step % S * P::shrink_slot;
    const int64_t column = int64_t(slice.begin + step) * kColumns;
    announce(full + step % S, P::shrink_slot);
    tensor_load(slot, maps.x, column, first, full + step % S);
    load_weights<P>(slot + P::Tokens * kRowBytes, maps.w_in, column, full + step % S);
  };
  if (thread_index() == 0)
    for (int step = 0; step < S - 1 && step < count; ++step) load(step);

  for (int step = 0; step < count; ++step) {
    if (thread_index() == 0 && step + S - 1 < count) {
      if (step > 0) wait_phase(empty + (step - 1) % S, (step - 1) / S % 2);
      load(step + S - 1);
    }
    sync_warp();
    wait_phase(full + step % S, step / S % 2);
    const unsigned char* x_tile = shared + step % S * P::shrink_slot;
    const unsigned char* w_tile = x_tile + (P::Tokens + warp_n * P::shrink_tiles * 8) * kRowBytes;
    uint32_t a[kColumns / 16][4];
    float of_step[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      load_matrices4(a[k], x_tile + tile_offset(warp_m * 16 + left_row(lane), 2 * k + left_chunk(lane)));
      if (norms && k % P::warps_n == warp_n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of_step[i % 2] += square_sum<E>(a[k][i]);
      }
    }
    for (int i = 0; i < 2; ++i) squares[i] += of_step[i];
    acc.hold();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int n = 0; n < P::shrink_tiles * 8; n += N)
        wgmma<E, N, false>(acc.of + n / 8, a[k], descriptor<false>(w_tile + n * kRowBytes + k * 32), true);
    wgmma_commit();
    wgmma_wait();
    acc.hold();
    sync_warp();
    if (lane == 0) arrive(empty + step % S);
  }
  sync_block();
}

// kernel.inl's publish.
template <class P>
NSC_DEVICE void publish_warpgroups(const Problem& p, unsigned char* shared, const Strip<P::shrink_tiles>& acc,
                                   float (&squares)[2]) {
  const int lane = lane_index(), warp_m = warp_index() % P::warps_m, warp_n = warp_index() / P::warps_m;
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < P::shrink_tiles; ++n) {
    float* at = partial + (warp_m * 16 + acc_row(lane)) * P::partial_stride + (warp_n * P::shrink_tiles + n) * 8 +
                acc_column(lane);
    store_pair(at, acc.of[n][0], acc.of[n][1]);
    store_pair(at + 8 * P::partial_stride, acc.of[n][2], acc.of[n][3]);
  }
  if (!P::Backward && p.sqnorm != nullptr) {
    float* norms = reinterpret_cast<float*>(shared + P::norms_at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = squares[i];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if ((lane & 3) == 0) norms[warp_n * P::Tokens + warp_m * 16 + i * 8 + acc_row(lane)] = sum;
    }
  }
  clear_sums<P>(p, shared);
}

// kernel.inl's expand.
template <class E, class P>
NSC_DEVICE void expand_warpgroups(const Problem& p, const Maps& maps, unsigned char* shared, int64_t first, Range slice) {
  constexpr int S = P::own_stages, M = P::Tokens / 64, N = kColumns / 8;
  const int lane = lane_index(), group = warp_index() / 4, warp = warp_index() % 4;
  const bool leader = thread_index() % 128 == 0;
  const int count = (slice.end - slice.begin - group + 1) / 2;
  const unsigned char* c = shared + P::c_at;
  const bool tail = P::Backward && p.dsqnorm != nullptr;
  PhaseBarrier* full = barriers<P>(shared) + 2 * kMostStages + group * S;
  unsigned char* stages = shared + group * S * P::expand_slot;
  const int bytes = (P::Ranks + P::Tokens * ((p.base != nullptr) + tail)) * kRowBytes;

  auto column_of = [&](int step) { return int64_t(slice.begin + group + 2 * step) * kColumns; };
  auto load = [&](int step) {
    unsigned char* slot = stages + step % S * P::expand_slot;
    announce(full + step % S, bytes);
    load_weights<P>(slot, maps.w_out, column_of(step), full + step % S);
    slot += P::Ranks * kRowBytes;
    if (p.base != nullptr) tensor_load(slot, maps.base, column_of(step), first, full + step % S);
    if (tail) tensor_load(slot + P::Tokens * kRowBytes, maps.z, column_of(step), first, full + step % S);
  };
  if (leader)
    for (int step = 0; step < S && step < count; ++step) load(step);

  uint32_t a[M][P::Ranks / 16][4];
  float scale[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int k = 0; k < P::Ranks / 16; ++k)
      load_matrices4(a[m][k], c + (m * 64 + warp * 16 + left_row(lane)) * P::c_stride + k * 32 + left_chunk(lane) * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = first + m * 64 + warp * 16 + i * 8 + acc_row(lane);
      scale[m][i] = tail && t < p.T ? 2.0f * p.dsqnorm[t] : 0.0f;
    }
  }

  for (int step = 0; step < count; ++step) {
    sync_warp();
    wait_phase(full + step % S, step / S % 2);
    unsigned char* w_tile = stages + step % S * P::expand_slot;
    unsigned char* out_tile = w_tile + P::Ranks * kRowBytes;
    const unsigned char* z_tile = out_tile + P::Tokens * kRowBytes;
    Strip<N> acc[M];
#pragma unroll
    for (int m = 0; m < M; ++m) acc[m].hold();
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < P::Ranks / 16; ++k)
#pragma unroll
      for (int m = 0; m < M; ++m)
        wgmma<E, kColumns, true>(acc[m].of, a[m][k], descriptor<true>(w_tile + k * 16 * kRowBytes), k > 0);
    wgmma_commit();
    wgmma_wait();
#pragma unroll
    for (int m = 0; m < M; ++m) acc[m].hold();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = tile_offset(m * 64 + warp * 16 + half * 8 + acc_row(lane), n) + acc_column(lane) * 2;
          uint32_t* place = reinterpret_cast<uint32_t*>(out_tile + at);
          float low = acc[m].of[n][2 * half], high = acc[m].of[n][2 * half + 1];
          if (p.base != nullptr) add_pair<E>(low, high, *place, 1.0f);
          if (tail) add_pair<E>(low, high, *reinterpret_cast<const uint32_t*>(z_tile + at), scale[m][half]);
          *place = pack<E>(low, high);
        }
    fence_async();  // what was written is stored by TMA, and what was read is overwritten by it
    sync_warpgroup(group);
    if (leader) {
      tensor_store(maps.out, out_tile, column_of(step), first);
      wait_stores();
      if (step + S < count) load(step + S);
    }
  }
}

// The whole of one block. `shared` is P::shared bytes, aligned to 1024: the swizzle counts from there.
template <class E, class P>
NSC_DEVICE void merged_lora_warpgroups(const Problem& p, const Maps& maps, unsigned char* shared) {
  const int64_t tile = cluster_index(), tiles = ceil_div(p.T, P::Tokens), first = tile * P::Tokens;
  if (thread_index() == 0) {
    prefetch_maps(p, maps);
    start_barriers<P>(shared);
  }
  store_owners<P>(p, shared);
  sync_block();
  {
    Strip<P::shrink_tiles> acc;
    acc.clear();
    float squares[2] = {0.0f, 0.0f};
    const Range none{0, 0};
    shrink_warpgroups<E, P>(maps, shared, first, p.x != nullptr ? slice(p.d_in, cluster_rank(), cluster_size()) : none,
                            !P::Backward && p.sqnorm != nullptr, acc, squares);
    publish_warpgroups<P>(p, shared, acc, squares);
  }
  sync_cluster();
  middle<E, P>(p, shared, first);
  const bool sum_dlam = P::Backward && p.dlam != nullptr && !p.lam_per_row;
  if (sum_dlam) send_dlam<P>(p, shared);
  sync_cluster();
  bool last = false;
  if (sum_dlam && cluster_rank() == 0) last = store_dlam<P>(p, shared, tile, tiles);
  if (p.out != nullptr) {
    fence_async();  // the partials, before TMA writes over them
    sync_block();
    expand_warpgroups<E, P>(p, maps, shared, first, slice(p.d_out, cluster_rank(), cluster_size()));
  }
  if (last) finish_dlam(p, tiles);
}

}  // namespace nsc::cuda
