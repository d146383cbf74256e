// The CUDA kernel's indices, exhaustively; its arithmetic (mirror.h) against double; and, built with NSC_WITH_KERNELS and
// run where there is a GPU, every variant and cluster size of the kernel itself against double.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "geometry.h"
#include "mirror.h"

#ifdef NSC_WITH_KERNELS
#include <cuda_runtime_api.h>

#include "launch.h"
#endif

using namespace nsc::cuda;

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

std::string text(std::initializer_list<int64_t> numbers) {
  std::string all;
  for (int64_t n : numbers) all += " " + std::to_string(n);
  return all;
}

// Groups of 16 bytes of the banks that eight addresses fall into.
int bank_groups(const std::function<int(int)>& address) {
  std::set<int> groups;
  for (int i = 0; i < 8; ++i) groups.insert(address(i) / 16 % 8);
  return int(groups.size());
}

void test_parts() {
  for (int count = 0; count <= 600; ++count)
    for (int n = 1; n <= kMostCluster; ++n) {
      int next = 0, least = count, most = 0;
      for (int p = 0; p < n; ++p) {
        const Range r = part(count, p, n);
        expect(r.begin == next && r.end >= r.begin, "part" + text({count, p, n}));
        next = r.end;
        least = std::min(least, r.end - r.begin);
        most = std::max(most, r.end - r.begin);
      }
      expect(next == count && most - least <= 1, "parts of" + text({count, n}));
    }
  for (int64_t d = kChunk; d <= 4096 + 64; d += kChunk) {
    expect(int64_t(steps(d)) * kColumns >= d && int64_t(steps(d) - 1) * kColumns < d, "steps" + text({d}));
    for (int n : {1, 2, 4, 8, 16})
      expect(slice(d, 0, n).begin == 0 && slice(d, n - 1, n).end == steps(d), "slice" + text({d, n}));
  }
  const int64_t wide = (int64_t(1) << 33) + 8;
  expect(slice(wide, 15, 16).end == steps(wide) && int64_t(steps(wide)) * kColumns >= wide, "slices of a wide layer");
}

void test_tiles() {
  std::vector<bool> taken(size_t(kMostRank) * 8, false);
  for (int row = 0; row < kMostRank; ++row)
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int at = tile_offset(row, chunk);
      expect(at % 16 == 0 && at / kRowBytes == row && !taken[at / 16], "tile_offset" + text({row, chunk}));
      taken[at / 16] = true;
    }
  // Every matrix that ldmatrix reads: eight rows in eight groups of banks. And as 16 x 16 elements, each once.
  using Index = int (*)(int);
  const std::pair<Index, Index> operands[] = {
      {left_row, left_chunk}, {shrink_row, shrink_chunk}, {expand_row, expand_chunk}};
  for (const auto& [row, chunk] : operands) {
    std::set<std::pair<int, int>> covered;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int k = 0; k < 4; ++k)
        expect(bank_groups([&](int i) { return tile_offset(row(8 * matrix + i), 2 * k + chunk(8 * matrix + i)); }) == 8,
               "bank conflict");
    for (int lane = 0; lane < 32; ++lane) covered.insert({row(lane), chunk(lane)});
    expect(covered.size() == 32 && covered.rbegin()->first == 15 && covered.rbegin()->second == 1, "a 16 x 16 operand");
  }
}

