// Facts of the device, the choice of a variant and a cluster, and the launch.
#include "launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace nsc::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error of ours must not surface in somebody else's next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

int current_device() {
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

std::pair<int, int> compute_capability(int device) {
  int major, minor;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return {major, minor};
}

// Bytes of shared memory that a block can have.
int shared_limit(int device) {
  int bytes;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

bool is_warpgroup(int variant) { return variant >= kVariantCount; }

const Variant& variant_of(int variant) {
  if (variant < 0 || variant >= kVariantCount + kWarpgroupCount)
    throw std::runtime_error("there is no variant " + std::to_string(variant));
  return is_warpgroup(variant) ? kWarpgroupVariants[variant - kVariantCount] : kVariants[variant];
}

const Kernel& kernel_of(Element element, bool backward, int variant) {
  if (is_warpgroup(variant)) {
    const Kernel* table = element == Element::bf16 ? (backward ? bf16_backward_warpgroup() : bf16_forward_warpgroup())
                                                   : (backward ? f16_backward_warpgroup() : f16_forward_warpgroup());
    return table[variant - kVariantCount];
  }
  const Kernel* table = element == Element::bf16 ? (backward ? bf16_backward() : bf16_forward())
                                                 : (backward ? f16_backward() : f16_forward());
  return table[variant];
}

// The driver's encoder, found through the runtime: nothing here links to libcuda.
using Encoder = decltype(&cuTensorMapEncodeTiled);
Encoder encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encoder>(function);
  }();
  return found;
}

// wgmma is an instruction of compute capability 9.0 only, in code built for 9.0a; elsewhere those kernels are empty.
bool has_warpgroups([[maybe_unused]] int device) {
#ifdef NSC_SM90A
  return compute_capability(device) == std::make_pair(9, 0);
#else
  return false;
#endif
}

// Maps as the kernels of warpgroup.inl take them (struct Maps there). One that is not there is never used.
struct TensorMaps {
  CUtensorMap of[6];
};

