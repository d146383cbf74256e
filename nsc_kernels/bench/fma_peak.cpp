// The rate at which one core of this processor multiplies and adds with nothing to load: what no kernel can exceed.
// Prints one JSON object, GFLOP/s by operand type. Built and run by operator_cpu.py with -march=native.
#include <algorithm>
#include <chrono>
#include <cstdio>

#define REGISTERS "0,1,2,3,4,5,6,7,8,9,10,11"
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
// Twelve independent sums cover the latency of two units. The operands are zero: no subnormals arise.
#define TWELVE(instruction, kind)                                                                \
  asm volatile(".irp n, " REGISTERS "\n" instruction " %%" kind "15, %%" kind "15, %%" kind "\\n\n.endr" ::: CLOBBERS)
#define CLEAR()                                                                                                    \
  asm volatile("vpxor %%xmm15, %%xmm15, %%xmm15\n.irp n, " REGISTERS "\nvpxor %%xmm15, %%xmm15, %%xmm\\n\n.endr" ::: CLOBBERS, \
               "xmm15")

namespace {

constexpr long kSteps = 4'000'000;

// Best of several runs: anything else on the core only slows it down.
template <class F>
double gflops(double flops_per_instruction, F step) {
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (long i = 0; i < kSteps; ++i) step();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, 12e-9 * kSteps * flops_per_instruction / elapsed.count());
  }
  return best;
}

}  // namespace

int main() {
  CLEAR();
  double float32 = gflops(16, [] { TWELVE("vfmadd231ps", "ymm"); });
#if defined(__AVX512F__)
  float32 = std::max(float32, gflops(32, [] { TWELVE("vfmadd231ps", "zmm"); }));
#endif
  std::printf("{\"float32\": %.1f", float32);
#if defined(__AVX512BF16__)
  std::printf(", \"bfloat16\": %.1f", gflops(64, [] { TWELVE("vdpbf16ps", "zmm"); }));
#endif
  std::printf("}\n");
}
