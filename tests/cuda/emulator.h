// The primitives of csrc/cuda/kernel.inl on a CPU: every thread of a cluster is a fiber, run until it waits.
//
// What real hardware leaves open is a setting, so that a missing barrier or wait shows as a wrong result:
//   * the order in which threads run between barriers: ascending, descending, or drawn anew in every pass;
//   * asynchronous copies land when they are issued, or not before the wait that they are waited for with;
//   * matrix instructions round to nearest or towards zero (matrix_unit.h).
// Shared memory starts as NaN. Fragments are laid out as the PTX ISA defines them for ldmatrix and mma.m16n8k16.
// Not modelled: caches, the memory model between blocks of different clusters, and timing.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "matrix_unit.h"
#include "problem.h"

#define NSC_DEVICE inline

namespace nsc::cuda {

struct Bf16 {
  static float widen(half_bits bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static half_bits round(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fff;
    return half_bits((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};
struct F16 {
  static float widen(half_bits bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
  static half_bits round(float value) {
    const _Float16 rounded = _Float16(value);
    half_bits bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  }
};
template <class E>
float to_float(half_bits bits) {
  return E::widen(bits);
}
template <class E>
half_bits to_half(float value) {
  return E::round(value);
}
template <class E>
uint32_t pack(float low, float high) {
  return uint32_t(E::round(low)) | uint32_t(E::round(high)) << 16;
}
template <class E>
void add_pair(float& low, float& high, uint32_t pair, float scale) {
  low += scale * E::widen(half_bits(pair));
  high += scale * E::widen(half_bits(pair >> 16));
}
template <class E>
float square_sum(uint32_t pair) {
  const float low = E::widen(half_bits(pair)), high = E::widen(half_bits(pair >> 16));
  return low * low + high * high;
}

enum class Order : int { ascending, descending, random };
enum class Copies : int { late, early };

// A barrier of `size` threads: the last one to arrive begins the next phase.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t phase = 0;
};

constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf point;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};  // not filled: most of it is never touched
  bool started = false, done = false;
  Barrier* waits = nullptr;
  uint64_t phase = 0;
  std::function<bool()> until;
  int block = 0, thread = 0;
  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  std::vector<std::vector<Copy>> groups{1};
};

struct Warp {
  Barrier barrier;
  uint64_t operation[32] = {};
  // Two, used in turn: nobody can write one again before everybody has read it.
  const void* rows[2][32];
  float values[2][32];
  uint32_t a[2][32][4], b[2][32][2];
  float acc[2][32][4];
};

struct Machine {
  int blocks, shared_bytes, tile;
  Order order;
  Copies copies;
  Unit unit;
  std::mt19937 draw{1};
  std::vector<std::vector<unsigned char>> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Barrier> block_barriers, group_barriers;
  Barrier cluster_barrier;
  std::function<void(unsigned char*)> body;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  bool failed = false;

  static Machine*& active() {
    static Machine* machine = nullptr;
    return machine;
  }

  Machine(int blocks, int shared_bytes, Order order, Copies copies, Unit unit)
      : blocks(blocks),
        shared_bytes(shared_bytes),
        order(order),
        copies(copies),
        unit(unit),
        fibers(size_t(blocks) * kThreads) {}

  unsigned char* memory(int block) {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared[block].data()) + 1023) / 1024 * 1024);
  }

  static void trampoline() {
    Machine& m = *active();
    m.body(m.memory(m.current->block));
    m.current->done = true;
    _longjmp(m.scheduler, 1);
  }

  void resume(Fiber& f) {
    current = &f;
    if (_setjmp(scheduler) == 0) {
      if (f.started) _longjmp(f.point, 1);
      f.started = true;
      setcontext(&f.start);
    }
  }

  // Arrives, and returns when everybody has.
  void wait(Barrier& barrier) {
    Fiber& f = *current;
    if (++barrier.arrived == barrier.size) {
      barrier.arrived = 0;
      ++barrier.phase;
      return;
    }
    f.waits = &barrier;
    f.phase = barrier.phase;
    if (_setjmp(f.point) == 0) _longjmp(scheduler, 1);
  }

  // Returns when `condition` holds.
  void wait_until(std::function<bool()> condition) {
    if (condition()) return;
    Fiber& f = *current;
    f.until = std::move(condition);
    if (_setjmp(f.point) == 0) _longjmp(scheduler, 1);
    current->until = nullptr;
  }

