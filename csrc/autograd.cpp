// Autograd nodes of the operators, for eager mode: a node in C++ costs a fraction of one in Python. Under torch.compile
// smart_fast/autograd.py wraps the operators instead. The nodes of divergences ask an executor for their kernels, the
// native one here or that of triton.cpp.
#include <ATen/core/Generator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "nodes.h"

namespace smart_fast {
namespace nodes {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <class Signature>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What holds a node: a std::shared_ptr in torch 2.11, a c10::intrusive_ptr in 2.13.
template <class NodeType>
auto own(NodeType* node) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return std::shared_ptr<NodeType>(node, [](auto* each) { deleteNode(each); });  // found by its argument
  else
    return c10::intrusive_ptr<NodeType>::unsafe_steal_from_new(node);
}

// A node of the graph with an edge to each of `inputs`, which it is the gradient of.
template <class NodeType, class... Inputs>
auto new_node(const Inputs&... inputs) {
  auto node = own(new NodeType());
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

bool wanted(const Tensor& tensor) { return tensor.requires_grad() && at::GradMode::is_enabled(); }

// Kernels compute first derivatives only: differentiating their gradients is an error, not zero.
variable_list only_once(variable_list gradients, const char* what) {
  if (!at::GradMode::is_enabled()) return gradients;
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      std::string("smart_fast: ") + what + " cannot be differentiated twice on a fused backend; use backend=\"torch\"",
      int64_t(gradients.size()));
  variable_list tracked = gradients;
  for (Tensor& each : tracked)
    if (each.defined()) each = each.detach().requires_grad_();
  return (*error)(std::move(tracked));
}

// ---- embeddings ----------------------------------------------------------------------------------------------------

using PerturbSignature = std::tuple<Tensor, Tensor>(const Tensor&, optional<at::Generator>, double,
                                                    const optional<Tensor>&, bool, const optional<Tensor>&, string_view);

std::tuple<Tensor, Tensor> call_perturb(const Tensor& embed, const optional<at::Generator>& generator, double noise_var,
                                        const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                        string_view noise_kind) {
  static const auto handle = operator_handle<PerturbSignature>("smart_fast::native_perturb_fresh");
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle.call(embed, generator, noise_var, mask, keep_noise, unit, noise_kind);
}

// embed -> embed + something constant: the gradient passes through, except at masked rows.
struct ShiftNode final : Node {
  SavedVariable mask;
  bool masked = false;

  variable_list apply(variable_list&& grads) override {
    if (!masked || !grads[0].defined()) return std::move(grads);
    const std::lock_guard<std::mutex> lock(mutex_);
    return {at::where(mask.unpack().unsqueeze(-1), grads[0], at::zeros_like(grads[0]))};
  }
  void release_variables() override { mask.reset_data(); }
  std::string name() const override { return "SmartFastShift"; }
};

}  // namespace

std::tuple<Tensor, Tensor> shifting(const Tensor& embed, const optional<Tensor>& mask,
                                    std::tuple<Tensor, Tensor> results) {
  if (!wanted(embed)) return results;
  const auto node = new_node<ShiftNode>(embed);
  if (mask) {
    node->mask = SavedVariable(*mask, false);
    node->masked = true;
  }
  torch::autograd::set_history(std::get<0>(results), node);
  return results;
}

namespace {

std::tuple<Tensor, Tensor> perturb_fresh(const Tensor& embed, optional<at::Generator> generator, double noise_var,
                                         const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                         string_view noise_kind) {
  return shifting(embed, mask, call_perturb(embed, generator, noise_var, mask, keep_noise, unit, noise_kind));
}

using AscendSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                                                   const optional<Tensor>&, const optional<Tensor>&,
                                                   const optional<Tensor>&, string_view, string_view, double, double,
                                                   string_view, double, bool, string_view);

