// The entries of low-rank updates for Python, which calls these through ctypes (nsc_kernels/entries.py).
#include "entries.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "problem.h"

namespace nsc {

#if defined(__x86_64__)
namespace avx512 {
extern const EntriesKernels kEntries;
}
namespace avx2 {
extern const EntriesKernels kEntries;
}
#endif
namespace baseline {
extern const EntriesKernels kEntries;
}

namespace {

const EntriesKernels& kernels() {
  static const EntriesKernels& chosen = []() -> const EntriesKernels& {
    const Isa* isa = select_isa(std::getenv("NSC_CPU_ISA"));
    if (isa == nullptr) throw std::runtime_error("NSC_CPU_ISA: this processor has no such instruction set");
#if defined(__x86_64__)
    const std::string name = isa->name;
    if (name == "avx512bf16" || name == "avx512") return avx512::kEntries;
    if (name == "avx2") return avx2::kEntries;
#endif
    return baseline::kEntries;
  }();
  return chosen;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

void run(const Entries& e) {
  const bool upper = e.work == Work::upper_counts, counts = upper || e.work == Work::lower_counts;
  const int64_t bins = upper ? kUpperBins + kZeroBins : kLowerBins, strips = (e.rows + kStripRows - 1) / kStripRows;
  const int64_t sums = e.sums == nullptr ? 0 : e.work == Work::elect ? 2 : 2 * e.tasks;
  std::vector<double> partial(strips * sums);
  std::mutex merging;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, (kernels().scratch_bytes(e) + 63) / 64 * 64));
    if (scratch == nullptr) throw std::bad_alloc();
    std::vector<uint32_t> table(counts ? e.tasks * bins : 0);
    for (int64_t strip = begin; strip < end; ++strip)
      kernels().run(e, strip, scratch.get(), table.data(), partial.data() + strip * sums);
    if (!counts) return;
    const std::lock_guard<std::mutex> lock(merging);
    for (int64_t k = 0; k < e.tasks; ++k)
      for (int64_t i = 0; i < bins; ++i)
        e.counts[upper ? k * (kUpperBins + 1) + std::min(i, kUpperBins) : k * bins + i] += table[k * bins + i];
  });
  for (int64_t i = 0; i < strips * sums; ++i) e.sums[i % sums] += partial[i];
}

// What went wrong, of this thread's last call; null if nothing.
template <class F>
const char* reported(F f) {
  thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace nsc

extern "C" __attribute__((visibility("default"))) const char* nsc_cpu_entries(const nsc::Entries* e) {
  return nsc::reported([&] { nsc::run(*e); });
}

extern "C" __attribute__((visibility("default"))) const char* nsc_cpu_draw(int64_t key, int64_t threshold, int64_t rows,
                                                                          int64_t columns, bool* kept) {
  return nsc::reported([&] { nsc::kernels().draw(key, threshold, rows, columns, kept); });
}