TensorMaps tensor_maps(const Problem& p, Element element, const Variant& variant) {
  TensorMaps maps{};
  const Boxes all = boxes(p, weight_box(variant.ranks), variant.tokens);
  for (int i = 0; i < 6; ++i) {
    const Box& box = all.of[i];
    if (box.data == nullptr) continue;
    if (box.rows == 0 || (box.stride < box.columns && box.rows > 1))
      throw std::runtime_error("the variants with tensor maps need ranks that are not all 0 and rows that do not overlap");
    const cuuint64_t extent[2] = {cuuint64_t(box.columns), cuuint64_t(box.rows)};
    // A single row may come with any stride, which is then not looked at.
    const cuuint64_t stride = 2 * cuuint64_t(box.rows > 1 ? box.stride : box.columns);
    const cuuint32_t size[2] = {kColumns, cuuint32_t(box.box_rows)}, steps[2] = {1, 1};
    const CUresult result = encoder()(
        &maps.of[i], element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<half_bits*>(box.data), extent, &stride, size, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
      throw std::runtime_error("cuTensorMapEncodeTiled failed with code " + std::to_string(int(result)));
  }
  return maps;
}

// The launch of `blocks` blocks in clusters of `cluster`.
struct Configuration {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Configuration(const Kernel& kernel, int64_t blocks, int cluster, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kernel.shared;
    config.stream = stream;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;
};

// A kernel on a device, made ready: how many clusters of 1, 2, 4, 8 and 16 blocks run there at a time.
struct Ready {
  int processors;
  int active[kClusterSizes];
};

Ready prepare(const Kernel& kernel, int device) {
  Ready ready{};
  check(cudaDeviceGetAttribute(&ready.processors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  const int limit = shared_limit(device);
  if (kernel.shared > limit)
    throw std::runtime_error("the kernel needs " + std::to_string(kernel.shared) +
                             " bytes of shared memory per block, the device has " + std::to_string(limit));
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared),
        "cudaFuncSetAttribute(shared memory)");
  // Clusters of 16 are allowed per kernel; where the device has none the count below stays 0.
  const bool large = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  if (!large) cudaGetLastError();
  for (int i = 0; i < kClusterSizes; ++i) {
    const int cluster = 1 << i;
    if (cluster > 8 && !large) continue;
    const Configuration launch(kernel, cluster, cluster, nullptr);
    if (cudaOccupancyMaxActiveClusters(&ready.active[i], kernel.function, &launch.config) != cudaSuccess) {
      cudaGetLastError();
      ready.active[i] = 0;
    }
  }
  if (ready.active[0] <= 0) throw std::runtime_error("no block of the kernel fits a processor of this device");
  return ready;
}

const Ready& ready(Element element, bool backward, int variant, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, bool, int, int>, Ready> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(int(element), backward, variant, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, prepare(kernel_of(element, backward, variant), device)).first->second;
}

}  // namespace

std::string unsupported() {
  const int device = current_device();
  const auto [major, minor] = compute_capability(device);
  const std::string capability = "compute capability " + std::to_string(major) + "." + std::to_string(minor);
  if (major < 9) return capability + " has no thread block clusters, 9.0 or newer is needed";
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel_of(Element::bf16, false, 0).function);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return "libnsc_cuda holds no code for " + capability + " (TORCH_CUDA_ARCH_LIST adds it when building)";
  }
  check(status, "cudaFuncGetAttributes");
  int needed = 0;
  const int count = kVariantCount + (has_warpgroups(device) ? kWarpgroupCount : 0);
  for (int variant = 0; variant < count; ++variant)
    for (const bool backward : {false, true})
      needed = std::max(needed, kernel_of(Element::bf16, backward, variant).shared);
  const int limit = shared_limit(device);
  if (needed > limit)
    return "the kernels need up to " + std::to_string(needed) + " bytes of shared memory per block, the device has " +
           std::to_string(limit);
  return "";
}

Choice choose(const Problem& p, Element element, bool backward, int variant, int cluster) {
  const int device = current_device();
  Choice choice;
  choice.variant = variant;
  if (variant < 0) {
    int processors;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    choice.variant = choose_variant(p.T, p.R, processors);
    if (has_warpgroups(device)) choice.variant = with_warpgroups(choice.variant, p.R);
  }
  if (choice.variant < 0) throw std::runtime_error("the ranks add up to more than " + std::to_string(kMostRank));
  choice.tiles = ceil_div(p.T, variant_of(choice.variant).tokens);
  const Ready& facts = ready(element, backward, choice.variant, device);
  choice.cluster = cluster > 0 ? cluster : choose_cluster(choice.tiles, p.d_in, p.d_out, facts.active);
  return choice;
}

void launch(const Problem& p, Element element, bool backward, const Choice& choice, void* stream) {
  const Variant& variant = variant_of(choice.variant);
  const Kernel& kernel = kernel_of(element, backward, choice.variant);
  if (variant.ranks < p.R) throw std::runtime_error("a variant of fewer ranks than the problem has");
  if (choice.tiles * choice.cluster > INT32_MAX) throw std::runtime_error("more thread blocks than a grid can have");
  const Configuration launch(kernel, choice.tiles * choice.cluster, choice.cluster, static_cast<cudaStream_t>(stream));
  TensorMaps maps;
  if (is_warpgroup(choice.variant)) {
    if (!has_warpgroups(current_device()))
      throw std::runtime_error("the variants with wgmma run on compute capability 9.0, built for 9.0a");
    maps = tensor_maps(p, element, variant);
  }
  void* arguments[] = {const_cast<Problem*>(&p), &maps};
  check(cudaLaunchKernelExC(&launch.config, kernel.function, arguments), "launch of the merged LoRA kernel");
}

}  // namespace nsc::cuda
