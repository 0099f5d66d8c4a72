// A custom autograd node whose backward is a Rust closure.
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <cstdlib>
#include <mutex>

#include "ffi.h"

namespace {

// A Rust function that reads `grads` (null if undefined) and writes `out` (owned by the caller,
// null if there is no gradient). It returns null, or an error message allocated with malloc.
using Backward = char* (*)(
    void* state, at::Tensor* const* grads, size_t num_grads, at::Tensor** out, size_t num_out);
using Drop = void (*)(void* state);

[[noreturn]] void raise(char* message) {
  std::string text(message);
  std::free(message);
  throw std::runtime_error(text);
}

struct ClosureNode : torch::autograd::Node {
  ClosureNode(void* state, Backward backward, Drop drop, size_t num_inputs)
      : state_(state), backward_(backward), drop_(drop), num_inputs_(num_inputs) {}
  ~ClosureNode() override { release(); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(state_, "backward ran twice through a node whose saved tensors are freed");
    std::vector<at::Tensor*> in(grads.size()), out(num_inputs_, nullptr);
    for (size_t i = 0; i < grads.size(); i++) in[i] = grads[i].defined() ? &grads[i] : nullptr;
    char* error = backward_(state_, in.data(), in.size(), out.data(), out.size());
    torch::autograd::variable_list result(num_inputs_);
    for (size_t i = 0; i < num_inputs_; i++) {
      if (out[i]) {
        result[i] = std::move(*out[i]);
        delete out[i];
      }
    }
    if (error) raise(error);
    return result;
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    release();
  }
  std::string name() const override { return "MoerunClosure"; }

 private:
  void release() {
    if (state_) drop_(state_);
    state_ = nullptr;
  }
  std::mutex mutex_;
  void* state_;
  Backward backward_;
  Drop drop_;
  size_t num_inputs_;
};

} // namespace

namespace mtx {
std::string& last_error() {
  thread_local std::string message;
  return message;
}
} // namespace mtx

extern "C" {

const char* mtx_last_error() { return mtx::last_error().c_str(); }

bool mtx_grad_enabled() { return at::GradMode::is_enabled(); }

// Takes ownership of `state` on success and on failure. `outputs` are replaced in place.
int mtx_attach_backward(
    at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs, size_t num_outputs,
    void* state, Backward backward, Drop drop) {
  auto node = std::shared_ptr<ClosureNode>(
      new ClosureNode(state, backward, drop, num_inputs), torch::autograd::deleteNode);
  return mtx::guarded([&] {
    torch::autograd::edge_list edges;
    for (size_t i = 0; i < num_inputs; i++) {
      edges.push_back(
          inputs[i]->requires_grad() ? torch::autograd::impl::gradient_edge(*inputs[i])
                                     : torch::autograd::Edge());
    }
    node->set_next_edges(std::move(edges));
    for (size_t i = 0; i < num_outputs; i++) torch::autograd::set_history(*outputs[i], node);
  });
}
}
