// A stand-in for libtorch_npu.so: the device `npu` behind PrivateUse1, on the stand-in's AscendCL.
// Every operator runs the CPU's kernel on the same memory, after everything that is queued on the
// current stream. Like the hardware it refuses tensors of other devices. Memory is freed in the
// order of the stream that used it.
//
// With MOERUN_STANDIN_COUNTS=FOLDER each process counts launches, copies and waits of the host, in
// forward and in backward, in a file of that folder: 64-bit numbers in the order of `Count`. With
// MOERUN_STANDIN_USES=FOLDER it lists there the operators in the order of their first uses, and the
// first communicator.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>

#include "acl.h"

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
constexpr auto NPU = DeviceType::PrivateUse1;

void check(aclError error) {
  TORCH_CHECK(error == 0, "AscendCL: error ", error, ": ", aclGetRecentErrMsg());
}

// ---- Counts
enum Count {
  LAUNCHES,        // Operators and copies within the device.
  QUEUED_COPIES,   // Copies from or to pinned memory that the host does not wait for.
  COPIES_IN,       // Copies to the device for which the host waits.
  COPIES_OUT,      // Copies to the host, and scalars, for which it waits.
  OTHER_WAITS,     // Waits for a stream, an event or the device.
  OTHER_DEVICES,   // Uses of a device that is not the process's.
  NUM_COUNTS,
};
using Counts = std::atomic<uint64_t>[2][NUM_COUNTS];  // Outside of backward, in backward.

Counts& counts() {
  static Counts& all = []() -> Counts& {
    static Counts unread;
    const char* folder = std::getenv("MOERUN_STANDIN_COUNTS");
    if (!folder) return unread;
    // A process may end without destructors, so it counts in the file itself.
    auto path = std::string(folder) + "/" + std::to_string(getpid());
    int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
    TORCH_CHECK(file >= 0 && ftruncate(file, sizeof(Counts)) == 0, path, ": cannot be written");
    void* data = mmap(nullptr, sizeof(Counts), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    TORCH_CHECK(data != MAP_FAILED, path, ": cannot be mapped");
    close(file);
    return *static_cast<Counts*>(data);
  }();
  return all;
}
void count(Count what) {
  bool in_backward = torch::autograd::get_current_graph_task_id() != -1;
  counts()[in_backward][what]++;
}

// ---- Streams
aclrtStream default_stream() {
  static aclrtStream stream = [] {
    aclrtStream made;
    check(aclrtCreateStream(&made));
    return made;
  }();
  return stream;
}
thread_local aclrtStream current = nullptr;
aclrtStream current_stream() { return current ? current : default_stream(); }
aclrtStream raw(c10::Stream stream) {
  return stream.id() == 0 ? default_stream()
                          : reinterpret_cast<aclrtStream>(static_cast<intptr_t>(stream.id()));
}
c10::Stream wrapped(aclrtStream stream, DeviceIndex index) {
  auto id = stream == default_stream()
                ? 0
                : static_cast<c10::StreamId>(reinterpret_cast<intptr_t>(stream));
  return c10::Stream(c10::Stream::UNSAFE, Device(NPU, index), id);
}
DeviceIndex current_index() {
  int32_t index;
  check(aclrtGetDevice(&index));
  return static_cast<DeviceIndex>(index);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return NPU; }
  Device getDevice() const override { return Device(NPU, current_index()); }
  void setDevice(Device device) const override { check(aclrtSetDevice(device.index())); }
  void uncheckedSetDevice(Device device) const noexcept override { aclrtSetDevice(device.index()); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override {
    uint32_t count = 0;
    aclrtGetDeviceCount(&count);
    return static_cast<DeviceIndex>(count);
  }
  c10::Stream getStream(Device device) const override {
    return wrapped(current_stream(), device.index());
  }
  c10::Stream getDefaultStream(Device device) const override {
    return wrapped(default_stream(), device.index());
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    aclrtStream made;
    check(aclrtCreateStream(&made));
    return wrapped(made, device.index());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current = raw(stream);
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return raw(stream); }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    if (event) aclrtDestroyEvent(event);
  }
  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) check(aclrtCreateEvent(event));
    check(aclrtRecordEvent(*event, raw(stream)));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) check(aclrtStreamWaitEvent(raw(stream), event));
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    aclrtEventRecordedStatus status;
    check(aclrtQueryEventStatus(event, &status));
    return status == ACL_EVENT_RECORDED_STATUS_COMPLETE;
  }
  void synchronizeEvent(void* event) const override {
    count(OTHER_WAITS);
    if (event) check(aclrtSynchronizeEvent(event));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    count(OTHER_WAITS);
    check(aclrtSynchronizeStream(raw(stream)));
  }
  void synchronizeDevice(DeviceIndex) const override {
    count(OTHER_WAITS);
    check(aclrtSynchronizeStream(default_stream()));
    if (current) check(aclrtSynchronizeStream(current));
  }
};

