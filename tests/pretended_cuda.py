"""A pretended CUDA device: `cuda:N` tensors in host memory, for `pytest -m cuda` without a GPU.

It fills the CUDA half of a CPU build of torch: allocator, pinned memory, and one boxed kernel for
the dispatch key CUDA, which lets the CPU's kernels work on the same memory.

What a GPU would refuse is refused: operands on two devices, integer matrix products, products whose
dtypes this release of torch does not take, a generator of the host, more memory than there is
(`set_limit`). Fresh memory is NaN.

torch's 2:4 operators keep two of four values and where they stand, in a layout of our own, and
multiply by the decoded matrix. That shows how such tensors are made, refused, moved, saved and
loaded, and never a GPU's numerics or speed.

Limits: no speed, no order of sums, one stream, no NCCL, no bitsandbytes, no TF32, no fused
attention (compare with the CPU's math path), no Triton. Where torch's internals have moved
`install` raises, and a line at the end of the suite says so.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

CPP = r"""
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>
#include <map>
#include <mutex>
#include <set>

static const int DEVICES = 2;
// whether `addmm` of 16-bit matrices adds to a float32 one
static const bool MAY_BE_FLOAT = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10;
using namespace at;
using c10::DeviceIndex;
struct Memory { size_t limit = 80e9, now = 0, peak = 0; };

// never destroyed: tensors outlive them
static auto& lock = *new std::recursive_mutex;
using Guard = std::lock_guard<std::recursive_mutex>;
static auto& memory = *new std::vector<Memory>(DEVICES);
static auto& pinned = *new std::map<char*, size_t>;
static thread_local DeviceIndex current = 0;

// ---- memory of the devices, and pinned memory
struct Block {
  DeviceIndex device; size_t size; void* raw; c10::Storage held;  // its own, or a CPU's tensor's
};
static void release(void* context) {
  Guard guard(lock);
  auto* block = static_cast<Block*>(context);
  memory[block->device].now -= block->size;
  std::free(block->raw);
  delete block;
}
static DataPtr own(size_t size, DeviceIndex device, c10::Storage held = {}) {
  Guard guard(lock);
  auto& m = memory[device];
  size_t whole = (size + 511) / 512 * 512;
  TORCH_CHECK_WITH(OutOfMemoryError, m.now + whole <= m.limit, "CUDA out of memory. Tried to "
      "allocate ", whole, " bytes. GPU ", int(device), " has ", m.limit - m.now, " free.");
  m.peak = std::max(m.peak, m.now += whole);
  auto* block = new Block{device, whole, nullptr, held};
  void* data = held ? held.mutable_data() : nullptr;
  if (!held && size) data = std::memset(block->raw = std::aligned_alloc(512, whole), 0xFF, whole);
  return DataPtr(data, block, &release, Device(kCUDA, device));
}
struct Allocating final : c10::DeviceAllocator {
  DataPtr allocate(size_t size) override { return own(size, current); }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats s;
    for (auto* bytes : {&s.allocated_bytes, &s.reserved_bytes, &s.active_bytes})
      (*bytes)[0].current = memory[device].now, (*bytes)[0].peak = memory[device].peak;
    return s;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override { memory[device].peak = memory[device].now; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {memory[device].limit - memory[device].now, Memory().limit};  // a large card, in use
  }
};
static auto& allocator = *new Allocating;
struct Pinned final : c10::Allocator {
  static void unpin(void* data) {
    Guard guard(lock);
    pinned.erase((char*)data);
    std::free(data);
  }
  DataPtr allocate(size_t size) override {
    Guard guard(lock);
    size_t whole = (size + 512) / 512 * 512;
    auto* data = (char*)std::memset(std::aligned_alloc(512, whole), 0xFF, whole);
    pinned[data] = whole;
    return DataPtr(data, data, &unpin, Device(kCPU));
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
static auto& pinned_allocator = *new Pinned;
static bool is_pinned(const void* data) {
  Guard guard(lock);
  auto it = pinned.upper_bound((char*)data);
  return it != pinned.begin() && (--it, (char*)data < it->first + it->second);
}

// ---- device guard and hooks
struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  static DeviceIndex index(Device d) {
    TORCH_CHECK(d.index() < DEVICES, "CUDA error: invalid device ordinal");
    return d.index() < 0 ? current : d.index();
  }
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device d) const override {
    return Device(kCUDA, std::exchange(current, index(d)));
  }
  Device getDevice() const override { return Device(kCUDA, current); }
  void setDevice(Device d) const override { current = index(d); }
  void uncheckedSetDevice(Device d) const noexcept override { current = index(d); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, {kCUDA, index(d)}); }
  Stream exchangeStream(Stream s) const override { return s; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void synchronizeDevice(DeviceIndex) const override {}
};
namespace at {
struct PretendedHooks : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};
}

