// As AVX-512 with bfloat16, and its products of many rows on the matrix unit.
#define NSC_NAMESPACE amx
#define NSC_VECTOR_BYTES 64
#define NSC_DOT_ROWS 6
#define NSC_EXPAND_VECTORS 4
#define NSC_AVX512
#define NSC_AVX512_BF16
#define NSC_AMX
#include "kernels.inl"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace nsc {
extern const Isa kAvx512Bf16, kAmx;

// Linux saves a matrix unit's registers only for processes that asked for it.
static bool permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Isa kAmx = {"amx",
                  [] {
                    unsigned a, b, c, d = 0;
                    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
                    if (!kAvx512Bf16.supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
                    return (d & kBf16) != 0 && (d & kTile) != 0 && permitted();
                  },
                  amx::most_rows, amx::rows_together, amx::scratch_bytes, amx::run};
}  // namespace nsc