  // One tile: every thread of its cluster from beginning to end.
  void run(int tile_index) {
    active() = this;
    tile = tile_index;
    shared.assign(blocks, std::vector<unsigned char>(shared_bytes + 1024, 0xff));
    warps.assign(size_t(blocks) * kWarps, Warp{});
    for (Warp& warp : warps) warp.barrier.size = 32;
    block_barriers.assign(blocks, Barrier{kThreads});
    group_barriers.assign(size_t(blocks) * 2, Barrier{kThreads / 2});
    cluster_barrier = Barrier{blocks * kThreads};
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& f = fibers[i];
      f.started = f.done = false;
      f.waits = nullptr;
      f.until = nullptr;
      f.groups.assign(1, {});
      f.block = int(i) / kThreads;
      f.thread = int(i) % kThreads;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, trampoline, 0);
    }
    std::vector<int> warp_order(warps.size()), lanes(32);
    for (size_t i = 0; i < warp_order.size(); ++i) warp_order[i] = int(i);
    for (int i = 0; i < 32; ++i) lanes[i] = i;
    if (order == Order::descending) std::reverse(warp_order.begin(), warp_order.end());
    if (order == Order::descending) std::reverse(lanes.begin(), lanes.end());
    for (bool progress = true; progress;) {
      progress = false;
      if (order == Order::random) std::shuffle(warp_order.begin(), warp_order.end(), draw);
      for (int w : warp_order) {
        if (order == Order::random) std::shuffle(lanes.begin(), lanes.end(), draw);
        for (bool moved = true; moved;) {
          moved = false;
          for (int lane : lanes) {
            Fiber& f = fibers[size_t(w) * 32 + lane];
            if (f.done || (f.waits != nullptr && f.waits->phase == f.phase) || (f.until && !f.until())) continue;
            f.waits = nullptr;
            resume(f);
            if (failed) return;
            moved = progress = true;
          }
        }
      }
    }
    for (const Fiber& f : fibers)
      if (!f.done && !failed) {
        std::fprintf(stderr, "emulator: deadlock, block %d thread %d\n", f.block, f.thread);
        failed = true;
      }
  }

  // Ends the run from within a thread; what its threads have on their stacks is lost.
  [[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulator: block %d thread %d: %s\n", current->block, current->thread, what);
    failed = true;
    _longjmp(scheduler, 1);
  }

  Warp& warp() { return warps[size_t(current->block) * kWarps + current->thread / 32]; }
  void land(const Fiber::Copy& copy) {
    if (copy.valid)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
};

inline Machine& machine() { return *Machine::active(); }
[[noreturn]] inline void fail(const char* what) { machine().fail(what); }

inline int thread_index() { return machine().current->thread; }
inline int lane_index() { return thread_index() % 32; }
inline int warp_index() { return thread_index() / 32; }
inline int cluster_rank() { return machine().current->block; }
inline int cluster_size() { return machine().blocks; }
inline int64_t cluster_index() { return machine().tile; }

inline void sync_block() { machine().wait(machine().block_barriers[cluster_rank()]); }
inline void sync_warp() { machine().wait(machine().warp().barrier); }
inline void sync_cluster() { machine().wait(machine().cluster_barrier); }

// What each lane hands in, everybody's once all have; returns which of the two buffers.
template <class HandIn>
int exchange(HandIn hand_in) {
  Warp& warp = machine().warp();
  const int buffer = int(warp.operation[lane_index()]++ % 2);
  hand_in(warp, buffer, lane_index());
  machine().wait(warp.barrier);
  return buffer;
}

inline float shuffle_xor(float value, int mask) {
  const int buffer = exchange([&](Warp& warp, int b, int lane) { warp.values[b][lane] = value; });
  return machine().warp().values[buffer][lane_index() ^ mask];
}

inline void copy_async(void* to, const void* from, bool valid) {
  const Fiber::Copy copy{to, from, valid};
  if (machine().copies == Copies::early) return machine().land(copy);
  machine().current->groups.back().push_back(copy);
}
inline void commit_copies() { machine().current->groups.emplace_back(); }
template <int Groups>
void wait_copies() {
  auto& groups = machine().current->groups;
  while (int(groups.size()) - 1 > Groups) {
    for (const Fiber::Copy& copy : groups.front()) machine().land(copy);
    groups.erase(groups.begin());
  }
}

// Matrix i of `Count` is eight rows of eight elements, addressed by lanes 8 i .. 8 i + 7.
template <int Count, bool Transposed>
void load_matrices(uint32_t* r, const void* row) {
  const int buffer = exchange([&](Warp& warp, int b, int lane) { warp.rows[b][lane] = row; });
  const int lane = lane_index();
  for (int i = 0; i < Count; ++i) {
    half_bits pair[2];
    for (int e = 0; e < 2; ++e) {
      const int outer = lane / 4, inner = lane % 4 * 2 + e;
      const int from_row = Transposed ? inner : outer, column = Transposed ? outer : inner;
      const void* start = machine().warp().rows[buffer][8 * i + from_row];
      if (reinterpret_cast<uintptr_t>(start) % 16 != 0) fail("ldmatrix misaligned");
      std::memcpy(&pair[e], static_cast<const half_bits*>(start) + column, 2);
    }
    r[i] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}
inline void load_matrices4(uint32_t (&r)[4], const void* row) { load_matrices<4, false>(r, row); }
inline void load_matrices2(uint32_t (&r)[2], const void* row) { load_matrices<2, false>(r, row); }
inline void load_matrices4_transposed(uint32_t (&r)[4], const void* row) { load_matrices<4, true>(r, row); }

// What one lane multiplies for its four sums, unpacked once: sum i is of row i / 2 with column i % 2.
struct Operands {
  double left[2][16], right[2][16];

  template <class E>
  void unpack_left(const Warp& warp, int buffer) {
    const int row = lane_index() / 4;
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = warp.a[buffer][row * 4 + k % 8 / 2][r + k / 8 * 2];
        left[r][k] = E::widen(half_bits(pair >> k % 2 * 16));
      }
  }
  float sum(int i, float acc) const {
    return inner_sum(machine().unit, acc, 16, [&](int k) { return left[i / 2][k] * right[i % 2][k]; });
  }
};

template <class E>
void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int buffer = exchange([&](Warp& warp, int b, int lane) {
    std::memcpy(warp.a[b][lane], a, 16);
    warp.b[b][lane][0] = b0;
    warp.b[b][lane][1] = b1;
  });
  const Warp& warp = machine().warp();
  Operands operands;
  operands.unpack_left<E>(warp, buffer);
  for (int c = 0; c < 2; ++c)
    for (int k = 0; k < 16; ++k) {
      const int column = lane_index() % 4 * 2 + c;
      const uint32_t pair = warp.b[buffer][column * 4 + k % 8 / 2][k / 8];
      operands.right[c][k] = E::widen(half_bits(pair >> k % 2 * 16));
    }
  for (int i = 0; i < 4; ++i) acc[i] = operands.sum(i, acc[i]);
}

