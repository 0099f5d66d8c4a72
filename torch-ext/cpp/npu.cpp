// Maps MPS to PrivateUse1, so that tch can create tensors on a device that it cannot name. tch
// reads an unknown device as MPS and requests MPS tensors for it. If a PrivateUse1 backend is
// loaded, MPS, which is macOS's, cannot be. Then a request for an MPS tensor creates a tensor of
// that backend.
#include <ATen/Functions.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "ffi.h"

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

Device to_private_use1(Device device) { return Device(DeviceType::PrivateUse1, device.index()); }
Device to_mps(Device device) { return Device(DeviceType::MPS, device.index()); }
c10::impl::VirtualGuardImpl backend() {
  return c10::impl::VirtualGuardImpl(DeviceType::PrivateUse1);
}

// Forwards queries and changes of the current device to the backend.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::MPS; }
  Device exchangeDevice(Device device) const override {
    return to_mps(backend().exchangeDevice(to_private_use1(device)));
  }
  Device getDevice() const override { return to_mps(backend().getDevice()); }
  void setDevice(Device device) const override { backend().setDevice(to_private_use1(device)); }
  void uncheckedSetDevice(Device device) const noexcept override {
    backend().uncheckedSetDevice(to_private_use1(device));
  }
  c10::Stream getStream(Device device) const override {
    auto stream = backend().getStream(to_private_use1(device));
    return c10::Stream(c10::Stream::UNSAFE, to_mps(stream.device()), stream.id());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto device = to_private_use1(stream.device());
    auto before =
        backend().exchangeStream(c10::Stream(c10::Stream::UNSAFE, device, stream.id()));
    return c10::Stream(c10::Stream::UNSAFE, to_mps(before.device()), before.id());
  }
  DeviceIndex deviceCount() const noexcept override { return backend().deviceCount(); }
};

at::TensorOptions options(
    std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pin) {
  auto index = device && device->has_index() ? device->index() : backend().getDevice().index();
  return at::TensorOptions()
      .dtype(dtype)
      .layout(layout)
      .device(Device(DeviceType::PrivateUse1, index))
      .pinned_memory(pin);
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pin,
    std::optional<at::MemoryFormat> format) {
  return at::empty(size, options(dtype, layout, device, pin), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device> device, std::optional<bool> pin) {
  return at::empty_strided(size, stride, options(dtype, layout, device, pin));
}
} // namespace

extern "C" {

// Call once per process, after the backend is loaded.
int mtx_serve_as_mps() {
  return mtx::guarded([] {
    static c10::impl::DeviceGuardImplRegistrar guard(DeviceType::MPS, new Guard);
    static torch::Library kernels(
        torch::Library::IMPL, "aten", c10::DispatchKey::MPS, __FILE__, __LINE__);
    kernels.impl("empty.memory_format", TORCH_FN(empty));
    kernels.impl("empty_strided", TORCH_FN(empty_strided));
  });
}

// Writes the number of devices of the PrivateUse1 backend to `out`.
int mtx_private_device_count(int* out) {
  return mtx::guarded([&] { *out = backend().deviceCount(); });
}
}
