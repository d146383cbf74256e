// A stand-in for two CUDA devices, for a torch without CUDA: tensors that are "on cuda:0" lie in the host's memory, and
// the CPU's kernels compute them. What is CUDA's own is what this is for: which tensors may meet in an operation, which
// generators belong to which device, and where results are.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Generator.h>
#include <torch/library.h>

#include <cstring>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Stream;

namespace {

constexpr DeviceIndex COUNT = 2;
thread_local DeviceIndex current = 0;

Device gpu(DeviceIndex index) { return Device(at::kCUDA, index < 0 ? current : index); }

// The memory of a tensor on the CPU, as a device's own.
c10::DataPtr moved(const Tensor& cpu, Device device) {
  auto drop = [](void* held) { delete static_cast<Tensor*>(held); };
  return c10::DataPtr(cpu.storage().mutable_data(), new Tensor(cpu), drop, device);
}

Tensor bytes(int64_t count) { return at::detail::empty_cpu({count}, at::TensorOptions().dtype(at::kByte)); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t count) override { return moved(bytes(int64_t(count)), gpu(-1)); }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  Device getDevice() const override { return gpu(-1); }
  void setDevice(Device device) const override { current = gpu(device.index()).index(); }
  void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  // Everything has happened when a call returns.
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Generator final : c10::GeneratorImpl {
  at::Generator cpu = at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val);

  explicit Generator(DeviceIndex index) : GeneratorImpl(gpu(index), DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offset"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offset"); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->cpu = cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator(DeviceIndex index) {
  static at::Generator all[COUNT] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return all[gpu(index).index()];
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return COUNT; }
  DeviceIndex deviceCount() const override { return COUNT; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override { return at::make_generator<Generator>(index); }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize(DeviceIndex) const override {}
};

// Operations that take tensors of several devices on a GPU, too.
const std::set<std::string> MIXING = {"aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"};

// Another tensor over a storage.
Tensor over(c10::Storage storage, const Tensor& like, DispatchKey key) {
  auto found = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  auto* impl = found.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sym_sizes(), like.sym_strides(), like.sym_storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return found;
}

c10::Storage storage_of(const Tensor& cpu, Device device) {
  c10::Storage::use_byte_size_t in_bytes;
  return c10::Storage(in_bytes, cpu.storage().nbytes(), moved(cpu, device), &allocator, true);
}

// A tensor of a device as the CPU sees it. An empty one may be written into after it was given room.
Tensor on_cpu(const Tensor& given) {
  auto storage = given.storage();
  if (storage.nbytes() == 0) {
    return over(bytes(0).storage(), given, DispatchKey::CPU);
  }
  c10::Storage::use_byte_size_t in_bytes;
  c10::DataPtr data(storage.mutable_data(), Device(at::kCPU));
  return over(c10::Storage(in_bytes, storage.nbytes(), std::move(data), nullptr, false), given, DispatchKey::CPU);
}

struct Seen {
  Tensor given, cpu;
  void* data;
};

struct Call {
  const std::string name;
  std::vector<Seen> seen;
  std::optional<Device> device, asked;
  bool has_others = false;

  Tensor taken(const Tensor& given) {
    if (!given.defined() || !given.is_cuda()) {
      has_others |= given.defined() && given.is_cpu() && given.dim() > 0;
      return given;
    }
    if (!device) device = given.device();
    has_others |= *device != given.device();
    for (auto& one : seen) {
      if (one.given.is_same(given)) return one.cpu;
    }
    auto cpu = on_cpu(given);
    seen.push_back({given, cpu, cpu.storage().mutable_data()});
    return cpu;
  }

  void check() const {
    TORCH_CHECK(!(device && has_others) || MIXING.count(name), name,
                ": expected all tensors to be on the same device, found some on ", *device, " and some elsewhere");
  }

  // What an operation wrote into, or made room for, and the shape that it gave to what it was handed.
  void put_back() {
    for (auto& one : seen) {
      auto *impl = one.given.unsafeGetTensorImpl(), *after = one.cpu.unsafeGetTensorImpl();
      if (one.cpu.storage().mutable_data() != one.data) {
        impl->set_storage_keep_dtype(storage_of(one.cpu.detach(), one.given.device()));
      }
      impl->set_sizes_and_strides(after->sym_sizes(), after->sym_strides(), after->sym_storage_offset());
    }
  }

  Tensor returned(const Tensor& found) {
    for (auto& one : seen) {
      if (one.cpu.is_same(found)) return one.given;
    }
    Device target = asked ? *asked : device ? *device : gpu(-1);
    if (!found.defined() || !found.is_cpu() || !target.is_cuda() || name == "aten::copy_") return found;
    for (auto& one : seen) {
      if (one.data && one.data == found.storage().mutable_data()) return over(one.given.storage(), found, DispatchKey::CUDA);
    }
    return over(storage_of(found, target), found, DispatchKey::CUDA);
  }
};

template <class Change> IValue changed(const IValue& value, Change change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> all;
    for (auto& one : value.toTensorVector()) all.push_back(change(one));
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> all;
    for (std::optional<Tensor> one : value.toOptionalTensorList()) {
      all.push_back(one ? std::optional<Tensor>(change(*one)) : std::nullopt);
    }
    return all;
  }
  return value;
}

void compute(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  Call call{op.schema().name()};
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    auto& argument = const_cast<IValue&>(value);
    if (argument.isDevice()) {
      auto device = argument.toDevice();
      call.asked = device.is_cuda() ? gpu(device.index()) : device;
      argument = Device(at::kCPU);
    } else if (argument.isGenerator()) {
      auto generator = argument.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), call.name, ": expected a generator on a GPU, found one on the CPU");
      argument = generator.get<Generator>()->cpu;
    } else {
      argument = changed(argument, [&](const Tensor& one) { return call.taken(one); });
    }
  }
  call.check();
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  call.put_back();
  for (auto& value : torch::jit::last(*stack, op.schema().returns().size())) {
    auto& result = const_cast<IValue&>(value);
    result = changed(result, [&](const Tensor& one) { return call.returned(one); });
  }
}

// These change what a tensor lies in, which the CPU cannot do for it.
const Tensor& resize_(const Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* storage = self.storage().unsafeGetStorageImpl();
  size_t needed = (c10::multiply_integers(sizes) + self.storage_offset()) * self.itemsize();
  if (storage->nbytes() < needed) {
    auto room = bytes(int64_t(needed));
    if (storage->nbytes()) std::memcpy(room.mutable_data_ptr(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(moved(room, self.device()));
    storage->set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  TORCH_CHECK(storage.device() == self.device(), "set_: expected memory of ", self.device(), ", found ", storage.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_sizes_contiguous(sizes);
  impl->set_sizes_and_strides(sizes, strides.size() == sizes.size() ? strides : impl->strides().vec(), offset);
  return self;
}

Tensor& set_to_storage(Tensor& self, at::Storage storage) {
  return set_(self, storage, 0, {int64_t(storage.nbytes() / self.itemsize())}, {1});
}

Tensor& set_to_tensor(Tensor& self, const Tensor& other) {
  return set_(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

}  // namespace

namespace at {
using TwoGpus = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, TwoGpus)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&compute>());
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_);
  library.impl("set_.source_Storage", set_to_storage);
  library.impl("set_.source_Tensor", set_to_tensor);
}

extern "C" {
int current_gpu() { return current; }
void set_current_gpu(int index) { current = DeviceIndex(index); }
PyObject* generator_of_gpu(int index) { return THPGenerator_Wrap(default_generator(DeviceIndex(index))); }
}
