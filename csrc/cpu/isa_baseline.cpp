// What every processor of the architecture has.
#define NSC_NAMESPACE baseline
#define NSC_VECTOR_BYTES 16
#define NSC_DOT_ROWS 2
#define NSC_EXPAND_VECTORS 2
#include "kernels.inl"

namespace nsc {
extern const Isa kBaseline;
const Isa kBaseline = {"baseline", [] { return true; }, baseline::most_rows, baseline::rows_together, baseline::scratch_bytes, baseline::run};
}  // namespace nsc