template <int Ranks, int Tokens, bool Backward>
void test_plan() {
  using P = Plan<Ranks, Tokens, Backward>;
  const std::string name = "plan" + text({Ranks, Tokens, Backward});
  expect(P::shared <= kSharedLimit, name + ": shared memory");
  expect(P::resident * (P::shared + (1 << 10)) <= 228 << 10, name + ": two blocks on a processor");
  expect(P::exchange <= P::ring && P::shrink_stages * P::shrink_slot <= P::ring &&
             P::expand_stages * P::expand_slot <= P::ring, name + ": regions overlap");
  expect(P::shrink_stages >= 2 && P::expand_stages >= 2, name + ": stages");
  for (int at : {P::norms_at, P::warp_sums_at, P::block_sums_at, P::c_at, P::owner_at, P::flag_at, P::shrink_slot,
                 P::expand_slot, P::partial_stride * 4, P::c_stride})
    expect(at % 16 == 0, name + ": alignment");
  expect(P::c_at == P::ring && P::c_at + P::c_bytes == P::owner_at && P::owner_at + P::owner_bytes == P::flag_at &&
             P::flag_at + 4 <= P::shared, name + ": places");
  expect(bank_groups([](int i) { return left_row(i) * P::c_stride; }) == 8, name + ": bank conflict in c");
  // A pair of partials per lane, eight bytes, in half warps: sixteen different pairs of banks.
  for (int half = 0; half < 2; ++half) {
    std::set<int> banks;
    for (int lane = 16 * half; lane < 16 * half + 16; ++lane)
      banks.insert((acc_row(lane) * P::partial_stride + acc_column(lane)) / 2 % 16);
    expect(banks.size() == 16, name + ": bank conflict in the partials");
  }
  // Every element of both products has one accumulator.
  for (const auto& [columns, tiles] : {std::pair<int, int>{Ranks, P::shrink_tiles}, {kColumns, P::expand_tiles}}) {
    std::vector<int> owners(Tokens * columns, 0);
    for (int warp = 0; warp < kWarps; ++warp)
      for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 2; ++m)
          for (int n = 0; n < tiles; ++n)
            for (int i = 0; i < 4; ++i) {
              const int row = warp % P::warps_m * kWarpRows + m * 16 + acc_row(lane) + i / 2 * 8;
              const int column = (warp / P::warps_m * tiles + n) * 8 + acc_column(lane) + i % 2;
              expect(row < Tokens && column < columns, name + ": accumulator outside");
              ++owners[size_t(row) * columns + column];
            }
    for (int count : owners) expect(count == 1, name + ": accumulators");
  }
  // Every chunk of a copied tile has one thread, with the same place in its swizzled row for all its rows.
  for (int rows : {Ranks, Tokens}) {
    std::vector<int> copies(rows * 8, 0);
    for (int thread = 0; thread < kThreads; ++thread)
      for (int i = 0; i < rows / (kThreads / 8); ++i) {
        const int row = thread / 8 + i * (kThreads / 8), chunk = thread % 8;
        expect(tile_offset(thread / 8, chunk) + i * (kThreads / 8) * kRowBytes == tile_offset(row, chunk), name + ": copy");
        ++copies[size_t(row) * 8 + chunk];
      }
    for (int count : copies) expect(count == 1, name + ": copies");
  }
}

