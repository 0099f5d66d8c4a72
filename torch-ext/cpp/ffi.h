// Error handling of the C interface. A function returns 0, or 1 after it has stored the message of
// an exception for `mtx_last_error`. No C++ exception reaches Rust.
#pragma once
#include <exception>
#include <string>

namespace mtx {
std::string& last_error();

template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error() = e.what();
  } catch (...) {
    last_error() = "unknown C++ exception";
  }
  return 1;
}
} // namespace mtx