// ---- Memory
struct Allocator final : c10::DeviceAllocator {
  std::mutex mutex;
  std::unordered_map<void*, size_t> sizes;
  c10::CachingDeviceAllocator::DeviceStats stats;

  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      check(aclrtMalloc(&data, bytes, ACL_MEM_MALLOC_HUGE_FIRST));
      // Poison: a read of memory that was never written yields NaN.
      std::memset(data, 0xff, bytes);
      std::lock_guard<std::mutex> lock(mutex);
      sizes[data] = bytes;
      stats.allocated_bytes[0].increase(bytes);
    }
    return {data, data, &release, Device(NPU, current_index())};
  }
  static void release(void* data);
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const at::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override {
    std::lock_guard<std::mutex> lock(mutex);
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override { stats.allocated_bytes[0].reset_accumulated(); }
  void resetPeakStats(DeviceIndex) override {
    std::lock_guard<std::mutex> lock(mutex);
    stats.allocated_bytes[0].reset_peak();
  }
};
Allocator& allocator() {
  static auto* one = new Allocator;
  return *one;
}
void Allocator::release(void* data) {
  if (!data) return;
  auto& self = allocator();
  size_t bytes;
  {
    std::lock_guard<std::mutex> lock(self.mutex);
    bytes = self.sizes[data];
    self.stats.allocated_bytes[0].decrease(bytes);
    self.sizes.erase(data);
  }
  standin::enqueue(current_stream(), [data, bytes](const standin::GivenUp&) {
    // Poison: a read after free yields NaN.
    std::memset(data, 0xff, bytes);
    aclrtFree(data);
  });
}

// Host memory that claims to be pinned.
struct Pinned final : c10::Allocator {
  std::mutex mutex;
  std::set<const void*> all;
  at::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    all.insert(data);
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data);
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Pinned& pinned() {
  static auto* one = new Pinned;
  return *one;
}
void Pinned::release(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned().mutex);
    pinned().all.erase(data);
  }
  c10::free_cpu(data);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned().mutex);
    return pinned().all.count(data) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned(); }
  DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  DeviceIndex getCurrentDevice() const override { return current_index(); }
  void setCurrentDevice(DeviceIndex index) const override { Guard().setDevice(Device(NPU, index)); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = allocator().allocate(bytes);
    check(aclrtSynchronizeStream(current_stream()));
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---- Kernels
at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// Returns a CPU tensor that aliases an NPU tensor's memory.
at::Tensor on_host(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  at::DataPtr data(const_cast<void*>(storage.data()), Device(DeviceType::CPU));
  auto alias = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data),
      c10::GetAllocator(DeviceType::CPU), /*resizable=*/true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(alias)), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  if (tensor.is_conj()) made._set_conj(true);
  return made;
}

// libtorch waits for a copy unless it was told not to and the host's memory is pinned.
Count kind_of_copy(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.is_privateuseone() && to.is_privateuseone()) return LAUNCHES;
  const auto& host = from.is_privateuseone() ? to : from;
  if (non_blocking && host.is_pinned()) return QUEUED_COPIES;
  return from.is_privateuseone() ? COPIES_OUT : COPIES_IN;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  count(kind_of_copy(from, to, non_blocking));
  // Copies within the device are kernels, others of CUDA's driver.
  if (from.is_privateuseone() && to.is_privateuseone())
    standin::note_use(std::string("copy ") + c10::toString(from.scalar_type()) + " " +
                      c10::toString(to.scalar_type()));
  check(aclrtSynchronizeStream(current_stream()));
  auto source = from.is_privateuseone() ? on_host(from) : from;
  auto target = to.is_privateuseone() ? on_host(to) : to;
  target.copy_(source);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
