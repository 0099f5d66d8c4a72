// The libtorch wheel exports Gloo but contains none of its headers. c10d's ProcessGroupGloo.hpp
// uses these types only by pointer, so declarations suffice. The one member that it calls is
// declared as the library exports it.
#pragma once
#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace gloo {
namespace transport {
class Device;
class UnboundBuffer;
} // namespace transport
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
} // namespace gloo
