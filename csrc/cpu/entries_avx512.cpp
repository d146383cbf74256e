// Also where there is AVX512-BF16: all entries are float32.
#define NSC_NAMESPACE avx512
#define NSC_VECTOR_BYTES 64
#define NSC_AVX512
#include "entries.inl"
