// What eager mode calls instead of torch.ops: parsing a schema's arguments takes longer than small kernels do. The
// operators are the same, dispatched as ever.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "eager.h"

namespace smart_fast {
namespace eager {
namespace {

using at::Tensor;
using std::optional;
using std::string_view;
using torch::autograd::Edge;

template <class Signature>
auto operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> perturb(const Tensor& embed, const optional<at::Generator>& generator, double noise_var,
                                   const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                   string_view noise_kind) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, optional<at::Generator>, double, const optional<Tensor>&,
                                               bool, const optional<Tensor>&, string_view);
  static const auto handle = operator_handle<Signature>("smart_fast::native_perturb_fresh");
  return handle.call(embed, generator, noise_var, mask, keep_noise, unit, noise_kind);
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, string_view noise_kind) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&,
                                               const optional<Tensor>&, const optional<Tensor>&,
                                               const optional<Tensor>&, string_view, string_view, double, double,
                                               string_view, double, bool, string_view);
  static const auto handle = operator_handle<Signature>("smart_fast::native_ascend");
  return handle.call(embed, grad, noise, norm, moved_norm, mask, unit, kind, scope, noise_var, step_size, update, epsilon,
                     keep_noise, noise_kind);
}

bool served(const Tensor& x, double fewer_than) {
#if defined(SMART_FAST_CUDA)
  if (x.is_cuda()) return double(x.numel()) < fewer_than;
#endif
  return x.is_cpu();
}

// The divergence `kind` of logits, reduced, if nothing about them needs a word in Python; else None. On a GPU only where
// there are `fewer_than` so many of them.
pybind11::object divergence(pybind11::handle input, pybind11::handle target, string_view kind, string_view reduction,
                            double alpha, double fewer_than) {
  const auto pair = plain_pair(input, target, reduction, alpha);
  if (!pair || !served(*pair->input, fewer_than)) return pybind11::none();
  using Signature = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, string_view, string_view, double,
                           double, double, bool);
  static const auto handle = operator_handle<Signature>("smart_fast::native_divergence");
  return pybind11::cast(handle.call(*pair->input, *pair->target, std::nullopt, kind, "sum", alpha, pair->weight, 1.0, false));
}

Edge edge(const Tensor& tensor) { return torch::autograd::impl::gradient_edge(tensor); }

// d loss / d the tensors that had these edges; undefined (None) where the loss does not depend on one.
std::vector<Tensor> gradients(const Tensor& loss, const std::vector<Edge>& edges) {
  const Tensor one = at::ones_like(loss);
  const pybind11::gil_scoped_release no_gil;
  return torch::autograd::Engine::get_default_engine().execute({torch::autograd::impl::gradient_edge(loss)}, {one},
                                                               /*keep_graph=*/false, /*create_graph=*/false,
                                                               /*accumulate_grad=*/false, edges);
}

}  // namespace
}  // namespace eager

void define_eager(pybind11::module_& module) {
  pybind11::class_<eager::Edge>(module, "Edge", pybind11::module_local());
  module.def("perturb", torch::wrap_pybind_function(&eager::perturb));
  module.def("ascend", torch::wrap_pybind_function(&eager::ascend));
  module.def("divergence", torch::wrap_pybind_function(&eager::divergence));
  module.def("edge", &eager::edge);
  module.def("gradients", torch::wrap_pybind_function(&eager::gradients));
}

}  // namespace smart_fast
