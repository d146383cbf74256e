// The primitives of csrc/cuda/warpgroup.inl on a CPU: TMA boxes, mbarriers, wgmma on matrices in shared memory.
//
// Boxes land when they are issued, or when somebody waits for their barrier; stores read shared memory when they are issued,
// or when their issuer waits for them. Matrix descriptors are decoded, and addresses swizzled, as the PTX ISA defines it
// for the swizzle of 128 bytes. Not modelled: the proxies, whose fences are not missed here, and how far apart in time the
// warps of a warpgroup may be.
#pragma once

#include "emulator.h"

namespace nsc::cuda {

using TensorMap = Box;

struct PhaseBarrier {
  uint8_t arrivals, missing, phase, unused;
  int32_t bytes;

  void settle() {
    if (missing != 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};
static_assert(sizeof(PhaseBarrier) == 8, "as large as an mbarrier");

struct Flight {
  int block;
  PhaseBarrier* barrier;
  std::function<void()> land;
};

// What is on its way: boxes to a barrier, and stores of a thread.
inline std::vector<Flight>& flights() {
  static std::vector<Flight> all;
  return all;
}
inline std::vector<std::pair<Fiber*, std::function<void()>>>& stores() {
  static std::vector<std::pair<Fiber*, std::function<void()>>> all;
  return all;
}

// Before a tile: a run that failed leaves things in the air.
inline void clear_flights() {
  flights().clear();
  stores().clear();
}

inline void prefetch(const TensorMap&) {}
inline void start_barrier(PhaseBarrier* barrier, int arrivals) {
  *barrier = {uint8_t(arrivals), uint8_t(arrivals), 0, 0, 0};
}
inline void publish_barriers() {}
inline void arrive(PhaseBarrier* barrier) {
  if (barrier->missing == 0) fail("too many arrivals");
  --barrier->missing;
  barrier->settle();
}
inline void announce(PhaseBarrier* barrier, int bytes) {
  barrier->bytes += bytes;
  arrive(barrier);
}
inline void land(PhaseBarrier* barrier) {
  auto& all = flights();
  for (size_t i = 0; i < all.size();) {
    if (all[i].barrier != barrier) {
      ++i;
      continue;
    }
    const auto land = all[i].land;
    all.erase(all.begin() + i);
    land();
  }
}
inline void wait_phase(PhaseBarrier* barrier, int parity) {
  machine().wait_until([barrier, parity] {
    land(barrier);
    return barrier->phase % 2 != parity;
  });
}

// Where byte `at` of shared memory lies after the swizzle.
inline int swizzled(int at) { return at ^ ((at >> 7 & 7) << 4); }

inline int place_of(const void* pointer) {
  return int(static_cast<const unsigned char*>(pointer) - machine().memory(cluster_rank()));
}

inline void tensor_load(void* tile, const TensorMap& map, int64_t column, int64_t row, PhaseBarrier* barrier) {
  const int start = place_of(tile);
  unsigned char* memory = machine().memory(cluster_rank());
  if (start % 1024 != 0 || start + map.box_rows * kRowBytes > machine().shared_bytes)
    fail("a box outside of its alignment or of shared memory");
  auto land = [=] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < kColumns; ++c) {
        const bool inside = row + r < map.rows && column + c < map.columns;
        const half_bits value = inside ? map.data[(row + r) * map.stride + column + c] : half_bits(0);
        std::memcpy(memory + swizzled(start + r * kRowBytes + c * 2), &value, 2);
      }
    barrier->bytes -= map.box_rows * kRowBytes;
    barrier->settle();
  };
  if (machine().copies == Copies::early) return land();
  flights().push_back({cluster_rank(), barrier, land});
}

inline void tensor_store(const TensorMap& map, const void* tile, int64_t column, int64_t row) {
  const int start = place_of(tile);
  const unsigned char* memory = machine().memory(cluster_rank());
  auto store = [=] {
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < kColumns; ++c)
        if (row + r < map.rows && column + c < map.columns)
          std::memcpy(const_cast<half_bits*>(map.data) + (row + r) * map.stride + column + c,
                      memory + swizzled(start + r * kRowBytes + c * 2), 2);
  };
  if (machine().copies == Copies::early) return store();
  stores().emplace_back(machine().current, store);
}
inline void wait_stores() {
  auto& all = stores();
  for (size_t i = 0; i < all.size();) {
    if (all[i].first != machine().current) {
      ++i;
      continue;
    }
    const auto store = all[i].second;
    all.erase(all.begin() + i);
    store();
  }
}
inline void fence_async() {}

inline void sync_warpgroup(int group) { machine().wait(machine().group_barriers[size_t(cluster_rank()) * 2 + group]); }

// Start, stride between groups of eight rows, swizzle of 128 bytes; the start is a place in this block's memory.
template <bool Transposed>
uint64_t descriptor(const void* start) {
  return uint64_t((place_of(start) & 0x3ffff) >> 4) | uint64_t(Transposed ? 1024 >> 4 : 1) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
inline void stay(float&) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {}

template <class E, int Columns, bool Transposed>
void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t matrix, bool add) {
  if (matrix >> 62 != 1) fail("another swizzle");
  const int start = int(matrix & 0x3fff) << 4, stride = int(matrix >> 32 & 0x3fff) << 4;
  const int buffer = exchange([&](Warp& warp, int b, int lane) { std::memcpy(warp.a[b][lane], a, 16); });
  const Warp& warp = machine().warp();
  const unsigned char* memory = machine().memory(cluster_rank());
  Operands operands;
  operands.unpack_left<E>(warp, buffer);
  for (int n = 0; n < Columns / 8; ++n) {
    for (int c = 0; c < 2; ++c)
      for (int k = 0; k < 16; ++k) {
        const int column = n * 8 + lane_index() % 4 * 2 + c;
        const int outer = Transposed ? k : column, inner = Transposed ? column : k;
        half_bits value;
        std::memcpy(&value, memory + swizzled(start + outer / 8 * stride + outer % 8 * kRowBytes + inner * 2), 2);
        operands.right[c][k] = E::widen(value);
      }
    for (int i = 0; i < 4; ++i) d[n][i] = operands.sum(i, add ? d[n][i] : 0.0f);
  }
}

}  // namespace nsc::cuda