// Where TMA and wgmma find their tiles: the swizzle of 128 bytes counts from multiples of 1024.
template <int Ranks, int Tokens, bool Backward>
void test_warpgroup_plan() {
  using P = Plan<Ranks, Tokens, Backward, true>;
  const std::string name = "warpgroup plan" + text({Ranks, Tokens, Backward});
  expect(P::shared <= kSharedLimit && P::resident * (P::shared + (1 << 10)) <= 228 << 10, name + ": shared memory");
  expect(P::exchange <= P::ring && P::shrink_stages * P::shrink_slot <= P::ring &&
             2 * P::own_stages * P::expand_slot <= P::ring && P::own_stages >= 1, name + ": regions overlap");
  for (int at : {P::shrink_slot, P::expand_slot, Tokens * kRowBytes, Ranks * kRowBytes, P::weight_box * kRowBytes,
                 Ranks / P::warps_n * kRowBytes, P::wgmma_columns * kRowBytes})
    expect(at % 1024 == 0, name + ": alignment of a tile");
  expect(P::barriers_at % 8 == 0 && P::barriers_at >= P::flag_at + 4 &&
             P::barriers_at + 3 * kMostStages * 8 <= P::shared, name + ": barriers");
  expect(P::weight_box <= 256 && Ranks % P::weight_box == 0, name + ": box");
  std::vector<int> owners(Tokens * Ranks, 0);
  for (int warp = 0; warp < kWarps; ++warp)
    for (int lane = 0; lane < 32; ++lane)
      for (int n = 0; n < P::shrink_tiles; ++n)
        for (int i = 0; i < 4; ++i) {
          const int row = warp % P::warps_m * 16 + acc_row(lane) + i / 2 * 8;
          const int column = (warp / P::warps_m * P::shrink_tiles + n) * 8 + acc_column(lane) + i % 2;
          ++owners[row * Ranks + column];
        }
  for (int count : owners) expect(count == 1, name + ": accumulators");
  // Two warpgroups: every tile of the output has one, and all are counted.
  for (int begin = 0; begin < 3; ++begin)
    for (int count = 0; count < 9; ++count) {
      std::set<int> steps_done;
      for (int group : {0, 1})
        for (int step = 0; step < (count - group + 1) / 2; ++step) steps_done.insert(begin + group + 2 * step);
      expect(int(steps_done.size()) == count && (count == 0 || *steps_done.rbegin() == begin + count - 1), name + ": steps");
    }
}

