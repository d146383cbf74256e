// torch's view of the CUDA kernels: nsc::cuda_forward and nsc::cuda_backward (schemas: nsc_kernels/backends/cuda.py).
// Outputs and workspace come from Python; here they are checked and handed to the launch on the current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

#ifndef NSC_CUDA_SOURCE
#error "NSC_CUDA_SOURCE: the digest of csrc/cuda, from CMakeLists.txt"
#endif

namespace nsc::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Element element_of(ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "A must be bfloat16 or float16");
  return type == ScalarType::BFloat16 ? Element::bf16 : Element::f16;
}

// What every tensor of a call shares.
struct Call {
  int device;
  ScalarType type;

  void on_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, " must be on the device of A");
  }

  // Rows of 16-byte pieces.
  const half_bits* matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) const {
    on_device(name, t);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                    columns, "]");
    STD_TORCH_CHECK(t.scalar_type() == type, name, " must have the dtype of A");
    STD_TORCH_CHECK(t.stride(1) == 1, name, " must have contiguous rows");
    STD_TORCH_CHECK(rows <= 1 || t.stride(0) % kChunk == 0, name, " must have a row stride that is a multiple of ", kChunk);
    const auto data = t.data_ptr();
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must start at a multiple of 16 bytes");
    return static_cast<const half_bits*>(data);
  }

  template <class T>
  T* contiguous(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType expected) const {
    on_device(name, t);
    bool same = t.dim() == int64_t(shape.size());
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == shape.begin()[i];
    STD_TORCH_CHECK(same, name, " has the wrong shape");
    STD_TORCH_CHECK(t.scalar_type() == expected, name, " has the wrong dtype");
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    return static_cast<T*>(t.data_ptr());
  }
};

constexpr auto kFloat = ScalarType::Float;

// The part of a problem that both directions have; x, w_in and w_out as this direction sees them.
Problem common(const Call& call, int64_t T, const Tensor& w_in, const Tensor& w_out, const std::vector<int64_t>& offsets,
               const Tensor& lam) {
  Problem p{};
  STD_TORCH_CHECK(w_in.dim() == 2 && w_out.dim() == 2, "A and Bt must be matrices");
  const int64_t K = int64_t(offsets.size()) - 1, R = w_in.size(0);
  STD_TORCH_CHECK(K >= 1 && K <= kMostAdapters, "between 1 and ", kMostAdapters, " adapters, found ", K);
  STD_TORCH_CHECK(R <= kMostRank, "the ranks add up to ", R, ", more than ", kMostRank);
  STD_TORCH_CHECK(offsets.front() == 0 && offsets.back() == R, "offsets must rise from 0 to ", R);
  for (int64_t k = 0; k <= K; ++k) {
    STD_TORCH_CHECK(k == 0 || offsets[k - 1] <= offsets[k], "offsets must not fall");
    p.offsets[k] = int16_t(offsets[k]);
  }
  p.T = T;
  p.R = int32_t(R);
  p.K = int32_t(K);
  p.d_in = w_in.size(1);
  p.d_out = w_out.size(1);
  STD_TORCH_CHECK(p.d_in > 0 && p.d_in % kChunk == 0 && p.d_out > 0 && p.d_out % kChunk == 0,
                  "d must be a positive multiple of ", kChunk, ", found ", p.d_in, " and ", p.d_out);
  p.w_in = call.matrix("A or Bt", w_in, R, p.d_in);
  p.w_out = call.matrix("A or Bt", w_out, R, p.d_out);
  STD_TORCH_CHECK(w_in.is_contiguous() && w_out.is_contiguous(), "A and Bt must be contiguous");
  p.lam_per_row = lam.dim() == 2;
  p.lam = p.lam_per_row ? call.contiguous<float>("lam", lam, {T, K}, kFloat) : call.contiguous<float>("lam", lam, {K}, kFloat);
  return p;
}

void run(const Problem& p, const Call& call, bool backward, int64_t variant, int64_t cluster) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream));
  const Element element = element_of(call.type);
  launch(p, element, backward, choose(p, element, backward, int(variant), int(cluster)), stream);
}

