// The primitives of kernel.inl on compute capability 9.0.
#pragma once

#include <cooperative_groups.h>
#include <cuda/atomic>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

#define NSC_DEVICE __device__ __forceinline__

namespace nsc::cuda {

struct Bf16 {
  using type = __nv_bfloat16;
  static constexpr bool is_bf16 = true;
};
struct F16 {
  using type = __half;
  static constexpr bool is_bf16 = false;
};

NSC_DEVICE int thread_index() { return threadIdx.x; }
NSC_DEVICE int lane_index() { return threadIdx.x % 32; }
// From one lane, which tells the compiler that it is the same for all of them.
NSC_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
NSC_DEVICE int cluster_rank() { return cooperative_groups::cluster_group::block_rank(); }
NSC_DEVICE int cluster_size() { return cooperative_groups::cluster_group::num_blocks(); }
NSC_DEVICE int64_t cluster_index() { return blockIdx.x / cluster_size(); }

NSC_DEVICE void sync_block() { __syncthreads(); }
NSC_DEVICE void sync_warp() { __syncwarp(); }
NSC_DEVICE void sync_cluster() {
  if (cluster_size() == 1) return sync_block();  // nobody outside of the block to wait for
  __syncwarp();                                  // the barrier expects converged warps
  cooperative_groups::cluster_group::sync();
}
NSC_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

NSC_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory; zeros, and no read, if not valid.
NSC_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
NSC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
NSC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

NSC_DEVICE void load_matrices4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
NSC_DEVICE void load_matrices2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
NSC_DEVICE void load_matrices4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 x 16 (a) times 16 x 8 (b) added to 16 x 8.
template <class E>
NSC_DEVICE void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
NSC_DEVICE void multiply_add<Bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NSC_DEVICE void multiply_add<F16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class E>
NSC_DEVICE float to_float(half_bits bits) {
  return float(*reinterpret_cast<const typename E::type*>(&bits));
}
template <class E>
NSC_DEVICE half_bits to_half(float value) {
  const typename E::type rounded(value);
  return *reinterpret_cast<const half_bits*>(&rounded);
}
template <class E>
NSC_DEVICE uint32_t pack(float low, float high) {
  return uint32_t(to_half<E>(low)) | uint32_t(to_half<E>(high)) << 16;
}
template <class E>
NSC_DEVICE void add_pair(float& low, float& high, uint32_t pair, float scale) {
  low += scale * to_float<E>(half_bits(pair));
  high += scale * to_float<E>(half_bits(pair >> 16));
}
template <class E>
NSC_DEVICE float square_sum(uint32_t pair) {
  const float low = to_float<E>(half_bits(pair)), high = to_float<E>(half_bits(pair >> 16));
  return low * low + high * high;
}

NSC_DEVICE void store_pair(float* to, float low, float high) { *reinterpret_cast<float2*>(to) = make_float2(low, high); }
NSC_DEVICE void store4(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
NSC_DEVICE void store16(half_bits* to, const void* from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

// Shared memory of block `rank` of the cluster, at the place where `here` points in this block's.
NSC_DEVICE uint32_t remote_address(const void* here, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
  return there;
}
NSC_DEVICE float remote_load(const float* here, int rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote_address(here, rank)) : "memory");
  return value;
}
NSC_DEVICE void remote_load4(float (&v)[4], const float* here, int rank) {
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(remote_address(here, rank))
               : "memory");
}
NSC_DEVICE void remote_store(float* here, float value, int rank) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote_address(here, rank)), "f"(value) : "memory");
}
NSC_DEVICE void remote_store8(void* here, uint32_t low, uint32_t high, int rank) {
  asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(remote_address(here, rank)), "r"(low), "r"(high)
               : "memory");
}

// One arrival, after everything this block has stored; what the earlier ones had stored is visible afterwards.
// Called by one thread between two barriers of the block.
NSC_DEVICE uint32_t count_arrival(uint32_t* counter) {
  return ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device>(*counter).fetch_add(1, ::cuda::memory_order_acq_rel);
}
// Not through L1, which other processors' stores do not reach.
NSC_DEVICE float load_fresh(const float* from) { return __ldcg(from); }

}  // namespace nsc::cuda
