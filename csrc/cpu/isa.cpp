// Which instruction set to use.
#include <cstring>

#include "problem.h"

namespace nsc {

#if defined(NSC_HAS_AMX)
extern const Isa kAmx;
#endif
#if defined(__x86_64__)
extern const Isa kAvx512Bf16, kAvx512, kAvx2;
#endif
extern const Isa kBaseline;

const Isa* const* isas(int* count) {
  static const Isa* const all[] = {
#if defined(NSC_HAS_AMX)
      &kAmx,
#endif
#if defined(__x86_64__)
      &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
      &kBaseline,
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Isa* select_isa(const char* force) {
  int count;
  const Isa* const* all = isas(&count);
  for (int i = 0; i < count; ++i) {
    const bool wanted = force == nullptr || *force == '\0' || std::strcmp(force, all[i]->name) == 0;
    if (wanted && all[i]->supported()) return all[i];
  }
  return nullptr;
}

}  // namespace nsc
