// The primitives of warpgroup.inl on sm_90a: TMA and mbarriers through cuda::ptx, wgmma, which that has no wrapper for.
#pragma once

#include <cuda.h>
#include <cuda/ptx>

#include "hardware.cuh"

namespace nsc::cuda {

namespace ptx = ::cuda::ptx;

using TensorMap = CUtensorMap;
using PhaseBarrier = uint64_t;

// cuda::ptx has none for this one either.
NSC_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

NSC_DEVICE void start_barrier(PhaseBarrier* barrier, int arrivals) { ptx::mbarrier_init(barrier, arrivals); }
NSC_DEVICE void publish_barriers() {
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  ptx::fence_proxy_async(ptx::space_shared);
}
// The one arrival of a phase that ends when `bytes` have come, too.
NSC_DEVICE void announce(PhaseBarrier* barrier, int bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier, bytes);
}
NSC_DEVICE void arrive(PhaseBarrier* barrier) { ptx::mbarrier_arrive(barrier); }
NSC_DEVICE void wait_phase(PhaseBarrier* barrier, int parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// A box of 64 columns from (row, column) of the matrix behind `map`; zeros outside of it.
NSC_DEVICE void tensor_load(void* tile, const TensorMap& map, int64_t column, int64_t row, PhaseBarrier* barrier) {
  const int32_t at[2] = {int32_t(column), int32_t(row)};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile, &map, at, barrier);
}
NSC_DEVICE void tensor_store(const TensorMap& map, const void* tile, int64_t column, int64_t row) {
  const int32_t at[2] = {int32_t(column), int32_t(row)};
  ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, at, tile);
  ptx::cp_async_bulk_commit_group();
}
// Until what this thread stores has been read from shared memory.
NSC_DEVICE void wait_stores() { ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>{}); }
NSC_DEVICE void fence_async() { ptx::fence_proxy_async(ptx::space_shared); }
NSC_DEVICE void sync_warpgroup(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// A matrix in shared memory in the swizzle of 128 bytes: eight rows of 128 bytes after another every 1024 bytes. The other
// stride is not read: rows are one swizzle wide (by convention 1), or, transposed, there is one group of 64 columns.
template <bool Transposed>
NSC_DEVICE uint64_t descriptor(const void* start) {
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(Transposed ? 1024 >> 4 : 1) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// wgmma writes its accumulators until the wait, which the compiler does not see: it may move or copy none of them across
// a fence or a wait that has this beside it.
NSC_DEVICE void stay(float& accumulator) { asm volatile("" : "+f"(accumulator)::"memory"); }
NSC_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NSC_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
NSC_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define NSC_ROW(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define NSC_WGMMA_32(type)                                                                              \
  asm volatile(                                                                                         \
      "{.reg .pred add; setp.ne.b32 add, %22, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"                        \
      " {%16, %17, %18, %19}, %20, add, 1, 1, %21;}"                                                    \
      : NSC_ROW(0), NSC_ROW(1), NSC_ROW(2), NSC_ROW(3)                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix), "n"(int(Transposed)), "r"(int(add)))
#define NSC_WGMMA_64(type)                                                                              \
  asm volatile(                                                                                         \
      "{.reg .pred add; setp.ne.b32 add, %38, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                       \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                         \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"               \
      " {%32, %33, %34, %35}, %36, add, 1, 1, %37;}"                                                    \
      : NSC_ROW(0), NSC_ROW(1), NSC_ROW(2), NSC_ROW(3), NSC_ROW(4), NSC_ROW(5), NSC_ROW(6), NSC_ROW(7)  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix), "n"(int(Transposed)), "r"(int(add)))

// 64 x 16 (a, 16 rows per warp) times 16 x Columns (a matrix in shared memory), added to 64 x Columns or, without `add`, in
// their place. Transposed: rows of the matrix are the inner dimension.
template <class E, int Columns, bool Transposed>
NSC_DEVICE void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t matrix, bool add) {
  static_assert(Columns == 32 || Columns == 64, "not written out");
  if constexpr (Columns == 64 && E::is_bf16)
    NSC_WGMMA_64("bf16");
  else if constexpr (Columns == 64)
    NSC_WGMMA_64("f16");
  else if constexpr (E::is_bf16)
    NSC_WGMMA_32("bf16");
  else
    NSC_WGMMA_32("f16");
}

#undef NSC_ROW
#undef NSC_WGMMA_32
#undef NSC_WGMMA_64

}  // namespace nsc::cuda
