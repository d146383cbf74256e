// The kernel on the emulator, and its plain mirror, for Python through ctypes (harness.py). With NSC_WARPGROUP the kernel of
// warpgroup.inl, else that of kernel.inl.
#include "emulator_async.h"
#include "kernel.inl"
#include "step_norms.h"
#include "warpgroup.inl"

namespace nsc::cuda {
namespace {

#ifdef NSC_WARPGROUP
constexpr bool kWarpgroup = true;
constexpr auto& kFamily = kWarpgroupVariants;
#define NSC_FAMILY NSC_WARPGROUP_VARIANTS
#else
constexpr bool kWarpgroup = false;
constexpr auto& kFamily = kVariants;
#define NSC_FAMILY NSC_VARIANTS
#endif

template <class E, class P>
bool emulate_plan(const Problem& p, int cluster, Order order, Copies copies, Unit unit) {
  Machine machine(cluster, P::shared, order, copies, unit);
  const Boxes b = boxes(p, P::weight_box, P::Tokens);
  const Maps maps{b.of[0], b.of[1], b.of[2], b.of[3], b.of[4], b.of[5]};
  machine.body = [&](unsigned char* shared) {
    if constexpr (P::Warpgroup)
      merged_lora_warpgroups<E, P>(p, maps, shared);
    else
      merged_lora<E, P>(p, shared);
  };
  for (int64_t tile = 0; tile < ceil_div(p.T, P::Tokens) && !machine.failed; ++tile) {
    clear_flights();
    machine.run(int(tile));
  }
  return !machine.failed;
}

template <class E>
bool emulate(const Problem& p, bool backward, int ranks, int tokens, int cluster, Order order, Copies copies, Unit unit) {
#define NSC_EMULATE(Ranks, Tokens)                                                                       \
  if (ranks == Ranks && tokens == Tokens) {                                                              \
    if (backward)                                                                                        \
      return emulate_plan<E, Plan<Ranks, Tokens, true, kWarpgroup>>(p, cluster, order, copies, unit);                             \
    else                                                                                                 \
      return emulate_plan<E, Plan<Ranks, Tokens, false, kWarpgroup>>(p, cluster, order, copies, unit);                            \
  }
  NSC_FAMILY(NSC_EMULATE)
#undef NSC_EMULATE
  return false;
}

}  // namespace
}  // namespace nsc::cuda

using namespace nsc::cuda;

extern "C" {

int nsc_problem_bytes() { return int(sizeof(Problem)); }

// 1 if it ran to the end; 0 for a deadlock, a wrong address, or no such variant.
int nsc_emulate(const Problem* p, int element, int backward, int ranks, int tokens, int cluster, int order, int copies,
                int unit) {
  const auto run = element == int(Element::bf16) ? emulate<Bf16> : emulate<F16>;
  return run(*p, backward != 0, ranks, tokens, cluster, Order(order), Copies(copies), Unit(unit));
}

void nsc_mirror(const Problem* p, int element, int backward, int ranks, int tokens, int cluster, int unit) {
  const auto run = element == int(Element::bf16) ? mirror<Bf16> : mirror<F16>;
  run(*p, backward != 0, ranks, tokens, cluster, kWarpgroup, Unit(unit));
  if (!backward && p->x && p->sqnorm) {
    const auto add = element == int(Element::bf16) ? step_norms<Bf16> : step_norms<F16>;
    add(*p, ranks, tokens, cluster, kWarpgroup, Unit(unit));
  }
}

// [variants, 2]: ranks and tokens.
int nsc_variants(int* out) {
  int i = 0;
  for (const Variant& v : kFamily) out[2 * i] = v.ranks, out[2 * i + 1] = v.tokens, ++i;
  return i;
}

int nsc_choose_variant(int64_t T, int R, int processors) { return choose_variant(T, R, processors); }

int nsc_choose_cluster(int64_t tiles, int64_t d_in, int64_t d_out, const int* active) {
  int copy[kClusterSizes];
  for (int i = 0; i < kClusterSizes; ++i) copy[i] = active[i];
  return choose_cluster(tiles, d_in, d_out, copy);
}
}
