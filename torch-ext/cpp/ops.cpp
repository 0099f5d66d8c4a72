// Operations of libtorch that tch does not expose: fused AdamW, random generators, allocators.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <malloc.h>

#include "ffi.h"

namespace {
// Host memory of tensors, as malloc counts it. (The resident set size also includes gaps.)
std::atomic<int64_t> host_current{0}, host_peak{0};

void free_counted(void* data) {
  host_current -= static_cast<int64_t>(malloc_usable_size(data));
  c10::free_cpu(data);
}

struct CountingAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (data) {
      int64_t now = host_current += static_cast<int64_t>(malloc_usable_size(data));
      int64_t peak = host_peak;
      while (now > peak && !host_peak.compare_exchange_weak(peak, now)) {}
    }
    auto deleter = data ? &free_counted : &c10::detail::deleteNothing;
    return {data, data, deleter, c10::Device(c10::DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &free_counted; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
CountingAllocator counting_allocator;

c10::Device device_of(int type, int index) {
  return c10::Device(static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index));
}
std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}
} // namespace

extern "C" {

int mtx_fused_adamw(
    at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
    at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t count, double lr, double beta1,
    double beta2, double weight_decay, double eps, at::Tensor* grad_scale) {
  return mtx::guarded([&] {
    at::NoGradGuard no_grad;
    std::optional<at::Tensor> scale;
    if (grad_scale) scale = *grad_scale;
    at::_fused_adamw_(
        list(params, count), list(grads, count), list(exp_avgs, count), list(exp_avg_sqs, count),
        /*max_exp_avg_sqs=*/{}, list(steps, count), lr, beta1, beta2, weight_decay, eps,
        /*amsgrad=*/false, /*maximize=*/false, scale);
  });
}

int mtx_generator_state(int type, int index, at::Tensor** out) {
  return mtx::guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(type, index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new at::Tensor(generator.get_state());
  });
}

int mtx_set_generator_state(int type, int index, at::Tensor* state) {
  return mtx::guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(type, index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

int mtx_pinned(int64_t bytes, at::Tensor** out) {
  return mtx::guarded([&] {
    auto options = at::TensorOptions().dtype(at::kByte).pinned_memory(true);
    *out = new at::Tensor(at::empty({bytes}, options));
  });
}

int mtx_synchronize(int type, int index) {
  return mtx::guarded([&] {
    auto device = device_of(type, index);
    c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  });
}

int mtx_set_deterministic(bool deterministic) {
  return mtx::guarded([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
    context.setDeterministicCuDNN(deterministic);
    // Else new tensors are filled with NaN. No operation of ours reads what was not written.
    context.setDeterministicFillUninitializedMemory(false);
  });
}

bool mtx_uses_deterministic() { return at::globalContext().deterministicAlgorithms(); }

// Starts counting the host memory of tensors.
int mtx_count_host_memory() {
  return mtx::guarded([] { c10::SetCPUAllocator(&counting_allocator, /*priority=*/1); });
}

// Writes the current and peak bytes of tensors: on the host as counted here, else as the device's
// caching allocator counts them.
int mtx_allocator_bytes(int type, int index, int64_t* current, int64_t* peak) {
  return mtx::guarded([&] {
    auto device = device_of(type, index);
    if (device.is_cpu()) {
      *current = host_current;
      *peak = host_peak;
      return;
    }
    auto stats = at::getDeviceAllocator(device.type())->getDeviceStats(device.index());
    auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *current = stats.allocated_bytes[total].current;
    *peak = stats.allocated_bytes[total].peak;
  });
}

// Resets the peak to the current bytes.
int mtx_reset_peak(int type, int index) {
  return mtx::guarded([&] {
    auto device = device_of(type, index);
    if (device.is_cpu()) {
      host_peak = host_current.load();
      return;
    }
    at::getDeviceAllocator(device.type())->resetPeakStats(device.index());
  });
}
}