std::tuple<Tensor, Tensor> call_ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                       const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                       const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                       string_view scope, double noise_var, double step_size, string_view update,
                                       double epsilon, bool keep_noise, string_view noise_kind) {
  static const auto handle = operator_handle<AscendSignature>("smart_fast::native_ascend");
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle.call(embed, grad, noise, norm, moved_norm, mask, unit, kind, scope, noise_var, step_size, update, epsilon,
                     keep_noise, noise_kind);
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, string_view noise_kind) {
  return shifting(embed, mask, call_ascend(embed, grad, noise, norm, moved_norm, mask, unit, kind, scope, noise_var,
                                           step_size, update, epsilon, keep_noise, noise_kind));
}

// ---- divergences ---------------------------------------------------------------------------------------------------

using ForwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const optional<Tensor>&,
                                                                    string_view, string_view, double, double, double,
                                                                    bool, bool, bool, bool, double);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const optional<Tensor>&, string_view, string_view, double, double,
                                                     double, bool, bool, bool);

struct NativeExecutor final : Executor {
  // Not in fp16, where gradients could underflow before a loss scale reaches them.
  bool beside_loss(const Tensor& input, const Tensor& target, const Spec& spec) const override {
    return spec.output == "sum" && input.is_cpu() && input.scalar_type() != at::kHalf &&
           target.scalar_type() != at::kHalf;
  }
  Forward forward(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, const Spec& spec, bool keep,
                  bool want_input, bool want_target, double rescale) const override {
    static const auto handle = operator_handle<ForwardSignature>("smart_fast::native_divergence_forward");
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle.call(input, target, mask, spec.kind, spec.output, spec.alpha, spec.weight, spec.scale,
                       spec.from_difference, keep, want_input, want_target, rescale);
  }
  Backward backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& stats,
                    const optional<Tensor>& mask, const Spec& spec, bool want_input, bool want_target) const override {
    static const auto handle = operator_handle<BackwardSignature>("smart_fast::native_divergence_backward");
    const at::AutoDispatchBelowADInplaceOrView below;
    return handle.call(grad, input, target, stats, mask, spec.kind, spec.output, spec.alpha, spec.weight, spec.scale,
                       spec.from_difference, want_input, want_target);
  }
};

// The upstream gradient that a loss is likely to get. Training weighs a loss by the same number step after step, and
// gradients made beside the loss are multiplied by it as they are written, which saves a pass over them. They have the
// same bits as without a guess, and are made anew where it was wrong.
class UpstreamGuess {
 public:
  // Losses that differ in these are weighed apart: a step of the ascent, say, and the loss itself.
  static UpstreamGuess& of(const Spec& spec, const Tensor& input, bool want_input, bool want_target) {
    static std::array<UpstreamGuess, 64> guesses;
    const size_t width = size_t(input.size(-1));
    const size_t key = std::hash<std::string>()(spec.kind) ^ (width * 4 + want_input * 2 + want_target) * 0x9e3779b97f4a7c15u;
    return guesses[(key ^ key >> 32) % guesses.size()];
  }

  float get() const {
    const Seen seen = seen_.load(std::memory_order_relaxed);
    return seen.times < enough ? 1.0f : seen.upstream;
  }
  void learn(float upstream) {
    const Seen seen = seen_.load(std::memory_order_relaxed);
    const bool again = seen.upstream == upstream;
    if (again && seen.times == enough) return;
    seen_.store({upstream, again ? seen.times + 1 : 0}, std::memory_order_relaxed);
  }

 private:
  struct Seen {
    float upstream;
    uint32_t times;  // in a row, after the first
  };
  static constexpr uint32_t enough = 3;
  std::atomic<Seen> seen_{Seen{1.0f, 0}};
};

