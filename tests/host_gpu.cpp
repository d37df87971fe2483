// A GPU that lives in host memory. Tensors say 'cuda'; every operator runs on the CPU, on the same bytes, through one fallback that
// refuses what a GPU refuses: tensors on two devices, a generator of the CPU. What a run on it shows is that each tensor is where it
// should be and that the code for GPUs computes what the code for CPUs does; nothing about kernels, speed or memory.
//
// tests/host_gpu.py builds it, loads it before torch, and answers for the parts of torch.cuda that a build without CUDA lacks.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>

namespace {

using at::Tensor;
const c10::Device GPU(c10::kCUDA, 0);

// One device with one stream, on which everything is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *event = nullptr; }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
[[maybe_unused]] const bool memory_is_known = (c10::SetAllocator(c10::kCUDA, &memory), true);

// The same bytes as a tensor of the other device, strides and all; it keeps the storage alive.
Tensor seen_from(c10::DeviceType device, const Tensor& t) {
  if (!t.defined() || t.device().type() == device) return t;
  const bool gpu = device == c10::kCUDA;
  const c10::Storage& storage = t.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), new c10::Storage(storage), [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                    gpu ? GPU : c10::Device(c10::kCPU));
  c10::Storage other(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), gpu ? &memory : c10::GetCPUAllocator(), true);
  const c10::DispatchKeySet keys(gpu ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
  Tensor result = at::detail::make_tensor<at::TensorImpl>(std::move(other), keys, t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

// What an operator did to the shape of an argument (out= is resized) is done to the tensor behind it.
void take_over_shape(const Tensor& original, const Tensor& alias) {
  auto* impl = original.unsafeGetTensorImpl();
  if (original.sizes() != alias.sizes()) impl->set_storage_keep_dtype(seen_from(c10::kCUDA, alias).storage());
  impl->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
}

const std::set<std::string> INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};  // by an index on the CPU too

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const size_t count = op.schema().arguments().size(), start = stack->size() - count, returned = op.schema().returns().size();
  std::vector<std::pair<Tensor, Tensor>> arguments;  // on the GPU, and the same seen from the CPU
  bool from_cpu = false;
  auto seen = [&](const Tensor& t, bool may_be_elsewhere) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      from_cpu |= t.dim() > 0 && !may_be_elsewhere;
      return t;
    }
    arguments.emplace_back(t, seen_from(c10::kCPU, t));
    return arguments.back().second;
  };
  for (size_t i = start; i < start + count; i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = seen(value.toTensor(), false);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(seen(t, false));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList()) {
        if (t.has_value()) t = seen(*t, INDEXED.count(name) > 0);
        list.push_back(t);
      }
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else {
      TORCH_CHECK(!value.isGenerator(), "host GPU: a generator of the CPU in ", name);
    }
  }
  TORCH_CHECK(!from_cpu || arguments.empty(), "host GPU: tensors on two devices in ", name, ".", op.schema().overload_name());
  op.callBoxed(stack);
  for (auto& [original, alias] : arguments)
    if (original.sizes() != alias.sizes()) take_over_shape(original, alias);
  auto back = [&](const Tensor& t) {
    for (auto& [original, alias] : arguments)
      if (alias.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return take_over_shape(original, alias), original;
    return seen_from(c10::kCUDA, t);
  };
  for (size_t i = stack->size() - returned; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(back(t));
      value = list;
    }
  }
}

// What makes tensors, moves them or changes what they are views of cannot go through the CPU.

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<at::Device>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(c10::IntArrayRef size, Dtype dtype, Layout, Where, std::optional<bool>, Format format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, Dtype dtype, Layout, Where, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
  seen_from(c10::kCPU, to).copy_(seen_from(c10::kCPU, from));
  return to;
}

Tensor as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) { return at::cpu::unfold(self, dimension, size, step); }

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, Format) {
  auto* impl = self.unsafeGetTensorImpl();
  const c10::Storage& storage = self.storage();
  const size_t bytes = (c10::multiply_integers(size) + impl->storage_offset()) * self.itemsize();
  if (bytes > storage.nbytes()) {
    c10::DataPtr data = memory.allocate(bytes);
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_part(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage storage) {
  const int64_t entries = storage.nbytes() / self.itemsize();
  return set_part(self, std::move(storage), 0, {entries}, {1});
}

at::Scalar item(const Tensor& self) { return at::_local_scalar_dense(seen_from(c10::kCPU, self)); }

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // sdp::SDPBackend::math
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("as_strided", as_strided);
  library.impl("view", [](const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); });
  library.impl("_reshape_alias", [](const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  library.impl("unfold", unfold);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_.source_Storage_storage_offset", set_part);
  library.impl("_local_scalar_dense", item);
}

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // torch looks it up by this name, once, while it is imported
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace native {
static RegisterCUDADispatch<struct _fused_sdp_choice_stub_DECLARE_DISPATCH_type> attention(_fused_sdp_choice_stub, &plain_attention);
}

}  // namespace at
