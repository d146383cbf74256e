// 16 registers of 32 bytes: a 2 x 4 shrink tile and a 6 x 2 expand tile leave none to spill. A 2 x 4 tile of dot
// products reads as much as it multiplies; for more than a few rows the expand tile does both steps.
#define NSC_NAMESPACE avx2
#define NSC_VECTOR_BYTES 32
#define NSC_DOT_ROWS 2
#define NSC_EXPAND_VECTORS 2
#define NSC_F16C
#define NSC_PACKED_SHRINK
#include "kernels.inl"

namespace nsc {
extern const Isa kAvx2;
const Isa kAvx2 = {
    "avx2",
    [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
    avx2::most_rows, avx2::rows_together, avx2::scratch_bytes, avx2::run};
}  // namespace nsc