struct DivergenceNode final : Node {
  const Executor* executor;
  SavedVariable input, target, stats, mask;
  Spec spec;
  bool want_input, want_target, has_stats, masked;
  Tensor dx, dt;  // beside the loss, until they are handed over
  UpstreamGuess* guess = nullptr;
  float guessed = 1;

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const Tensor x = input.unpack(), t = target.unpack();  // complains if they have changed or are gone
    const optional<Tensor> rows = masked ? optional<Tensor>(mask.unpack()) : std::nullopt;
    std::tuple<Tensor, Tensor> gradients;
    if (has_stats) {
      gradients = executor->backward(grads[0], x, t, stats.unpack(), rows, spec, want_input, want_target);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      const float upstream = grads[0].item<float>();
      guess->learn(upstream);
      gradients = {std::move(dx), std::move(dt)};  // handed over, not lent: whoever receives them may write to them
      const bool made = std::get<0>(gradients).defined();
      dx = dt = Tensor();
      if (!made || (guessed != upstream && guessed != 1)) {  // a second backward pass, or a wrong guess
        gradients = {};
        auto again = executor->forward(x, t, rows, spec, false, want_input, want_target, upstream);
        gradients = {std::get<2>(again), std::get<3>(again)};
      } else if (guessed != upstream) {
        if (want_input) std::get<0>(gradients).mul_(grads[0]);  // a number in its place would be rounded to bf16
        if (want_target) std::get<1>(gradients).mul_(grads[0]);
      }
    }
    return only_once({want_input ? std::get<0>(gradients) : Tensor(), want_target ? std::get<1>(gradients) : Tensor()},
                     "this loss");
  }
  void release_variables() override {
    for (SavedVariable* each : {&input, &target, &stats, &mask}) each->reset_data();
    dx = dt = Tensor();
  }
  std::string name() const override { return "SmartFastDivergence"; }
};

Tensor differentiable_divergence(const Executor& executor, const Tensor& input, const Tensor& target,
                                 const optional<Tensor>& mask, const Spec& spec) {
  const auto node = new_node<DivergenceNode>(input, target);
  node->executor = &executor;
  node->spec = spec;
  node->want_input = input.requires_grad();
  node->want_target = target.requires_grad();
  const bool now = executor.beside_loss(input, target, spec);
  if (now) {
    node->guess = &UpstreamGuess::of(spec, input, node->want_input, node->want_target);
    node->guessed = node->guess->get();
  }
  auto [loss, stats, dx, dt] = executor.forward(input, target, mask, spec, !now, now && node->want_input,
                                                now && node->want_target, node->guessed);
  node->input = SavedVariable(input, false);
  node->target = SavedVariable(target, false);
  node->has_stats = !now;
  if (now) {
    node->dx = std::move(dx);
    node->dt = std::move(dt);
  } else {
    node->stats = SavedVariable(stats, false);
  }
  node->masked = mask.has_value();
  if (mask) node->mask = SavedVariable(*mask, false);
  torch::autograd::set_history(loss, node);
  return loss;
}

}  // namespace

Tensor divergence(const Executor& executor, const Tensor& input, const Tensor& target, const optional<Tensor>& mask,
                  const Spec& spec) {
  if (wanted(input) || wanted(target)) return differentiable_divergence(executor, input, target, mask, spec);
  return std::get<0>(executor.forward(input, target, mask, spec, false, false, false, 1.0));
}

namespace {

Tensor native_divergence(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, string_view kind,
                         string_view output, double alpha, double weight, double scale, bool from_difference) {
  static const NativeExecutor native;
  return divergence(native, input, target, mask,
                    {std::string(kind), std::string(output), alpha, weight, scale, from_difference});
}

}  // namespace
}  // namespace nodes
}  // namespace smart_fast

TORCH_LIBRARY_IMPL(smart_fast, Autograd, library) {
  library.impl("native_perturb_fresh", &smart_fast::nodes::perturb_fresh);
  library.impl("native_ascend", &smart_fast::nodes::ascend);
}

TORCH_LIBRARY_IMPL(smart_fast, CompositeImplicitAutograd, library) {
  library.impl("native_divergence", &smart_fast::nodes::native_divergence);
}
