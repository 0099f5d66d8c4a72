// The part of AscendCL that the stand-in implements. Names, types and numbers are those of
// acl_base.h and acl_rt.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

extern "C" {
typedef int aclError;
typedef void* aclrtStream;
typedef void* aclrtEvent;
typedef enum {
  ACL_EVENT_RECORDED_STATUS_NOT_READY = 0,
  ACL_EVENT_RECORDED_STATUS_COMPLETE = 1
} aclrtEventRecordedStatus;
typedef enum { ACL_MEM_MALLOC_HUGE_FIRST = 0 } aclrtMemMallocPolicy;

aclError aclrtGetDeviceCount(uint32_t* count);
aclError aclrtSetDevice(int32_t device);
aclError aclrtGetDevice(int32_t* device);
aclError aclrtMalloc(void** pointer, size_t size, aclrtMemMallocPolicy policy);
aclError aclrtFree(void* pointer);
aclError aclrtCreateStream(aclrtStream* stream);
aclError aclrtSynchronizeStream(aclrtStream stream);
aclError aclrtStreamAbort(aclrtStream stream);
aclError aclrtCreateEvent(aclrtEvent* event);
aclError aclrtDestroyEvent(aclrtEvent event);
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream);
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event);
aclError aclrtSynchronizeEvent(aclrtEvent event);
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status);
const char* aclGetRecentErrMsg();
}

namespace standin {
// True if the stream of a task was aborted. The task must not write any more.
using GivenUp = std::function<bool()>;
// Queues a task, as a kernel launch does.
void enqueue(aclrtStream stream, std::function<void(const GivenUp&)> task);
// Sets the message that aclGetRecentErrMsg returns in this thread.
void remember(const std::string& error);
// Loads the kernel of an operation, when it is first used.
void load(const std::string& operation);
// Counts a use of a device that is not the process's.
void count_other_device();
// With MOERUN_STANDIN_USES=FOLDER, writes `text` as a line of this process's file in that folder
// when it comes for the first time.
void note_use(const std::string& text);
}  // namespace standin
