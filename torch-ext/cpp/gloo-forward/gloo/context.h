// The libtorch wheel exports Gloo but ships none of its headers. c10d's ProcessGroupGloo.hpp uses these
// types through pointers only, so declaring them is enough; the one member it calls is declared as the
// library exports it.
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