// ---- the CPU's kernels on the same memory
static Tensor over(const c10::Storage& storage, const Tensor& like, DispatchKeySet keys) {
  auto t = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(storage), keys, like.dtype());
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return t;
}
struct Aliases {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // (on CUDA, on the CPU)
  std::map<c10::StorageImpl*, c10::Storage> storages;
  DeviceIndex device = -1;

  Tensor cpu(const Tensor& t) {
    auto& storage = storages[t.storage().unsafeGetStorageImpl()];
    if (!storage)
      storage = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
          DataPtr(t.storage().mutable_data(), Device(kCPU)), c10::GetAllocator(kCPU), true);
    pairs.emplace_back(t, over(storage, t, DispatchKeySet(DispatchKey::CPU)));
    return pairs.back().second;
  }
  Tensor cuda(const Tensor& t) {  // what a CPU's kernel has returned
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& [there, alias] : pairs) if (alias.is_same(t)) return there;
    for (auto& [there, alias] : pairs)
      if (alias.storage().is_alias_of(t.storage()))
        return over(there.storage(), t, there.key_set());
    c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
        own(t.storage().nbytes(), device, t.storage()), &allocator, true);
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), DispatchKeySet(DispatchKey::CUDA), t.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return made;
  }
  void update() {  // what out= and in-place operators did to sizes and storages
    for (auto& [there, alias] : pairs) {
      if (alias.storage().data() != there.storage().data() ||
          alias.storage().nbytes() != there.storage().nbytes()) {
        auto* impl = there.storage().unsafeGetStorageImpl();
        impl->set_nbytes(alias.storage().nbytes());
        impl->set_data_ptr_noswap(own(impl->nbytes(), device, alias.storage()));
      }
      there.unsafeGetTensorImpl()->set_sizes_and_strides(
          alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }
};
static const std::set<std::string> PRODUCTS{"aten::mm", "aten::addmm", "aten::bmm", "aten::mv"};
static const std::set<std::string> NO_SCALARS{"aten::cat", "aten::index_select", "aten::gather"};

template <class F> static void change_tensors(c10::IValue& value, F&& change) {
  if (value.isTensor()) value = change(value.toTensor());
  else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& t : list) t = change(t);
    value = c10::List<Tensor>(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<Tensor>(change(*t)) : t);
    value = list;
  }
}
static void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  struct Given { Tensor tensor; bool writes, is_index; };
  auto& schema = op.schema();
  auto& operation = schema.name();
  auto count = schema.arguments().size(), begin = stack->size() - count;
  bool product = PRODUCTS.count(operation);
  Aliases aliases;
  std::vector<Given> given;
  for (size_t i = 0; i < count; i++) {
    auto value = (*stack)[begin + i];
    auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite(), is_index = value.isOptionalTensorList();
    change_tensors(value, [&](const Tensor& t) {
      if (t.defined()) given.push_back({t, writes, is_index});
      return t;
    });
    TORCH_CHECK(!value.isGenerator(), "Expected a 'cuda' device type for generator, found 'cpu'");
    if (value.isDevice() && value.toDevice().is_cuda()) {
      aliases.device = GuardImpl::index(value.toDevice());
      (*stack)[begin + i] = Device(kCPU);
    }
  }
  const char* apart = "Expected all tensors to be on the same device, but found at least two! (";
  for (auto& each : given) {
    auto& t = each.tensor;
    bool scalar = !t.dim() && !each.writes && !product && !NO_SCALARS.count(operation);
    TORCH_CHECK(!t.is_cpu() || scalar || each.is_index, apart, operation, ")");
    if (!t.is_cuda()) continue;
    TORCH_CHECK(aliases.device < 0 || aliases.device == t.device().index(), apart, operation, ")");
    TORCH_CHECK(!product || t.is_floating_point(), "not implemented for integers: ", operation);
    aliases.device = t.device().index();
  }
  if (aliases.device < 0) aliases.device = current;
  for (size_t i = 0; i < count; i++)
    change_tensors((*stack)[begin + i], [&](const Tensor& t) {
      return t.defined() && t.is_cuda() ? aliases.cpu(t) : t;
    });
  if (operation == "aten::reflection_pad1d_backward")
    globalContext().alertNotDeterministic("reflection_pad1d_backward_out_cuda");
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  aliases.update();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    change_tensors((*stack)[i], [&](const Tensor& t) { return aliases.cuda(t); });
}

