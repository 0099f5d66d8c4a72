// Streams and events of the device of a tensor, by the guard that its backend registers with c10.
// CUDA and PrivateUse1 both do, so that no vendor headers are needed.
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "ffi.h"

namespace {
c10::impl::VirtualGuardImpl guard_of(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type());
}
} // namespace

extern "C" {

// Makes a device the current device of the calling thread.
int mtx_use_device(int type, int index) {
  return mtx::guarded([&] {
    auto device =
        c10::Device(static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index));
    guard_of(device).setDevice(device);
  });
}

int mtx_stream_current(const at::Tensor* like, c10::Stream** out) {
  return mtx::guarded([&] {
    auto device = like->device();
    *out = new c10::Stream(guard_of(device).getStream(device));
  });
}

// Returns a stream from one of the backend's pools.
int mtx_stream_from_pool(const at::Tensor* like, bool high_priority, c10::Stream** out) {
  return mtx::guarded([&] {
    auto device = like->device();
    auto stream = guard_of(device).getStreamFromGlobalPool(device, high_priority);
    *out = new c10::Stream(stream);
  });
}

int mtx_stream_make_current(const c10::Stream* stream) {
  return mtx::guarded([&] { guard_of(stream->device()).exchangeStream(*stream); });
}

// Keeps the tensor's memory, once it is freed, from reuse until the queued work of the stream is
// done.
int mtx_stream_record_tensor(const c10::Stream* stream, const at::Tensor* tensor) {
  return mtx::guarded([&] {
    const auto& storage = tensor->storage();
    if (storage.nbytes()) {
      guard_of(stream->device()).recordDataPtrOnStream(storage.data_ptr(), *stream);
    }
  });
}

int mtx_stream_handle(const c10::Stream* stream, void** out) {
  return mtx::guarded([&] { *out = guard_of(stream->device()).getStreamNativeHandle(*stream); });
}

void mtx_stream_free(c10::Stream* stream) { delete stream; }

int mtx_event_record(const c10::Stream* stream, c10::Event** out) {
  return mtx::guarded([&] {
    auto event = std::make_unique<c10::Event>(stream->device_type());
    event->record(*stream);
    *out = event.release();
  });
}

int mtx_event_block(c10::Event* event, const c10::Stream* stream) {
  return mtx::guarded([&] { event->block(*stream); });
}

int mtx_event_query(const c10::Event* event, bool* out) {
  return mtx::guarded([&] { *out = event->query(); });
}

int mtx_event_synchronize(const c10::Event* event) {
  return mtx::guarded([&] { event->synchronize(); });
}

void mtx_event_free(c10::Event* event) { delete event; }
}