const at::Tensor& resize_npu(const at::Tensor& self, at::IntArrayRef size,
                             std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto needed = static_cast<size_t>(impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (needed > self.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}
at::Scalar local_scalar(const at::Tensor& self) {
  count(COPIES_OUT);
  check(aclrtSynchronizeStream(current_stream()));
  return at::_local_scalar_dense(on_host(self));
}
int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                         bool) {
  return 0;  // SDPBackend::math
}

// Replaces NPU tensors by CPU aliases, and remembers the pairs.
struct Replaced {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // NPU, CPU

  at::Tensor replace(const at::Tensor& tensor, const c10::OperatorHandle& op) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      TORCH_CHECK(tensor.dim() == 0 && tensor.device().is_cpu(),
                  "Expected all tensors to be on the same device, but ", op.schema().name(),
                  " got one on ", tensor.device(), " next to npu");
      return tensor;
    }
    for (auto& [npu, cpu] : pairs)
      if (npu.is_same(tensor)) return cpu;
    pairs.emplace_back(tensor, on_host(tensor));
    return pairs.back().second;
  }

  // Applies an operator's resizes of the CPU aliases to the NPU tensors.
  void bring_back() {
    for (auto& [npu, cpu] : pairs) {
      if (npu.sizes() != cpu.sizes()) npu.resize_(cpu.sizes());
      if (npu.storage().data() != cpu.storage().data() && cpu.storage().nbytes() > 0)
        std::memcpy(npu.storage().mutable_data(), cpu.storage().data(),
                    std::min(npu.storage().nbytes(), cpu.storage().nbytes()));
    }
  }

  at::Tensor give(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (auto& [npu, cpu] : pairs)
      if (cpu.is_same(result)) return npu;
    for (auto& [npu, cpu] : pairs)
      if (result.has_storage() && result.storage().data() &&
          result.storage().data() == npu.storage().data())
        return npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
    auto moved = empty_strided(result.sizes(), result.strides(), result.scalar_type(), {}, {}, {});
    on_host(moved).copy_(result);
    return moved;
  }
};

// True for operators whose result's size depends on values, for which the host waits.
bool waits_for_values(const c10::OperatorHandle& op) {
  static const std::set<std::string> names = {"aten::nonzero", "aten::masked_select",
                                              "aten::bincount", "aten::_unique2"};
  return names.count(op.schema().name()) > 0;
}

// Returns an operator with the dtypes of its tensors: libtorch has a kernel for each.
std::string kernel_name(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::string name = c10::toString(op.operator_name());
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); i++)
    if (stack[i].isTensor() && stack[i].toTensor().defined())
      name += std::string(" ") + c10::toString(stack[i].toTensor().scalar_type());
  return name;
}

// True for operators that return another view of the same memory, without a kernel.
bool is_view(const c10::OperatorHandle& op) {
  const auto& returns = op.schema().returns();
  return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  count(LAUNCHES);
  standin::load(op.schema().name() + "." + op.schema().overload_name());
  if (!is_view(op)) standin::note_use(kernel_name(op, *stack));
  if (waits_for_values(op)) count(COPIES_OUT);
  check(aclrtSynchronizeStream(current_stream()));
  auto arguments = op.schema().arguments().size();
  auto begin = stack->size() - arguments;
  Replaced replaced;
  bool any = false;
  for (size_t i = begin; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      any |= value.toTensor().defined();
      value = replaced.replace(value.toTensor(), op);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        any = true;
        list.push_back(replaced.replace(tensor, op));
      }
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(replaced.replace(*tensor, op))
                              : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    }
  }
  TORCH_CHECK(any, op.schema().name(), " has no kernel for npu");
  op.callBoxed(stack);
  replaced.bring_back();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = replaced.give(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(replaced.give(tensor));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", TORCH_FN(resize_npu));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  m.impl("_fused_sdp_choice", TORCH_FN(fused_sdp_choice));
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

c10::impl::DeviceGuardImplRegistrar guard(NPU, new Guard);
}  // namespace

void standin::count_other_device() { count(OTHER_DEVICES); }

namespace torch_npu {
// The signatures of init_npu.h.
__attribute__((visibility("default"))) void init_npu(const c10::DeviceIndex index) {
  static std::once_flag once;
  std::call_once(once, [] {
    c10::register_privateuse1_backend("npu");
    c10::SetAllocator(NPU, &allocator());
    at::RegisterPrivateUse1HooksInterface(new Hooks);
  });
  check(aclrtSetDevice(index));
}
}  // namespace torch_npu
