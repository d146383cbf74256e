// As AVX-512, with bfloat16 multiplied in pairs by the processor.
#define NSC_NAMESPACE avx512bf16
#define NSC_VECTOR_BYTES 64
#define NSC_DOT_ROWS 6
#define NSC_EXPAND_VECTORS 4
#define NSC_AVX512
#define NSC_AVX512_BF16
#include "kernels.inl"

namespace nsc {
extern const Isa kAvx512Bf16;
const Isa kAvx512Bf16 = {"avx512bf16",
                         [] {
                           return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                                  __builtin_cpu_supports("avx512bf16");
                         },
                         avx512bf16::most_rows, avx512bf16::rows_together, avx512bf16::scratch_bytes, avx512bf16::run};
}  // namespace nsc
