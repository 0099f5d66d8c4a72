// HCCL in host memory, over Gloo. Signatures and numbers are those of hccl.h and hccl_types.h.
// Combinations that they declare unsupported are refused.
#define USE_C10D_GLOO
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>

#include "acl.h"

namespace {
using Code = int;  // HcclResult
constexpr Code SUCCESS = 0, E_PARA = 1, E_INTERNAL = 4, E_NOT_SUPPORT = 5;
constexpr size_t ROOT_INFO_BYTES = 4108;
constexpr auto TIMEOUT = std::chrono::seconds(600);

struct Comm {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
  int rank, size;
  std::atomic<int> failure{0};
};

template <typename F>
Code guarded(F&& body) {
  try {
    return body();
  } catch (const std::exception& e) {
    standin::remember(e.what());
    return E_INTERNAL;
  }
}

at::ScalarType type_of(int type) {
  switch (type) {
    case 0:
      return at::kChar;
    case 1:
      return at::kShort;
    case 2:
      return at::kInt;
    case 3:
      return at::kHalf;
    case 4:
      return at::kFloat;
    case 5:
      return at::kLong;
    case 7:
      return at::kByte;
    case 10:
      return at::kDouble;
    case 11:
      return at::kBFloat16;
    default:
      TORCH_CHECK(false, "there is no data type ", type);
  }
}

bool reduces(int type, bool scatters) {
  bool both = type == 0 || type == 2 || type == 3 || type == 4 || type == 11;
  return both || (type == 1 && !scatters);
}

at::Tensor view(const void* data, uint64_t count, int type) {
  return at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(count)},
                       at::TensorOptions().dtype(type_of(type)));
}

at::Tensor combine(const at::Tensor& parts, int op) {
  switch (op) {
    case 0:
      return parts.sum(0, false, parts.scalar_type());
    case 2:
      return parts.amax(0);
    case 3:
      return parts.amin(0);
    default:
      TORCH_CHECK(false, "there is no reduction ", op);
  }
}

std::mutex starting;  // c10d's flight recorder is not safe when two groups start at once.

// Queues an operation that waits for other ranks. It uses separate memory, and `finish` copies the
// result to the device's memory unless the stream was aborted meanwhile: as on the hardware,
// nothing is written after an abort.
void queue(Comm* comm, aclrtStream stream, std::function<c10::intrusive_ptr<c10d::Work>()> start,
           std::function<void()> finish) {
  standin::enqueue(stream, [=](const standin::GivenUp& given_up) {
    struct Outcome {
      std::atomic<bool> ended{false};
      std::atomic<bool> failed{false};
    };
    auto outcome = std::make_shared<Outcome>();
    c10::intrusive_ptr<c10d::Work> work;
    try {
      std::lock_guard<std::mutex> lock(starting);
      work = start();
    } catch (const std::exception&) {
      comm->failure = E_INTERNAL;
      return;
    }
    std::thread([work, outcome] {
      try {
        work->wait(TIMEOUT);
      } catch (const std::exception&) {
        outcome->failed = true;
      }
      outcome->ended = true;
    }).detach();
    while (!outcome->ended) {
      if (given_up()) return;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    if (outcome->failed) {
      comm->failure = E_INTERNAL;
      return;
    }
    finish();
  });
}

// Several messages at once, in separate memory.
struct Waiting : c10d::Work {
  std::vector<c10::intrusive_ptr<c10d::Work>> all;
  bool wait(std::chrono::milliseconds timeout) override {
    for (auto& work : all) work->wait(timeout);
    return true;
  }
};

struct Item {
  int direction;  // HCCL_SEND is 0, HCCL_RECV 1
  void* data;
  uint64_t count;
  int type;
  uint32_t peer;
};

Code messages(Comm* comm, aclrtStream stream, std::vector<Item> items) {
  auto copies = std::make_shared<std::vector<at::Tensor>>();
  auto start = [=] {
    auto all = c10::make_intrusive<Waiting>();
    for (auto& item : items) copies->push_back(view(item.data, item.count, item.type).clone());
    for (size_t i = 0; i < items.size(); i++) {
      std::vector<at::Tensor> one{copies->at(i)};
      int peer = static_cast<int>(items[i].peer);
      all->all.push_back(items[i].direction == 0 ? comm->group->send(one, peer, 0)
                                                 : comm->group->recv(one, peer, 0));
    }
    return c10::intrusive_ptr<c10d::Work>(all);
  };
  auto finish = [=] {
    for (size_t i = 0; i < items.size(); i++)
      if (items[i].direction == 1)
        view(items[i].data, items[i].count, items[i].type).copy_(copies->at(i));
  };
  queue(comm, stream, start, finish);
  return SUCCESS;
}

// Gathers `own` of every rank on every rank: `[size, count]`.
c10::intrusive_ptr<c10d::Work> to_all(Comm* comm, at::Tensor& all, const at::Tensor& own) {
  auto input = own.view({1, -1}).expand({comm->size, own.numel()}).contiguous();
  std::vector<int64_t> none;
  return comm->group->alltoall_base(all, input, none, none);
}

Comm* comm_of(void* handle) { return static_cast<Comm*>(handle); }
}  // namespace

