// 32 registers of 64 bytes.
#define NSC_NAMESPACE avx512
#define NSC_VECTOR_BYTES 64
#define NSC_DOT_ROWS 6
#define NSC_EXPAND_VECTORS 4
#define NSC_AVX512
#include "kernels.inl"

namespace nsc {
extern const Isa kAvx512;
const Isa kAvx512 = {"avx512",
                     [] {
                       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
                     },
                     avx512::most_rows, avx512::rows_together, avx512::scratch_bytes, avx512::run};
}  // namespace nsc
