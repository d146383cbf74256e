#define NSC_NAMESPACE avx2
#define NSC_VECTOR_BYTES 32
#define NSC_F16C
#include "entries.inl"