// ---- what the boxed kernel can't do
static Tensor cuda_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool> pin, std::optional<MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(kCUDA, current)));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA),
      dtype.value_or(get_default_dtype_as_scalartype()), format);
}
static Tensor cuda_empty_strided(IntArrayRef size, IntArrayRef stride,
    std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
    std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kCUDA, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator,
      DispatchKeySet(DispatchKey::CUDA), dtype.value_or(get_default_dtype_as_scalartype()));
}
static Tensor& cuda_copy_(Tensor& self, const Tensor& from, bool) {
  Aliases aliases;
  auto alias = [&](const Tensor& t) {
    return t.is_cuda() ? aliases.cpu(t) : over(t.storage(), t, DispatchKeySet(DispatchKey::CPU));
  };
  at::AutoDispatchBelowADInplaceOrView below;
  alias(self).copy_(alias(from));
  return self;
}
static void check_dtypes(const Tensor& a, const Tensor& b, ScalarType dtype) {
  auto given = a.scalar_type();
  bool half = given == kHalf || given == kBFloat16;
  TORCH_CHECK(given == b.scalar_type(), "mat1 and mat2 must have the same dtype");
  TORCH_CHECK(dtype == given || (half && dtype == kFloat), "out_dtype must be the same as input "
      "dtype or fp32 for fp16/bf16 inputs");
}
static Tensor cuda_mm(const Tensor& a, const Tensor& b, ScalarType dtype) {
  check_dtypes(a, b, dtype);
  return at::mm(a.to(dtype), b.to(dtype));
}
static Tensor& cuda_addmm_out(const Tensor& self, const Tensor& a, const Tensor& b,
    ScalarType dtype, const Scalar& beta, const Scalar& alpha, Tensor& out) {
  check_dtypes(a, b, dtype);
  bool as_out = MAY_BE_FLOAT && self.scalar_type() == dtype;
  TORCH_CHECK(as_out || self.scalar_type() == b.scalar_type(), "self and mat2 must have the same "
      "dtype, but got ", self.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK(out.scalar_type() == dtype, "out_dtype must be the dtype of the out tensor");
  return at::addmm_out(out, self, a.to(dtype), b.to(dtype), beta, alpha);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(kCUDA, &allocator, 100);
  static c10::impl::DeviceGuardImplRegistrar guard(kCUDA, new GuardImpl());
  // torch has made the hooks of a build without CUDA by now: ours take their place
  new (const_cast<CUDAHooksInterface*>(&at::detail::getCUDAHooks())) PretendedHooks({});
  static auto any = torch::Library(torch::Library::IMPL, "_", DispatchKey::CUDA, __FILE__, 1);
  any.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
  static auto aten = torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, 2);
  aten.impl("empty.memory_format", TORCH_FN(cuda_empty));
  aten.impl("empty_strided", TORCH_FN(cuda_empty_strided));
  aten.impl("copy_", TORCH_FN(cuda_copy_));
  aten.impl("set_.source_Storage", TORCH_FN(at::native::set_));
  aten.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  aten.impl("resize_", TORCH_FN(at::native::resize_));
  aten.impl("mm.dtype", TORCH_FN(cuda_mm));
  aten.impl("addmm.dtype_out", TORCH_FN(cuda_addmm_out));
  module.def("set_limit", [](int device, size_t limit) { memory[device].limit = limit; });
}
"""


@cache
def install():
    """Make `cuda` the pretended device in this process, and return what controls it."""
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda or torch.version.hip:
        raise RuntimeError("this torch has a device of its own, which no other can be")
    # each release of torch has a build of its own
    digest = hashlib.sha256(f"{torch.__version__}{CPP}".encode()).hexdigest()
    name = f"pretended_cuda_{digest[:8]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    source = Path(root, name, "source.cpp")
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        source.write_text(CPP)
    flags, folder = ["-O1", "-w"], str(source.parent)
    device = cpp_extension.load(name, [str(source)], flags, build_directory=folder)
    _fill_python()
    return device


def _fill_python() -> None:
    """Point torch.cuda, whose C++ half is missing in a CPU build, to the pretended device."""
    import torch

    cuda, here, host = torch.cuda, torch.accelerator, torch.Generator()

    facts = dict(is_available=True, is_initialized=True, _is_compiled=True, _is_in_bad_fork=False)
    facts |= dict(init=None, _lazy_init=None, device_count=2, get_device_name="Pretended GPU")
    facts |= dict(get_device_capability=(9, 0), is_bf16_supported=True, set_rng_state=None)
    facts |= dict(manual_seed=None, manual_seed_all=None, get_rng_state=host.get_state())
    replaced = {name: lambda *_, value=value, **__: value for name, value in facts.items()}
    replaced |= dict(current_device=here.current_device_index, set_device=here.set_device_index)
    replaced |= dict(_exchange_device=torch._C._accelerator_exchangeDevice)
    replaced |= dict(_maybe_exchange_device=torch._C._accelerator_maybeExchangeDevice)
    replaced |= dict(mem_get_info=here.get_memory_info, synchronize=here.synchronize)
    for name in ("memory_allocated", "memory_reserved", "empty_cache"):
        replaced[name] = getattr(here, name)
    for name, replacement in replaced.items():
        for module in (cuda, cuda.memory, cuda.random):
            if module is cuda or hasattr(module, name):
                setattr(module, name, replacement)
    torch._C._cuda_getCurrentRawStream = lambda where: 0  # torch._dynamo imports it

    def clone(self):  # a CPU build makes no storages there
        if self.device.type != "cuda":
            return plain(self)
        there = torch.empty(self.nbytes(), dtype=torch.uint8, device=self.device)
        return there.copy_(torch.empty_like(there).set_(self)).untyped_storage()

    plain, torch.storage._StorageBase.clone = torch.storage._StorageBase.clone, clone
    _add_two_of_four()


def _add_two_of_four() -> None:
    """Add the operators of cuSPARSELt and CUTLASS: torch's own tensors, with their checks, use
    them."""
    import torch
    from torch.sparse import _semi_structured_conversions as conversions

    def compress(dense):  # two of each four, then where they stand: four bits of an integer
        four = dense.view(-1, 4)
        at = (four == 0).int().argsort(dim=1, stable=True)[:, :2].sort(1).values
        where = (at[:, 0] | at[:, 1] << 2).view(-1, 4)
        shifts = torch.tensor([0, 4, 8, 12]).to(dense.device)
        where = (where << shifts).sum(1).to(torch.int16)
        return torch.cat([four.gather(1, at).flatten(), where.view(dense.dtype)])

    def decoded(packed, columns):
        values, where = packed.split([packed.numel() // 9 * 8, packed.numel() // 9])
        shifts = torch.tensor([0, 4, 8, 12]).to(packed.device)
        bits = (where.view(torch.int16).int()[:, None] >> shifts).flatten()
        at = torch.stack([bits & 3, bits >> 2 & 3], 1)
        four = packed.new_zeros(len(bits), 4).scatter_(1, at.long(), values.view(-1, 2))
        return four.view(-1, columns)

    def cusparselt(packed, b, bias=None, alpha=None, out_dtype=None, transpose_result=False, *_):
        y = torch.nn.functional.linear(b.t(), decoded(packed, len(b)), bias)
        return y if transpose_result else y.t()

    def cutlass(bias, values, meta, b):
        if torch.cuda.get_device_capability()[0] != 8:
            raise RuntimeError("Supported only on GPUs with compute capability 8.x")
        dense = conversions.sparse_semi_structured_to_dense_cutlass(values, meta)
        return torch.nn.functional.linear(b.t(), dense, bias).t()

    torch.backends.cusparselt.is_available = lambda: True
    _add_two_of_four.library = library = torch.library.Library("aten", "IMPL")  # while it lives
    library.impl("_cslt_compress", compress, "CUDA")
    library.impl("_cslt_sparse_mm", cusparselt, "CUDA")
    library.impl("_sparse_semi_structured_addmm", lambda *args, **_: cutlass(*args), "CUDA")
    library.impl("_sparse_semi_structured_mm", lambda *args, **_: cutlass(None, *args), "CUDA")
