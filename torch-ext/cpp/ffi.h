// Shared by the C++ side of the ffi: every function returns 0, or 1 with the message of the exception kept
// for `mtx_last_error`, so no C++ exception ever crosses into Rust.
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
