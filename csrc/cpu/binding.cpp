// torch's view of the CPU kernels: nsc::cpu_forward and nsc::cpu_backward (schemas: nsc_kernels/backends/cpu.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace nsc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Isa& isa() {
  static const Isa* const chosen = select_isa(std::getenv("NSC_CPU_ISA"));
  STD_TORCH_CHECK(chosen != nullptr, "NSC_CPU_ISA=", std::getenv("NSC_CPU_ISA"),
                  ": expected one of amx, avx512bf16, avx512, avx2, baseline that this processor supports");
  return *chosen;
}

// Kept between calls: a fresh buffer of this size would be paid for in page faults every time.
void* thread_scratch(int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = bytes;
  }
  return buffer.data;
}

int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float16();
  }
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    default:
      STD_TORCH_CHECK(false, "z must be float64, float32, bfloat16 or float16");
  }
}

ScalarType acc_type(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// The C shim allocates directly; torch::stable::empty takes a turn through the dispatcher, three times the cost.
Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(sizes.begin()[1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype_code(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// What was not asked for comes back empty.
Tensor allocate_if(bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) {
  return wanted ? allocate(sizes, type) : allocate({0}, type);
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                  columns, "]");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, name, " must have contiguous rows");
}

void check_contiguous(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// The factors, offsets and lam, which both directions have.
struct Shapes {
  int64_t T, R, K, d_in, d_out;
  ScalarType type, acc;
};

Shapes check_common(int64_t T, const Tensor& A, const Tensor& Bt, const std::vector<int64_t>& offsets,
                    const Tensor& lam) {
  STD_TORCH_CHECK(A.dim() == 2 && Bt.dim() == 2, "A and Bt must be matrices");
  Shapes s{T, A.size(0), int64_t(offsets.size()) - 1, A.size(1), Bt.size(1), A.scalar_type(),
           acc_type(A.scalar_type())};
  STD_TORCH_CHECK(s.d_in > 0 && s.d_out > 0, "A and Bt must have columns");
  check_matrix("Bt", Bt, s.R, s.d_out, s.type);
  check_contiguous("A", A);
  check_contiguous("Bt", Bt);
  STD_TORCH_CHECK(s.K >= 1 && offsets.front() == 0 && offsets.back() == s.R, "offsets must rise from 0 to ", s.R);
  for (int64_t k = 0; k < s.K; ++k) STD_TORCH_CHECK(offsets[k] <= offsets[k + 1], "offsets must not fall");
  const bool shared = lam.dim() == 1 && lam.size(0) == s.K;
  const bool per_row = lam.dim() == 2 && lam.size(0) == T && lam.size(1) == s.K;
  STD_TORCH_CHECK(shared || per_row, "lam must have shape [", s.K, "] or [", T, ", ", s.K, "]");
  STD_TORCH_CHECK(lam.scalar_type() == s.acc, "lam must be float32, or float64 for float64 z");
  check_contiguous("lam", lam);
  return s;
}

Problem common(const Shapes& s, const std::vector<int64_t>& offsets, const Tensor& lam) {
  Problem p{};
  p.element = element_of(s.type);
  p.T = s.T;
  p.R = s.R;
  p.K = s.K;
  p.offsets = offsets.data();
  p.lam = lam.data_ptr();
  p.lam_per_row = lam.dim() == 2;
  return p;
}

// Blocks are large enough to reuse the weights they stream, and small enough for every thread to have some.
void run(const Problem& p) {
  if (p.T == 0) return;
  const int64_t most_rows = isa().most_rows(p);
  constexpr double kWorthAThread = 1e6;  // multiply-adds: tens of microseconds, several times the cost of a wake-up
  const double work = double(p.T) * double(p.R) * double((p.x ? p.d_in : 0) + (p.out ? p.d_out : 0));
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(),
                                                                 int64_t(work / kWorthAThread)));
  const int64_t most = std::min(most_rows, (granules(p.T) + threads - 1) / threads * kGranule);
  const int64_t together = isa().rows_together(p);
  int64_t blocks = (p.T + most - 1) / most;
  int64_t rows = (granules(p.T) + blocks - 1) / blocks * kGranule;
  if (rows > together) rows = (rows + together - 1) / together * together;
  blocks = (p.T + rows - 1) / rows;
  const int64_t bytes = isa().scratch_bytes(p, rows);
  auto work_on = [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(bytes);
    for (int64_t b = begin; b < end; ++b) isa().run(p, b * rows, std::min(p.T, (b + 1) * rows), scratch);
  };
  if (threads == 1)
    work_on(0, blocks);
  else
    torch::stable::parallel_for(0, blocks, 1, work_on);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_forward(const Tensor& z, const Tensor& A, const Tensor& Bt,
                                                       std::vector<int64_t> offsets, const Tensor& lam,
                                                       std::optional<Tensor> base, bool stats, bool save_u) {
  STD_TORCH_CHECK(z.dim() == 2, "z must be [T, d_in]");
  const Shapes s = check_common(z.size(0), A, Bt, offsets, lam);
  check_matrix("z", z, s.T, s.d_in, s.type);
  if (base) check_matrix("base", *base, s.T, s.d_out, s.type);

  Tensor y = allocate({s.T, s.d_out}, s.type);
  Tensor quad = allocate_if(stats, {s.T, s.K}, s.acc);
  Tensor sqnorm = allocate_if(stats, {s.T}, s.acc);
  Tensor u = allocate_if(save_u, {s.T, s.R}, s.type);

  Problem p = common(s, offsets, lam);
  p.d_in = s.d_in;
  p.d_out = s.d_out;
  p.x = z.data_ptr();
  p.x_stride = z.stride(0);
  p.w_in = A.data_ptr();
  p.w_out = Bt.data_ptr();
  if (base) p.base = base->data_ptr(), p.base_stride = base->stride(0);
  p.out = y.data_ptr();
  if (save_u) p.u_out = u.data_ptr();
  if (stats) p.quad = quad.data_ptr(), p.sqnorm = sqnorm.data_ptr();
  run(p);
  return {y, quad, sqnorm, u};
}

// Granules in order, in double: the same bits at any number of threads.
template <class Acc>
void sum_granules(const void* partial, int64_t rows, int64_t K, void* total) {
  std::vector<double> sum(K, 0.0);
  for (int64_t g = 0; g < rows; ++g)
    for (int64_t k = 0; k < K; ++k) sum[k] += static_cast<const Acc*>(partial)[g * K + k];
  for (int64_t k = 0; k < K; ++k) static_cast<Acc*>(total)[k] = Acc(sum[k]);
}

std::tuple<Tensor, Tensor> cpu_backward(std::optional<Tensor> dy, std::optional<Tensor> dquad,
                                        std::optional<Tensor> dsqnorm, const Tensor& u, std::optional<Tensor> z,
                                        const Tensor& A, const Tensor& Bt, std::vector<int64_t> offsets,
                                        const Tensor& lam, std::optional<Tensor> dz_base, bool need_dz,
                                        bool need_dlam) {
  STD_TORCH_CHECK(u.dim() == 2, "u must be [T, R]");
  const Shapes s = check_common(u.size(0), A, Bt, offsets, lam);
  check_matrix("u", u, s.T, s.R, s.type);
  check_contiguous("u", u);
  if (dy) check_matrix("dy", *dy, s.T, s.d_out, s.type);
  if (dz_base) check_matrix("dz_base", *dz_base, s.T, s.d_in, s.type);
  if (dquad) {
    check_matrix("dquad", *dquad, s.T, s.K, s.acc);
    check_contiguous("dquad", *dquad);
  }
  if (dsqnorm) {
    STD_TORCH_CHECK(dsqnorm->dim() == 1 && dsqnorm->size(0) == s.T && dsqnorm->scalar_type() == s.acc,
                    "dsqnorm must have shape [", s.T, "] and the dtype of lam");
    check_contiguous("dsqnorm", *dsqnorm);
    STD_TORCH_CHECK(z.has_value(), "z is needed where dsqnorm is given");
    check_matrix("z", *z, s.T, s.d_in, s.type);
  }

  Tensor dz = need_dz ? allocate({s.T, s.d_in}, s.type) : allocate({0}, s.type);
  const bool per_row = lam.dim() == 2;
  Tensor dlam = !need_dlam ? allocate({0}, s.acc) : per_row ? allocate({s.T, s.K}, s.acc) : allocate({s.K}, s.acc);
  Tensor partial = allocate_if(need_dlam && !per_row, {granules(s.T), s.K}, s.acc);

  Problem p = common(s, offsets, lam);
  p.backward = true;
  p.d_in = s.d_out;
  p.d_out = s.d_in;
  if (dy) p.x = dy->data_ptr(), p.x_stride = dy->stride(0);
  p.w_in = Bt.data_ptr();
  p.w_out = A.data_ptr();
  if (need_dz) {
    p.out = dz.data_ptr();
    if (dz_base) p.base = dz_base->data_ptr(), p.base_stride = dz_base->stride(0);
    if (dsqnorm) p.dsqnorm = dsqnorm->data_ptr(), p.z = z->data_ptr(), p.z_stride = z->stride(0);
  }
  p.u = u.data_ptr();
  if (dquad) p.dquad = dquad->data_ptr();
  if (need_dlam) p.dlam = per_row ? dlam.data_ptr() : partial.data_ptr();
  run(p);
  if (need_dlam && !per_row) {
    if (s.acc == ScalarType::Double)
      sum_granules<double>(partial.data_ptr(), granules(s.T), s.K, dlam.data_ptr());
    else
      sum_granules<float>(partial.data_ptr(), granules(s.T), s.K, dlam.data_ptr());
  }
  return {dz, dlam};
}

}  // namespace
}  // namespace nsc

STABLE_TORCH_LIBRARY_IMPL(nsc, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&nsc::cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&nsc::cpu_backward));
}

// For Python through ctypes: the instruction sets this processor can run, best first, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* nsc_cpu_isas() {
  static const std::string names = [] {
    int count;
    const nsc::Isa* const* all = nsc::isas(&count);
    std::string joined;
    for (int i = 0; i < count; ++i)
      if (all[i]->supported()) joined += (joined.empty() ? "" : " ") + std::string(all[i]->name);
    return joined;
  }();
  return names.c_str();
}
