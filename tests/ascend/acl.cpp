// AscendCL in host memory. A stream is a thread that runs one task after another.
//
// A process has one device, the first that it sets. A thread that has not set it means another one.
//
// With MOERUN_STANDIN_LAZY_LOADING=1 the first use of each operation waits until all streams are
// idle, as CUDA may do to load a kernel, and all other calls of the process wait for that.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

#include "acl.h"

namespace {
constexpr aclError SUCCESS = 0;
constexpr aclError FAILURE = 500000;  // ACL_ERROR_INTERNAL_ERROR

thread_local std::string recent;
constexpr int32_t NONE = -1;
thread_local int32_t current_device = NONE;
std::atomic<int32_t> own_device{NONE};

// Held while a kernel is loaded.
std::shared_mutex loading;

// Begins a call that uses the device.
void enter() {
  if (current_device != own_device) standin::count_other_device();
  std::shared_lock<std::shared_mutex> not_loading(loading);
}

// A position in a stream's queue, for events.
struct Mark {
  std::mutex mutex;
  std::condition_variable passed;
  bool done = false;

  void pass() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    passed.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    passed.wait(lock, [&] { return done; });
  }
  bool is_done() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};
using MarkPtr = std::shared_ptr<Mark>;

struct Task {
  std::function<void(const standin::GivenUp&)> work;
  MarkPtr mark;  // Set instead of work: the stream has reached this position.
};

// The thread of a stream. After an abort it exits when its current task returns.
struct Worker {
  std::mutex mutex;
  std::condition_variable more;
  std::deque<Task> tasks;
  std::atomic<bool> given_up{false};

  static std::shared_ptr<Worker> start() {
    auto worker = std::make_shared<Worker>();
    std::thread([worker] { worker->run(); }).detach();
    return worker;
  }
  void add(Task task) {
    std::lock_guard<std::mutex> lock(mutex);
    tasks.push_back(std::move(task));
    more.notify_one();
  }
  void run() {
    current_device = own_device;
    for (;;) {
      Task task;
      {
        std::unique_lock<std::mutex> lock(mutex);
        more.wait(lock, [&] { return given_up || !tasks.empty(); });
        if (given_up) return;
        task = std::move(tasks.front());
        tasks.pop_front();
      }
      if (task.mark) {
        task.mark->pass();
      } else {
        task.work([this] { return given_up.load(); });
      }
    }
  }
  // An aborted stream releases everything that waits for it.
  void give_up() {
    std::lock_guard<std::mutex> lock(mutex);
    given_up = true;
    for (auto& task : tasks)
      if (task.mark) task.mark->pass();
    tasks.clear();
    more.notify_one();
  }
};

struct Stream {
  std::mutex mutex;
  std::shared_ptr<Worker> worker = Worker::start();
  std::atomic<int> aborts{0};

  void add(Task task) {
    std::lock_guard<std::mutex> lock(mutex);
    worker->add(std::move(task));
  }
};

struct Event {
  std::mutex mutex;
  MarkPtr mark;

  MarkPtr get() {
    std::lock_guard<std::mutex> lock(mutex);
    return mark;
  }
};

std::mutex listing;
std::vector<Stream*> all_streams;

Stream* stream_of(aclrtStream handle) { return static_cast<Stream*>(handle); }
Event* event_of(aclrtEvent handle) { return static_cast<Event*>(handle); }
}  // namespace

namespace standin {
void enqueue(aclrtStream stream, std::function<void(const GivenUp&)> task) {
  enter();
  stream_of(stream)->add(Task{std::move(task), nullptr});
}
void remember(const std::string& error) { recent = error; }
void load(const std::string& operation) {
  static const bool is_lazy = std::getenv("MOERUN_STANDIN_LAZY_LOADING") != nullptr;
  static std::mutex mutex;
  static std::set<std::string> loaded;
  if (!is_lazy) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!loaded.insert(operation).second) return;
  }
  std::unique_lock<std::shared_mutex> lock(loading);
  std::vector<MarkPtr> ends;
  {
    std::lock_guard<std::mutex> list(listing);
    for (auto* stream : all_streams) {
      ends.push_back(std::make_shared<Mark>());
      stream->add(Task{nullptr, ends.back()});
    }
  }
  for (auto& end : ends) end->wait();
}
void note_use(const std::string& text) {
  static const char* folder = std::getenv("MOERUN_STANDIN_USES");
  if (!folder) return;
  static std::mutex mutex;
  static std::set<std::string> known;
  std::lock_guard<std::mutex> lock(mutex);
  if (!known.insert(text).second) return;
  std::ofstream file(std::string(folder) + "/" + std::to_string(getpid()), std::ios::app);
  file << text << std::endl;
}
}  // namespace standin

extern "C" {
aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = 8;
  return SUCCESS;
}
aclError aclrtSetDevice(int32_t device) {
  int32_t none = NONE;
  own_device.compare_exchange_strong(none, device);
  current_device = device;
  return SUCCESS;
}
aclError aclrtGetDevice(int32_t* device) {
  *device = current_device == NONE ? 0 : current_device;
  return SUCCESS;
}
aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy) {
  enter();
  return posix_memalign(pointer, 512, size ? size : 512) == 0 ? SUCCESS : FAILURE;
}
aclError aclrtFree(void* pointer) {
  std::free(pointer);
  return SUCCESS;
}
aclError aclrtCreateStream(aclrtStream* stream) {
  enter();
  std::lock_guard<std::mutex> list(listing);
  all_streams.push_back(new Stream);
  *stream = all_streams.back();
  return SUCCESS;
}
aclError aclrtSynchronizeStream(aclrtStream handle) {
  enter();
  auto* stream = stream_of(handle);
  int before = stream->aborts;
  auto mark = std::make_shared<Mark>();
  stream->add(Task{nullptr, mark});
  mark->wait();
  if (stream->aborts == before) return SUCCESS;
  recent = "the stream was aborted";
  return FAILURE;
}
aclError aclrtStreamAbort(aclrtStream handle) {
  // Does not wait for a kernel to be loaded: that may wait for the abort.
  if (current_device != own_device) standin::count_other_device();
  auto* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(stream->mutex);
  stream->aborts++;
  stream->worker->give_up();
  stream->worker = Worker::start();
  return SUCCESS;
}
aclError aclrtCreateEvent(aclrtEvent* event) {
  enter();
  *event = new Event;
  return SUCCESS;
}
aclError aclrtDestroyEvent(aclrtEvent event) {
  enter();
  delete event_of(event);
  return SUCCESS;
}
aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  enter();
  auto* event = event_of(handle);
  auto mark = std::make_shared<Mark>();
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->mark = mark;
  }
  stream_of(stream)->add(Task{nullptr, mark});
  return SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  enter();
  if (auto mark = event_of(handle)->get())
    standin::enqueue(stream, [mark](const standin::GivenUp&) { mark->wait(); });
  return SUCCESS;
}
aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  enter();
  if (auto mark = event_of(handle)->get()) mark->wait();
  return SUCCESS;
}
aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  enter();
  auto mark = event_of(handle)->get();
  *status = !mark || mark->is_done() ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                     : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return SUCCESS;
}
const char* aclGetRecentErrMsg() { return recent.c_str(); }
}