extern "C" {
Code HcclSetConfig(int, int32_t) { return SUCCESS; }

Code HcclGetRootInfo(char* info) {
  return guarded([&] {
    // Ranks meet in a file in their working folder. c10d's TCP store would look up host names.
    std::string path = (std::filesystem::current_path() / "hccl-XXXXXX").string();
    int file = mkstemp(path.data());
    TORCH_CHECK(file >= 0 && path.size() < ROOT_INFO_BYTES, "no place for a file like ", path);
    close(file);
    std::memset(info, 0, ROOT_INFO_BYTES);
    std::memcpy(info, path.data(), path.size());
    return SUCCESS;
  });
}

Code HcclCommInitRootInfo(uint32_t size, const char* info, uint32_t rank, void** out) {
  if (rank >= size) return E_PARA;
  standin::note_use("communicator");
  return guarded([&] {
    auto store = c10::make_intrusive<c10d::FileStore>(info, static_cast<int>(size));
    store->setTimeout(TIMEOUT);
    auto gloo = c10d::ProcessGroupGloo::Options::create(TIMEOUT);
    gloo->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1", false));
    auto group = c10::make_intrusive<c10d::ProcessGroupGloo>(store, static_cast<int>(rank),
                                                             static_cast<int>(size), gloo);
    auto* comm = new Comm;
    comm->group = group;
    comm->rank = static_cast<int>(rank);
    comm->size = static_cast<int>(size);
    *out = comm;
    return SUCCESS;
  });
}

Code HcclGetCommAsyncError(void* comm, Code* error) {
  *error = comm_of(comm)->failure;
  return SUCCESS;
}

const char* HcclGetErrorString(Code code) {
  switch (code) {
    case E_PARA:
      return "parameter error";
    case E_INTERNAL:
      return "internal error";
    case E_NOT_SUPPORT:
      return "not support feature";
    default:
      return "error";
  }
}

Code HcclAllReduce(void* send, void* receive, uint64_t count, int type, int op, void* handle,
                   aclrtStream stream) {
  if (!reduces(type, false)) return E_NOT_SUPPORT;
  auto* comm = comm_of(handle);
  auto all = std::make_shared<at::Tensor>();
  auto start = [=] {
    *all = at::empty({comm->size, static_cast<int64_t>(count)},
                     at::TensorOptions().dtype(type_of(type)));
    return to_all(comm, *all, view(send, count, type));
  };
  queue(comm, stream, start, [=] { view(receive, count, type).copy_(combine(*all, op)); });
  return SUCCESS;
}

Code HcclReduceScatter(void* send, void* receive, uint64_t count, int type, int op, void* handle,
                       aclrtStream stream) {
  if (!reduces(type, true)) return E_NOT_SUPPORT;
  auto* comm = comm_of(handle);
  auto parts = std::make_shared<at::Tensor>();
  auto start = [=] {
    auto input = view(send, count * comm->size, type)
                     .clone()
                     .view({comm->size, static_cast<int64_t>(count)});
    *parts = at::empty_like(input);
    std::vector<int64_t> none;
    return comm->group->alltoall_base(*parts, input, none, none);
  };
  queue(comm, stream, start, [=] { view(receive, count, type).copy_(combine(*parts, op)); });
  return SUCCESS;
}

Code HcclAllGather(void* send, void* receive, uint64_t count, int type, void* handle,
                   aclrtStream stream) {
  auto* comm = comm_of(handle);
  auto all = std::make_shared<at::Tensor>();
  auto start = [=] {
    *all = at::empty({comm->size, static_cast<int64_t>(count)},
                     at::TensorOptions().dtype(type_of(type)));
    return to_all(comm, *all, view(send, count, type));
  };
  queue(comm, stream, start,
        [=] { view(receive, count * comm->size, type).copy_(all->view({-1})); });
  return SUCCESS;
}

Code HcclBroadcast(void* data, uint64_t count, int type, uint32_t root, void* handle,
                   aclrtStream stream) {
  auto* comm = comm_of(handle);
  auto copy = std::make_shared<at::Tensor>();
  auto start = [=] {
    *copy = view(data, count, type).clone();
    std::vector<at::Tensor> one{*copy};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return comm->group->broadcast(one, options);
  };
  queue(comm, stream, start, [=] { view(data, count, type).copy_(*copy); });
  return SUCCESS;
}

Code HcclAlltoAllV(const void* send, const uint64_t* send_counts, const uint64_t* send_at,
                   int send_type, const void* receive, const uint64_t* receive_counts,
                   const uint64_t* receive_at, int receive_type, void* handle, aclrtStream stream) {
  auto* comm = comm_of(handle);
  if (send_type != receive_type || !send || !receive) return E_PARA;
  std::vector<int64_t> out(send_counts, send_counts + comm->size),
      in(receive_counts, receive_counts + comm->size);
  int64_t sent = 0, received = 0;
  for (int rank = 0; rank < comm->size; rank++) {
    // The stand-in supports only contiguous parts.
    if (send_at[rank] != static_cast<uint64_t>(sent) ||
        receive_at[rank] != static_cast<uint64_t>(received))
      return E_NOT_SUPPORT;
    sent += out[rank];
    received += in[rank];
  }
  auto result = std::make_shared<at::Tensor>();
  auto start = [=]() mutable {
    auto input = view(send, sent, send_type).clone();
    *result = at::empty({received}, input.options());
    return comm->group->alltoall_base(*result, input, in, out);
  };
  queue(comm, stream, start, [=] { view(receive, received, receive_type).copy_(*result); });
  return SUCCESS;
}

Code HcclSend(void* data, uint64_t count, int type, uint32_t peer, void* comm, aclrtStream stream) {
  return messages(comm_of(comm), stream, {Item{0, data, count, type, peer}});
}
Code HcclRecv(void* data, uint64_t count, int type, uint32_t peer, void* comm, aclrtStream stream) {
  return messages(comm_of(comm), stream, {Item{1, data, count, type, peer}});
}
Code HcclBatchSendRecv(Item* items, uint32_t number, void* comm, aclrtStream stream) {
  return messages(comm_of(comm), stream, std::vector<Item>(items, items + number));
}
}
