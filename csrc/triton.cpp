// What eager mode calls of the Triton backend: its launches behind the nodes of autograd.cpp.
#include <ATen/core/Generator.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/random.h>

#include <map>
#include <string>
#include <utility>

#include "eager.h"
#include "nodes.h"
#include "plans.h"
#include "triton.h"

namespace smart_fast {
namespace triton {
namespace {

namespace py = pybind11;
using at::Tensor;
using nodes::Spec;
using plans::Keyed;
using plans::Planned;
using std::optional;
using std::string_view;

struct Launchers final : nodes::Executor {
  mutable Planned perturb, ascend, divergence_forward, divergence_backward;

  bool beside_loss(const Tensor&, const Tensor&, const Spec&) const override { return false; }

  Forward forward(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, const Spec& spec, bool keep, bool,
                  bool, double) const override {
    const auto results = divergence_forward(input, input, target, mask, string_view(spec.kind), string_view(spec.output),
                                            spec.alpha, spec.weight, Keyed{spec.scale}, spec.from_difference, keep);
    return {results[0], results[1], {}, {}};
  }

  Backward backward(const Tensor& grad, const Tensor& input, const Tensor& target, const Tensor& stats,
                    const optional<Tensor>& mask, const Spec& spec, bool want_input, bool want_target) const override {
    const py::gil_scoped_acquire gil;
    const auto results = divergence_backward(input, grad, input, target, stats, mask, string_view(spec.kind),
                                             string_view(spec.output), spec.alpha, spec.weight, Keyed{spec.scale},
                                             spec.from_difference, want_input, want_target);
    return {results[0], results[1]};
  }

  Planned* named(const std::string& name) {
    return std::map<std::string, Planned*>{{"perturb", &perturb},
                                           {"ascend", &ascend},
                                           {"divergence_forward", &divergence_forward},
                                           {"divergence_backward", &divergence_backward}}.at(name);
  }
};

Launchers& launchers() {
  static Launchers* const instance = new Launchers;  // never destroyed: nodes may outlive every static object
  return *instance;
}

// Launchers by name, each with what records it, and what `Runtime` asks. Plans that there were are forgotten.
void use(const std::map<std::string, std::pair<py::object, py::object>>& given, py::object overriding, py::object knobs,
         size_t most) {
  const auto runtime = std::make_shared<const plans::Runtime>(std::move(overriding), std::move(knobs));
  for (const auto& [name, each] : given) {
    Planned planned(each.first, each.second, runtime, most);
    std::swap(*launchers().named(name), planned);  // the old plans end outside of the table
  }
}

std::tuple<Tensor, Tensor> perturb(const Tensor& embed, const optional<at::Generator>& generator, double noise_var,
                                   const optional<Tensor>& mask, const optional<Tensor>& unit, string_view noise_kind) {
  Tensor seed;
  {
    const py::gil_scoped_release no_gil;
    const at::AutoDispatchBelowADInplaceOrView below;
    seed = at::empty({1}, at::TensorOptions(embed.device()).dtype(at::kLong));
    seed.random_(0, 0x7FFFFFFFFFFFFFFF, generator);  // as torch.randint does
  }
  const auto results = launchers().perturb(embed, embed, seed, noise_var, mask, unit, noise_kind);
  return nodes::shifting(embed, mask, {results[0], seed});
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, string_view noise_kind) {
  const auto results = launchers().ascend(embed, embed, grad, noise, norm, moved_norm, mask, unit, kind, scope, noise_var,
                                          step_size, update, epsilon, keep_noise, noise_kind);
  return nodes::shifting(embed, mask, {results[0], results[1]});
}

Tensor divergence(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, std::string kind,
                  std::string output, double alpha, double weight, double scale, bool from_difference) {
  return nodes::divergence(launchers(), input, target, mask,
                           {std::move(kind), std::move(output), alpha, weight, scale, from_difference});
}

// `divergence` of logits, reduced, if one like it was planned before: so Python has had its say about them. Else None.
py::object plain_divergence(py::handle input, py::handle target, std::string kind, string_view reduction, double alpha) {
  const auto pair = plain_pair(input, target, reduction, alpha);
  if (!pair) return py::none();
  const Tensor &x = *pair->input, &t = *pair->target;
  const bool keep = at::GradMode::is_enabled() && (x.requires_grad() || t.requires_grad());
  const Spec spec = {std::move(kind), "sum", alpha, pair->weight, 1.0, false};
  if (!launchers().divergence_forward.knows(x, t, optional<Tensor>(), string_view(spec.kind), string_view(spec.output),
                                            alpha, spec.weight, Keyed{1.0}, false, keep))
    return py::none();
  return py::cast(nodes::divergence(launchers(), x, t, std::nullopt, spec));
}

}  // namespace
}  // namespace triton

void define_triton(pybind11::module_& module) {
  pybind11::module_ defined = module.def_submodule("triton", "Launches of the Triton backend.");
  defined.def("use", &triton::use);
  defined.def("plans", [](const std::string& launcher) { return triton::launchers().named(launcher)->size(); });
  defined.def("perturb", torch::wrap_pybind_function(&triton::perturb));
  defined.def("ascend", torch::wrap_pybind_function(&triton::ascend));
  defined.def("divergence", torch::wrap_pybind_function(&triton::divergence));
  defined.def("plain_divergence", torch::wrap_pybind_function(&triton::plain_divergence));
}

}  // namespace smart_fast