void test_owners_and_choices() {
  const std::vector<std::vector<int16_t>> all = {{0, 3, 3, 19, 24, 25, 56}, {0, 0, 0}, {0, 512}, {0, 1}, {0, 0, 7, 7}};
  for (const auto& offsets : all) {
    const int K = int(offsets.size()) - 1;
    for (int j = 0; j < kMostRank; ++j) {
      const int k = owner(offsets.data(), K, j);
      expect(j >= offsets[K] ? k == K : offsets[k] <= j && j < offsets[k + 1], "owner" + text({j, k}));
    }
  }
  for (int R = 0; R <= kMostRank + 1; ++R)
    for (int tokens : {64, 128}) {
      const int found = find_variant(R, tokens);
      for (int i = 0; i < int(std::size(kVariants)); ++i)
        if (kVariants[i].tokens == tokens && kVariants[i].ranks >= R)
          expect(found >= 0 && kVariants[found].ranks <= kVariants[i].ranks, "padding of" + text({R, tokens}));
      expect(found < 0 || (kVariants[found].tokens == tokens && kVariants[found].ranks >= R), "variant of" + text({R}));
    }
  expect(find_variant(kMostRank, 64) >= 0 && find_variant(kMostRank + 1, 64) < 0, "the largest rank");
  for (int64_t T : {1, 64, 65, 1000, 12672, 12673, 1 << 20})
    for (int R : {0, 16, 96, 129, 320, 512})
      for (int processors : {1, 114, 132}) {
        const int v = choose_variant(T, R, processors);
        expect(v >= 0 && kVariants[v].ranks >= R, "choose_variant" + text({T, R, processors}));
        const int w = with_warpgroups(v, R);
        const Variant& taken = w < kVariantCount ? kVariants[w] : kWarpgroupVariants[w - kVariantCount];
        expect(taken.ranks >= R && taken.tokens == kVariants[v].tokens, "with_warpgroups" + text({v, R}));
        expect((w == v) == (taken.tokens == 64 && R <= 96), "wgmma where it is faster" + text({v, R}));
      }
  expect(choose_variant(1, kMostRank + 1, 132) < 0 && with_warpgroups(-1, kMostRank + 1) < 0, "no variant");
  // No cluster that the device cannot run, none of more blocks than there are steps, and one block where tiles abound.
  for (int64_t tiles : {1, 2, 8, 33, 99, 132, 500, 100000})
    for (int64_t d : {8, 64, 72, 768, 4096, 14336})
      for (int largest = 0; largest < kClusterSizes; ++largest) {
        int active[kClusterSizes] = {};
        for (int i = 0; i <= largest; ++i) active[i] = 264 >> i;
        const int n = choose_cluster(tiles, d, d, active);
        expect(n >= 1 && n <= 1 << largest && (n == 1 || n <= steps(d)), "choose_cluster" + text({tiles, d, largest, n}));
        expect(tiles < 10000 || n == 1, "one block per tile" + text({tiles, d, n}));
      }
}


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
    return half_bits((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

// A problem with buffers of its own. `forward` first: the backward reads its u.
struct Data {
  int64_t T, d_in, d_out;
  std::vector<int16_t> offsets;
  bool per_row;
  std::vector<half_bits> z, A, Bt, base, dy, y, u, dz;
  std::vector<float> lam, dquad, dsqnorm, quad, sqnorm, dlam, parts;
  std::vector<uint32_t> counter = {0};

  int R() const { return offsets.back(); }
  int K() const { return int(offsets.size()) - 1; }

  Data(int64_t T, int64_t d_in, int64_t d_out, std::vector<int16_t> offsets_, bool per_row)
      : T(T), d_in(d_in), d_out(d_out), offsets(std::move(offsets_)), per_row(per_row) {
    std::mt19937 source(1);
    std::normal_distribution<float> normal;
    auto fill = [&](int64_t count, double scale) {
      std::vector<half_bits> all(count);
      for (auto& value : all) value = Bf16::round(float(normal(source) * scale));
      return all;
    };
    auto wide = [&](int64_t count) {
      std::vector<float> all(count);
      for (auto& value : all) value = normal(source);
      return all;
    };
    z = fill(T * d_in, 1);
    A = fill(R() * d_in, 1 / std::sqrt(double(d_in)));
    Bt = fill(R() * d_out, 1 / std::sqrt(std::max(R(), 1)));
    base = fill(T * d_out, 1);
    dy = fill(T * d_out, 1);
    lam = wide(per_row ? T * K() : K());
    dquad = wide(T * K());
    dsqnorm = wide(T);
    y.assign(T * d_out, 0x7fff);
    u.assign(T * R(), 0x7fff);
    dz.assign(T * d_in, 0x7fff);
    quad.assign(T * K(), NAN);
    sqnorm.assign(T, NAN);
    dlam.assign(lam.size(), NAN);
    parts.assign(K() * ceil_div(T, 64), NAN);
  }

  Problem problem(bool backward) {
    Problem p{};
    p.T = T;
    p.R = R();
    p.K = K();
    std::copy(offsets.begin(), offsets.end(), p.offsets);
    p.lam = lam.data();
    p.lam_per_row = per_row;
    p.d_in = p.x_stride = backward ? d_out : d_in;
    p.d_out = p.out_stride = p.z_stride = p.base_stride = backward ? d_in : d_out;
    p.x = backward ? dy.data() : z.data();
    p.w_in = backward ? Bt.data() : A.data();
    p.w_out = backward ? A.data() : Bt.data();
    p.out = backward ? dz.data() : y.data();
    if (backward) {
      p.u = u.data();
      p.dquad = dquad.data();
      p.dsqnorm = dsqnorm.data();
      p.z = z.data();
      p.dlam = dlam.data();
      p.parts = parts.data();
      p.counter = counter.data();
    } else {
      p.base = base.data();
      p.u_out = u.data();
      p.quad = quad.data();
      p.sqnorm = sqnorm.data();
    }
    return p;
  }
};

// Largest relative distance of results from double precision, by the norm of the whole.
struct Errors {
  double out = 0, statistics = 0;
};

double distance(const std::vector<double>& exact, const std::function<double(size_t)>& found) {
  double off = 0, norm = 1e-30;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double e = found(i) - exact[i];
    if (!(e == e)) return INFINITY;
    off += e * e;
    norm += exact[i] * exact[i];
  }
  return std::sqrt(off / norm);
}

Errors compare(const Data& d, bool backward) {
  const int64_t d_x = backward ? d.d_out : d.d_in, d_o = backward ? d.d_in : d.d_out;
  const auto& x = backward ? d.dy : d.z;
  const auto& w_in = backward ? d.Bt : d.A;
  const auto& w_out = backward ? d.A : d.Bt;
  const auto& out = backward ? d.dz : d.y;
  const int R = d.R(), K = d.K();
  std::vector<double> exact(d.T * d_o), sums(d.T * K, 0.0), norms(d.T, 0.0), c(R);
  for (int64_t t = 0; t < d.T; ++t) {
    for (int j = 0; j < R; ++j) {
      const int k = owner(d.offsets.data(), K, j);
      double s = 0;
      for (int64_t i = 0; i < d_x; ++i) s += double(Bf16::widen(x[t * d_x + i])) * Bf16::widen(w_in[j * d_x + i]);
      const double saved = backward ? double(Bf16::widen(d.u[t * R + j])) : s;
      sums[t * K + k] += saved * s;
      c[j] = d.lam[(d.per_row ? t * K : 0) + k] * s + (backward ? 2.0 * d.dquad[t * K + k] * saved : 0.0);
    }
    for (int64_t i = 0; i < d_x && !backward; ++i) norms[t] += double(Bf16::widen(x[t * d_x + i])) * Bf16::widen(x[t * d_x + i]);
    for (int64_t n = 0; n < d_o; ++n) {
      double s = backward ? 2.0 * d.dsqnorm[t] * Bf16::widen(d.z[t * d_o + n]) : double(Bf16::widen(d.base[t * d_o + n]));
      for (int j = 0; j < R; ++j) s += c[j] * Bf16::widen(w_out[j * d_o + n]);
      exact[t * d_o + n] = s;
    }
  }
  Errors e;
  e.out = distance(exact, [&](size_t i) { return Bf16::widen(out[i]); });
  if (!backward) {
    e.statistics = std::max(distance(sums, [&](size_t i) { return d.quad[i]; }), distance(norms, [&](size_t i) { return d.sqnorm[i]; }));
  } else if (d.per_row) {
    e.statistics = distance(sums, [&](size_t i) { return d.dlam[i]; });
  } else {
    std::vector<double> total(K, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) total[i % K] += sums[i];
    e.statistics = distance(total, [&](size_t i) { return d.dlam[i]; });
  }
  return e;
}

// Two roundings to eight bits in the output (c and out), none in the statistics; but a matrix unit that cuts off may lose
// a unit in the last place in each step of 16 columns, and what is a square or a product of two sums twice as much.
void judge(const Data& d, bool backward, const std::string& name) {
  const Errors e = compare(d, backward);
  const double steps = double(ceil_div(backward ? d.d_out : d.d_in, 16));
  expect(e.out < 6e-3 && e.statistics < 1e-5 + 2 * steps * 1.2e-7, name + " errors " + std::to_string(e.out) + " " + std::to_string(e.statistics));
}

const std::vector<int16_t> kEqual = {0, 16, 32, 48, 64, 80, 96}, kUnequal = {0, 3, 3, 19, 24, 25};

#ifdef NSC_WITH_KERNELS
template <class T>
T* upload(std::vector<T>& host, std::vector<std::function<void()>>& after) {
  void* device = nullptr;
  const size_t bytes = host.size() * sizeof(T);
  if (cudaMalloc(&device, bytes + 16) != cudaSuccess) std::printf("out of device memory\n"), std::exit(2);
  cudaMemcpy(device, host.data(), bytes, cudaMemcpyHostToDevice);
  after.push_back([&host, device, bytes] {
    cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost);
    cudaFree(device);
  });
  return static_cast<T*>(device);
}

