// What every processor of the architecture has.
#define NSC_NAMESPACE baseline
#define NSC_VECTOR_BYTES 16
#include "entries.inl"
