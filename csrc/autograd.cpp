// Autograd nodes of the operators, for eager mode: a node in C++ costs a fraction of one in Python. Under torch.compile
// smart_fast/autograd.py wraps the operators instead.
#include <ATen/core/Generator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace smart_fast {
namespace {

using at::Tensor;
using std::optional;
using std::string_view;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
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

// embed -> embed + something constant: the gradient passes through, except at masked rows.
Tensor pass_through(const Tensor& grad, const Tensor& mask) {
  if (!grad.defined() || !mask.defined()) return grad;
  return at::where(mask.unsqueeze(-1), grad, at::zeros_like(grad));
}

using PerturbSignature = std::tuple<Tensor, Tensor>(const Tensor&, optional<at::Generator>, double,
                                                    const optional<Tensor>&, bool, const optional<Tensor>&);

std::tuple<Tensor, Tensor> call_perturb(const Tensor& embed, const optional<at::Generator>& generator, double noise_var,
                                        const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit) {
  static const auto handle = operator_handle<PerturbSignature>("smart_fast::native_perturb_fresh");
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle.call(embed, generator, noise_var, mask, keep_noise, unit);
}

// A result that embed shifts, and what comes with it.
struct ShiftNode : Function<ShiftNode> {
  static variable_list forward(AutogradContext* context, const Tensor& embed, const optional<Tensor>& mask,
                               const std::tuple<Tensor, Tensor>& results) {
    context->save_for_backward({mask.value_or(Tensor())});
    context->mark_non_differentiable({std::get<1>(results)});
    return {std::get<0>(results), std::get<1>(results)};
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    return {pass_through(grads[0], context->get_saved_variables()[0]), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> shifting(const Tensor& embed, const optional<Tensor>& mask,
                                    const std::tuple<Tensor, Tensor>& results) {
  if (!wanted(embed)) return results;
  const variable_list out = ShiftNode::apply(embed, mask, results);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> perturb_fresh(const Tensor& embed, optional<at::Generator> generator, double noise_var,
                                         const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit) {
  return shifting(embed, mask, call_perturb(embed, generator, noise_var, mask, keep_noise, unit));
}

using AscendSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                                                   const optional<Tensor>&, string_view, string_view, double, double,
                                                   string_view, double, bool, const optional<Tensor>&,
                                                   const optional<Tensor>&);

std::tuple<Tensor, Tensor> call_ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                       const optional<Tensor>& norm, const optional<Tensor>& mask, string_view kind,
                                       string_view scope, double noise_var, double step_size, string_view update,
                                       double epsilon, bool keep_noise, const optional<Tensor>& moved_norm,
                                       const optional<Tensor>& unit) {
  static const auto handle = operator_handle<AscendSignature>("smart_fast::native_ascend");
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle.call(embed, grad, noise, norm, mask, kind, scope, noise_var, step_size, update, epsilon, keep_noise,
                     moved_norm, unit);
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& mask, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& unit) {
  return shifting(embed, mask, call_ascend(embed, grad, noise, norm, mask, kind, scope, noise_var, step_size, update,
                                           epsilon, keep_noise, moved_norm, unit));
}

// ---- divergences ---------------------------------------------------------------------------------------------------

using ForwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const optional<Tensor>&,
                                                                    string_view, string_view, double, double, double,
                                                                    bool, bool, bool, bool);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                     const optional<Tensor>&, string_view, string_view, double, double,
                                                     double, bool, bool, bool);

auto call_forward(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, string_view kind,
                  string_view output, double alpha, double weight, double scale, bool relative, bool keep,
                  bool want_input, bool want_target) {
  static const auto handle = operator_handle<ForwardSignature>("smart_fast::native_divergence_forward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return handle.call(input, target, mask, kind, output, alpha, weight, scale, relative, keep, want_input, want_target);
}

// Row statistics are saved and probabilities recomputed, except where gradients beside the loss save a CPU a second
// reading of the logits. Not in fp16, where they could underflow before a loss scale reaches them.
bool gradients_beside_loss(const Tensor& input, const Tensor& target, string_view output) {
  return output == "sum" && input.is_cpu() && input.scalar_type() != at::kHalf && target.scalar_type() != at::kHalf;
}

struct DivergenceNode : Function<DivergenceNode> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& target,
                        const optional<Tensor>& mask, string_view kind, string_view output, double alpha, double weight,
                        double scale, bool relative) {
    const bool want_input = input.requires_grad(), want_target = target.requires_grad();
    const bool now = gradients_beside_loss(input, target, output);
    auto [loss, stats, dx, dt] = call_forward(input, target, mask, kind, output, alpha, weight, scale, relative, !now,
                                              now && want_input, now && want_target);
    context->save_for_backward({input, target, now ? Tensor() : stats, mask.value_or(Tensor())});
    auto& saved = context->saved_data;
    saved["options"] = std::make_tuple(std::string(kind), std::string(output), alpha, weight, scale, relative);
    saved["want"] = std::make_tuple(want_input, want_target);
    if (now) saved["gradients"] = std::make_tuple(dx, dt);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list tensors = context->get_saved_variables();
    const Tensor &input = tensors[0], &target = tensors[1], &stats = tensors[2];
    const optional<Tensor> mask = tensors[3].defined() ? optional<Tensor>(tensors[3]) : std::nullopt;
    auto& saved = context->saved_data;
    const auto [kind, output, alpha, weight, scale, relative] =
        saved["options"].to<std::tuple<std::string, std::string, double, double, double, bool>>();
    const auto [want_input, want_target] = saved["want"].to<std::tuple<bool, bool>>();
    std::tuple<Tensor, Tensor> gradients;
    if (stats.defined()) {
      static const auto handle = operator_handle<BackwardSignature>("smart_fast::native_divergence_backward");
      const at::AutoDispatchBelowADInplaceOrView below;
      gradients = handle.call(grads[0], input, target, stats, mask, kind, output, alpha, weight, scale, relative,
                              want_input, want_target);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      const auto found = saved.find("gradients");
      if (found != saved.end()) {  // handed over, not lent: whoever receives them may write to them
        gradients = found->second.to<std::tuple<Tensor, Tensor>>();
        saved.erase(found);
      } else {  // a second backward pass computes its own
        const auto again = call_forward(input, target, mask, kind, output, alpha, weight, scale, relative, false,
                                        want_input, want_target);
        gradients = {std::get<2>(again), std::get<3>(again)};
      }
      const double upstream = grads[0].item<double>();
      if (upstream != 1.0) {
        if (want_input) std::get<0>(gradients).mul_(upstream);
        if (want_target) std::get<1>(gradients).mul_(upstream);
      }
    }
    const variable_list both = only_once({want_input ? std::get<0>(gradients) : Tensor(),
                                          want_target ? std::get<1>(gradients) : Tensor()},
                                         "this loss");
    return {both[0], both[1], Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor divergence(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, string_view kind,
                  string_view output, double alpha, double weight, double scale, bool relative) {
  if (wanted(input) || wanted(target))
    return DivergenceNode::apply(input, target, mask, kind, output, alpha, weight, scale, relative);
  return std::get<0>(
      call_forward(input, target, mask, kind, output, alpha, weight, scale, relative, false, false, false));
}

}  // namespace
}  // namespace smart_fast

TORCH_LIBRARY_IMPL(smart_fast, Autograd, library) {
  library.impl("native_perturb_fresh", &smart_fast::perturb_fresh);
  library.impl("native_ascend", &smart_fast::ascend);
}

TORCH_LIBRARY_IMPL(smart_fast, CompositeImplicitAutograd, library) {
  library.impl("native_divergence", &smart_fast::divergence);
}
