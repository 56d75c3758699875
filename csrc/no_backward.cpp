// The ops are for inference. Their backward formula calls this op, so that a graph traced for training
// still compiles, and the first backward pass says what is wrong.
#include <string>

#include "checks.h"

namespace retro {
namespace {

Tensor no_backward(const Tensor& grad, const Tensor& argument, std::string op) {
  (void)grad;
  (void)argument;
  fail(
      op.c_str(), "retro_ops is for inference, there is no backward pass; run the model under ",
      "torch.no_grad(), or train with attn_implementation='sdpa'");
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CompositeExplicitAutograd, m) {
  m.impl("no_backward", TORCH_BOX(&retro::no_backward));
}