inline void store_pair(float* to, float low, float high) { to[0] = low, to[1] = high; }
inline void store4(float* to, const float (&v)[4]) { std::copy(v, v + 4, to); }
inline void store16(half_bits* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("store misaligned");
  std::memcpy(to, from, 16);
}

template <class T>
T* remote(T* here, int rank) {
  Machine& m = machine();
  const auto distance = reinterpret_cast<const unsigned char*>(here) - m.memory(cluster_rank());
  if (distance < 0 || distance >= m.shared_bytes) fail("not shared memory");
  return reinterpret_cast<T*>(m.memory(rank) + distance);
}
inline float remote_load(const float* here, int rank) { return *remote(here, rank); }
inline void remote_load4(float (&v)[4], const float* here, int rank) {
  const float* there = remote(here, rank);
  if (reinterpret_cast<uintptr_t>(there) % 16 != 0) fail("load misaligned");
  std::copy(there, there + 4, v);
}
inline void remote_store(float* here, float value, int rank) { *remote(here, rank) = value; }
inline void remote_store8(void* here, uint32_t low, uint32_t high, int rank) {
  uint32_t* there = remote(static_cast<uint32_t*>(here), rank);
  there[0] = low, there[1] = high;
}

inline uint32_t count_arrival(uint32_t* counter) { return (*counter)++; }
inline float load_fresh(const float* from) { return *from; }

}  // namespace nsc::cuda