template <class T>
void place(const T*& pointer, std::vector<T>& host, std::vector<std::function<void()>>& after) {
  if (pointer != nullptr) pointer = upload(host, after);
}
template <class T>
void place(T*& pointer, std::vector<T>& host, std::vector<std::function<void()>>& after) {
  if (pointer != nullptr) pointer = upload(host, after);
}

void run_kernel(Data& d, bool backward, int variant, int cluster) {
  Problem p = d.problem(backward);
  std::vector<std::function<void()>> after;
  place(p.x, backward ? d.dy : d.z, after);
  place(p.w_in, backward ? d.Bt : d.A, after);
  place(p.w_out, backward ? d.A : d.Bt, after);
  place(p.base, d.base, after);
  place(p.out, backward ? d.dz : d.y, after);
  place(p.lam, d.lam, after);
  place(p.u_out, d.u, after);
  place(p.quad, d.quad, after);
  place(p.sqnorm, d.sqnorm, after);
  place(p.u, d.u, after);
  place(p.dquad, d.dquad, after);
  place(p.dsqnorm, d.dsqnorm, after);
  place(p.z, d.z, after);
  place(p.dlam, d.dlam, after);
  place(p.parts, d.parts, after);
  place(p.counter, d.counter, after);
  launch(p, Element::bf16, backward, choose(p, Element::bf16, backward, variant, cluster), nullptr);
  const cudaError_t status = cudaDeviceSynchronize();
  expect(status == cudaSuccess, std::string("launch: ") + cudaGetErrorString(status));
  for (const auto& step : after) step();
  expect(d.counter[0] == 0, "the counter is left at zero");
}

