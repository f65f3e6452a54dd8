// Differentiable operations in eager mode, whoever computes them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace smart_fast {
namespace nodes {

using at::Tensor;
using std::optional;
using std::string_view;

// DivergenceSpec of smart_fast/backends/base.py.
struct Spec {
  std::string kind, output;
  double alpha, weight, scale;
  bool from_difference;
};

// What computes a divergence and its gradients. Nodes keep a pointer to it, so it is never destroyed.
struct Executor {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // the loss, row statistics, both gradients
  using Backward = std::tuple<Tensor, Tensor>;

  // Row statistics are kept and probabilities recomputed, except where gradients beside the loss save a CPU a second
  // reading of the logits.
  virtual bool beside_loss(const Tensor& input, const Tensor& target, const Spec& spec) const = 0;
  // Gradients beside the loss come multiplied by `rescale`; a CPU's have the bits that `mul_` would give them.
  virtual Forward forward(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, const Spec& spec,
                          bool keep, bool want_input, bool want_target, double rescale) const = 0;
  virtual Backward backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& stats,
                            const optional<Tensor>& mask, const Spec& spec, bool want_input, bool want_target) const = 0;

 protected:
  ~Executor() = default;
};

// The first of `results` as `embed` plus something constant: the gradient passes through, except at masked rows.
std::tuple<Tensor, Tensor> shifting(const Tensor& embed, const optional<Tensor>& mask,
                                    std::tuple<Tensor, Tensor> results);

Tensor divergence(const Executor& executor, const Tensor& input, const Tensor& target, const optional<Tensor>& mask,
                  const Spec& spec);

}  // namespace nodes
}  // namespace smart_fast
