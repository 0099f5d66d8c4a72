// c10d's stores and Gloo process group behind a C interface.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <cstring>
#include <mutex>

#include "ffi.h"
#include "gloo_device.cpp"

namespace {
using StorePtr = c10::intrusive_ptr<c10d::Store>;
using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroupGloo>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using Milliseconds = std::chrono::milliseconds;

StorePtr& store_of(void* handle) { return *static_cast<StorePtr*>(handle); }
GroupPtr& group_of(void* handle) { return *static_cast<GroupPtr*>(handle); }
WorkPtr& work_of(void* handle) { return *static_cast<WorkPtr*>(handle); }
void* boxed(WorkPtr work) { return new WorkPtr(std::move(work)); }

// Starts one operation at a time: c10d's flight recorder, which all groups of a process share, adds
// groups to a map without a lock. Started operations still run concurrently.
template <typename F>
int start(F&& body) {
  static std::mutex starting;
  std::lock_guard<std::mutex> lock(starting);
  return mtx::guarded(body);
}
} // namespace

extern "C" {

int mtx_store_connect(const char* host, uint16_t port, int64_t timeout_ms, void** out) {
  return mtx::guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.waitWorkers = false;
    options.timeout = Milliseconds(timeout_ms);
    *out = new StorePtr(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}
// Serves a store on the bound socket `fd`, which it takes over: c10d's own would listen on all
// interfaces. `host` and `port` are an address at which this process reaches the socket.
int mtx_store_serve(
    int fd, const char* host, uint16_t port, int64_t timeout_ms, void** out) {
  return mtx::guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = true;
    options.waitWorkers = false;
    options.timeout = Milliseconds(timeout_ms);
    options.masterListenFd = fd;
    *out = new StorePtr(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}
int mtx_store_prefix(void* store, const char* prefix, void** out) {
  return mtx::guarded([&] {
    *out = new StorePtr(c10::make_intrusive<c10d::PrefixStore>(prefix, store_of(store)));
  });
}
int mtx_store_port(void* store, uint16_t* out) {
  return mtx::guarded([&] {
    auto tcp = c10::dynamic_intrusive_pointer_cast<c10d::TCPStore>(store_of(store));
    TORCH_CHECK(tcp, "only a TCP store has a port");
    *out = tcp->getPort();
  });
}
int mtx_store_set(void* store, const char* key, const uint8_t* data, size_t size) {
  return mtx::guarded([&] { store_of(store)->set(key, std::vector<uint8_t>(data, data + size)); });
}
// Blocks until the key is set or the store's timeout passes. The caller frees `*data` by
// `mtx_free`.
int mtx_store_get(void* store, const char* key, uint8_t** data, size_t* size) {
  return mtx::guarded([&] {
    auto value = store_of(store)->get(key);
    *size = value.size();
    *data = static_cast<uint8_t*>(std::malloc(value.size() + 1));
    std::memcpy(*data, value.data(), value.size());
  });
}
int mtx_store_add(void* store, const char* key, int64_t amount, int64_t* out) {
  return mtx::guarded([&] { *out = store_of(store)->add(key, amount); });
}
int mtx_store_append(void* store, const char* key, const uint8_t* data, size_t size) {
  return mtx::guarded(
      [&] { store_of(store)->append(key, std::vector<uint8_t>(data, data + size)); });
}
int mtx_store_check(void* store, const char* key, bool* out) {
  return mtx::guarded([&] { *out = store_of(store)->check({key}); });
}
// Blocks until the key is set, or fails after the timeout.
int mtx_store_wait(void* store, const char* key, int64_t timeout_ms) {
  return mtx::guarded([&] { store_of(store)->wait({key}, Milliseconds(timeout_ms)); });
}
// Blocks until all keys are set, and calls `take` with the state and each value, in order.
int mtx_store_multi_get(
    void* store, const char* const* keys, size_t count,
    void (*take)(void*, const uint8_t*, size_t), void* state) {
  return mtx::guarded([&] {
    std::vector<std::string> names(keys, keys + count);
    for (auto& value : store_of(store)->multiGet(names)) take(state, value.data(), value.size());
  });
}
void mtx_store_free(void* store) { delete static_cast<StorePtr*>(store); }
void mtx_free(void* data) { std::free(data); }

int mtx_gloo_new(
    void* store, int rank, int size, int64_t timeout_ms, const MtxGlooDevice* device, void** out) {
  return mtx::guarded([&] {
    using c10d::ProcessGroupGloo;
    auto options = ProcessGroupGloo::Options::create(Milliseconds(timeout_ms));
    options->devices.push_back(make_device(*device));
    *out = new GroupPtr(
        c10::make_intrusive<ProcessGroupGloo>(store_of(store), rank, size, options));
  });
}
void mtx_gloo_free(void* group) { delete static_cast<GroupPtr*>(group); }

int mtx_gloo_all_reduce(void* group, at::Tensor* tensor, uint8_t op, void** work) {
  return start([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    *work = boxed(group_of(group)->allreduce(tensors, options));
  });
}
int mtx_gloo_broadcast(void* group, at::Tensor* tensor, int64_t root, void** work) {
  return start([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *work = boxed(group_of(group)->broadcast(tensors, options));
  });
}
int mtx_gloo_all_gather(void* group, at::Tensor* output, at::Tensor* input, void** work) {
  return start([&] { *work = boxed(group_of(group)->_allgather_base(*output, *input)); });
}
int mtx_gloo_reduce_scatter(
    void* group, at::Tensor* output, at::Tensor* input, uint8_t op, void** work) {
  return start([&] {
    c10d::ReduceScatterOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    *work = boxed(group_of(group)->_reduce_scatter_base(*output, *input, options));
  });
}
int mtx_gloo_all_to_all(
    void* group, at::Tensor* output, at::Tensor* input, const int64_t* output_splits,
    const int64_t* input_splits, size_t count, void** work) {
  return start([&] {
    std::vector<int64_t> out(output_splits, output_splits + count);
    std::vector<int64_t> in(input_splits, input_splits + count);
    *work = boxed(group_of(group)->alltoall_base(*output, *input, out, in));
  });
}
int mtx_gloo_send(void* group, at::Tensor* tensor, int to, int tag, void** work) {
  return start([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *work = boxed(group_of(group)->send(tensors, to, tag));
  });
}
int mtx_gloo_recv(void* group, at::Tensor* tensor, int from, int tag, void** work) {
  return start([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *work = boxed(group_of(group)->recv(tensors, from, tag));
  });
}
int mtx_gloo_barrier(void* group, void** work) {
  return start([&] { *work = boxed(group_of(group)->barrier()); });
}

int mtx_work_is_completed(void* work, bool* out) {
  return mtx::guarded([&] { *out = work_of(work)->isCompleted(); });
}
// With a zero timeout, the operation's own timeout applies.
int mtx_work_wait(void* work, int64_t timeout_ms) {
  return mtx::guarded([&] {
    work_of(work)->wait(timeout_ms ? Milliseconds(timeout_ms) : kNoTimeout);
  });
}
int mtx_work_abort(void* work) {
  return mtx::guarded([&] { work_of(work)->abort(); });
}
void mtx_work_free(void* work) { delete static_cast<WorkPtr*>(work); }
}