void forward(const Tensor& z, const Tensor& A, const Tensor& Bt, std::vector<int64_t> offsets, const Tensor& lam,
             std::optional<Tensor> base, const Tensor& y, std::optional<Tensor> quad, std::optional<Tensor> sqnorm,
             std::optional<Tensor> u, int64_t variant, int64_t cluster) {
  const Call call{A.get_device_index(), A.scalar_type()};
  STD_TORCH_CHECK(z.dim() == 2, "z must be [T, d_in]");
  STD_TORCH_CHECK(quad.has_value() == sqnorm.has_value(), "quad and sqnorm come together");
  Problem p = common(call, z.size(0), A, Bt, offsets, lam);
  p.x = call.matrix("z", z, p.T, p.d_in);
  p.x_stride = z.stride(0);
  p.out = const_cast<half_bits*>(call.matrix("y", y, p.T, p.d_out));
  p.out_stride = y.stride(0);
  if (base) p.base = call.matrix("base", *base, p.T, p.d_out), p.base_stride = base->stride(0);
  if (quad) {
    p.quad = call.contiguous<float>("quad", *quad, {p.T, p.K}, kFloat);
    p.sqnorm = call.contiguous<float>("sqnorm", *sqnorm, {p.T}, kFloat);
  }
  if (u) p.u_out = call.contiguous<half_bits>("u", *u, {p.T, p.R}, call.type);
  if (p.T == 0) return;
  const DeviceGuard guard(call.device);
  run(p, call, false, variant, cluster);
}

void backward(std::optional<Tensor> dy, std::optional<Tensor> dquad, std::optional<Tensor> dsqnorm, const Tensor& u,
              std::optional<Tensor> z, const Tensor& A, const Tensor& Bt, std::vector<int64_t> offsets,
              const Tensor& lam, std::optional<Tensor> dz_base, std::optional<Tensor> dz, std::optional<Tensor> dlam,
              std::optional<Tensor> parts, std::optional<Tensor> counter, int64_t variant, int64_t cluster) {
  const Call call{A.get_device_index(), A.scalar_type()};
  STD_TORCH_CHECK(u.dim() == 2, "u must be [T, R]");
  Problem p = common(call, u.size(0), Bt, A, offsets, lam);
  p.u = call.contiguous<half_bits>("u", u, {p.T, p.R}, call.type);
  if (dy) p.x = call.matrix("dy", *dy, p.T, p.d_in), p.x_stride = dy->stride(0);
  if (dz) {
    p.out = const_cast<half_bits*>(call.matrix("dz", *dz, p.T, p.d_out));
    p.out_stride = dz->stride(0);
    if (dz_base) p.base = call.matrix("dz_base", *dz_base, p.T, p.d_out), p.base_stride = dz_base->stride(0);
    if (dquad) p.dquad = call.contiguous<float>("dquad", *dquad, {p.T, p.K}, kFloat);
    if (dsqnorm) {
      STD_TORCH_CHECK(z.has_value(), "z is needed where dsqnorm is given");
      p.dsqnorm = call.contiguous<float>("dsqnorm", *dsqnorm, {p.T}, kFloat);
      p.z = call.matrix("z", *z, p.T, p.d_out);
      p.z_stride = z->stride(0);
    }
  }
  if (dlam) {
    p.dlam = p.lam_per_row ? call.contiguous<float>("dlam", *dlam, {p.T, p.K}, kFloat)
                           : call.contiguous<float>("dlam", *dlam, {p.K}, kFloat);
    if (!p.lam_per_row) {
      STD_TORCH_CHECK(parts.has_value() && counter.has_value(), "parts and counter are needed for dlam of shape [K]");
      // A tile has at least 64 tokens.
      p.parts = call.contiguous<float>("parts", *parts, {p.K * ceil_div(p.T, 64)}, kFloat);
      call.on_device("counter", *counter);
      STD_TORCH_CHECK(counter->scalar_type() == ScalarType::Int && counter->numel() >= 1, "counter must be int32");
      p.counter = static_cast<uint32_t*>(counter->data_ptr());
    }
  }
  if (p.T == 0 || (!dz && !dlam)) return;
  const DeviceGuard guard(call.device);
  run(p, call, true, variant, cluster);
}

}  // namespace
}  // namespace nsc::cuda

STABLE_TORCH_LIBRARY_IMPL(nsc, CUDA, m) {
  m.impl("cuda_forward", TORCH_BOX(&nsc::cuda::forward));
  m.impl("cuda_backward", TORCH_BOX(&nsc::cuda::backward));
}

// For Python through ctypes.
extern "C" {
// The digest of the sources that this library was built from.
__attribute__((visibility("default"))) const char* nsc_cuda_source() { return NSC_CUDA_SOURCE; }

// Why the kernels do not run on a device, empty if they do.
__attribute__((visibility("default"))) const char* nsc_cuda_unsupported(int device) {
  static thread_local std::string reason;
  try {
    const torch::stable::accelerator::DeviceGuard guard(device);
    reason = nsc::cuda::unsupported();
  } catch (const std::exception& error) {  // which a caller in C could not catch
    reason = error.what();
  }
  return reason.c_str();
}
}