int run_kernels() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 || !unsupported().empty()) return 0;
  int runs = 0;
  for (int v = 0; v < kVariantCount + kWarpgroupCount; ++v)
    for (int cluster : {1, 2, 4, 8})
      for (bool per_row : {false, true}) {
        const Variant& variant = v < kVariantCount ? kVariants[v] : kWarpgroupVariants[v - kVariantCount];
        if (variant.ranks < 96) continue;
        Data d(333, 776, 1032, per_row ? kUnequal : kEqual, per_row);
        for (bool backward : {false, true}) {
          run_kernel(d, backward, v, cluster);
          judge(d, backward, "kernel" + text({v, variant.ranks, variant.tokens, cluster, per_row, backward}));
          ++runs;
        }
      }
  return runs;
}
#endif

}  // namespace

int main() {
  test_parts();
  test_tiles();
  test_owners_and_choices();
#define NSC_TEST_PLAN(ranks, tokens) test_plan<ranks, tokens, false>(), test_plan<ranks, tokens, true>();
  NSC_VARIANTS(NSC_TEST_PLAN)
#define NSC_TEST_WARPGROUP_PLAN(ranks, tokens) \
  test_warpgroup_plan<ranks, tokens, false>(), test_warpgroup_plan<ranks, tokens, true>();
  NSC_WARPGROUP_VARIANTS(NSC_TEST_WARPGROUP_PLAN)
  int mirrored = 0;
  for (const Variant& v : kVariants)
    for (int cluster : {1, 2, 16})
      for (bool per_row : {false, true}) {
        Data d(70, 136, 200, v.ranks < 96 || per_row ? kUnequal : kEqual, per_row);
        for (bool backward : {false, true}) {
          mirror<Bf16>(d.problem(backward), backward, v.ranks, v.tokens, cluster);
          judge(d, backward, "mirror" + text({v.ranks, v.tokens, cluster, per_row, backward}));
          ++mirrored;
        }
      }
  std::printf("geometry checked; mirror: %d problems\n", mirrored);
#ifdef NSC_WITH_KERNELS
  if (const int runs = run_kernels())
    std::printf("kernels: %d problems on the GPU\n", runs);
  else
    std::printf("no GPU with clusters here: the kernels were compiled and not run\n");
#else
  std::printf("built without the kernels\n");
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}
