// A c10d store whose operations a Rust object carries out.
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ffi.h"

extern "C" {
struct MtxBytes {
  const uint8_t* data;
  size_t size;
};
// An operation on keys. Its meaning is in `StoreOperation` in src/custom_store.rs.
struct MtxStoreRequest {
  uint8_t operation;
  const MtxBytes* keys;
  size_t num_keys;
  const MtxBytes* values;
  size_t num_values;
  int64_t number;
  int64_t timeout_ms;
};
}

namespace {
using Bytes = std::vector<uint8_t>;

// Rust functions. They return null, or an error message allocated with malloc. `call` writes a
// number and adds values to a `std::vector<Bytes>` by `mtx_push_value`.
using StoreCall =
    char* (*)(void* state, const MtxStoreRequest* request, int64_t* number, void* values);
using StoreClone = char* (*)(void* state, void** out);
using StoreDrop = void (*)(void* state);

struct StoreFunctions {
  StoreCall call;
  StoreClone clone;
  StoreDrop drop;
};

enum Operation : uint8_t { kSet, kGet, kAdd, kCompareSet, kCheck, kWait, kDelete, kCount, kAppend };

struct StoreReply {
  int64_t number = 0;
  std::vector<Bytes> values;
};

class CustomStore : public c10d::Store {
 public:
  CustomStore(void* state, StoreFunctions functions, std::chrono::milliseconds timeout)
      : Store(timeout), state_(state), functions_(functions) {}
  ~CustomStore() override { functions_.drop(state_); }

  c10::intrusive_ptr<Store> clone() override {
    void* state = nullptr;
    check(functions_.clone(state_, &state));
    return c10::make_intrusive<CustomStore>(state, functions_, timeout_);
  }
  void set(const std::string& key, const Bytes& value) override { call(kSet, {key}, {value}); }
  Bytes compareSet(const std::string& key, const Bytes& expected, const Bytes& desired) override {
    return only(call(kCompareSet, {key}, {expected, desired}));
  }
  Bytes get(const std::string& key) override {
    if (auto awaited = take_awaited(); awaited && awaited->key == key) return awaited->value;
    return only(call(kGet, {key}));
  }
  int64_t add(const std::string& key, int64_t amount) override {
    return call(kAdd, {key}, {}, amount).number;
  }
  bool deleteKey(const std::string& key) override { return call(kDelete, {key}).number != 0; }
  bool check(const std::vector<std::string>& keys) override {
    return call(kCheck, keys).number != 0;
  }
  int64_t getNumKeys() override { return call(kCount, {}).number; }
  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }
  void wait(
      const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    if (keys.size() != 1) {
      call(kWait, keys, {}, 0, timeout);
      return;
    }
    auto value = only(call(kGet, keys, {}, 0, timeout));
    std::lock_guard<std::mutex> lock(mutex_);
    awaited_ = Awaited{keys[0], std::move(value)};
  }
  void append(const std::string& key, const Bytes& value) override {
    call(kAppend, {key}, {value});
  }
  std::vector<Bytes> multiGet(const std::vector<std::string>& keys) override {
    return call(kGet, keys).values;
  }
  void multiSet(
      const std::vector<std::string>& keys, const std::vector<Bytes>& values) override {
    call(kSet, keys, values);
  }
  bool hasExtendedApi() const override { return true; }

 private:
  // The value of a key that was waited for, until the next operation. Gloo waits for the address
  // of each peer and then gets it: bringing the value with the wait halves the requests of a start.
  struct Awaited {
    std::string key;
    Bytes value;
  };
  std::optional<Awaited> take_awaited() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(awaited_, std::nullopt);
  }
  static Bytes only(StoreReply reply) {
    TORCH_CHECK(reply.values.size() == 1, "the store sent ", reply.values.size(), " values");
    return std::move(reply.values[0]);
  }
  static void check(char* error) {
    if (!error) return;
    std::string text(error);
    std::free(error);
    C10_THROW_ERROR(DistStoreError, text);
  }
  StoreReply call(
      Operation operation, const std::vector<std::string>& keys,
      const std::vector<Bytes>& values = {}, int64_t number = 0) {
    return call(operation, keys, values, number, timeout_);
  }
  StoreReply call(
      Operation operation, const std::vector<std::string>& keys, const std::vector<Bytes>& values,
      int64_t number, std::chrono::milliseconds timeout) {
    std::vector<MtxBytes> key_bytes, value_bytes;
    for (auto& key : keys)
      key_bytes.push_back({reinterpret_cast<const uint8_t*>(key.data()), key.size()});
    for (auto& value : values) value_bytes.push_back({value.data(), value.size()});
    MtxStoreRequest request{
        operation,           key_bytes.data(), key_bytes.size(), value_bytes.data(),
        value_bytes.size(), number,           timeout.count()};
    take_awaited();
    StoreReply reply;
    check(functions_.call(state_, &request, &reply.number, &reply.values));
    return reply;
  }

  void* state_;
  StoreFunctions functions_;
  std::mutex mutex_;
  std::optional<Awaited> awaited_;
};
} // namespace

extern "C" {

// Takes ownership of `state`, which `drop` frees.
int mtx_store_custom(
    void* state, StoreCall call, StoreClone clone, StoreDrop drop, int64_t timeout_ms,
    void** out) {
  return mtx::guarded([&] {
    StoreFunctions functions{call, clone, drop};
    *out = new c10::intrusive_ptr<c10d::Store>(c10::make_intrusive<CustomStore>(
        state, functions, std::chrono::milliseconds(timeout_ms)));
  });
}
void mtx_push_value(void* values, const uint8_t* data, size_t size) {
  static_cast<std::vector<Bytes>*>(values)->emplace_back(data, data + size);
}
}
