// Short ways of eager mode, for tensors about which nothing needs a word in Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <string_view>

namespace smart_fast {

inline bool has_kernel(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

// A tensor and nothing else: no subclass, which may bring rules of its own.
inline const at::Tensor* plain(pybind11::handle object) {
  return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
}

struct PlainPair {
  const at::Tensor *input, *target;
  double weight;  // of a term in the reduced divergence
};

// Two plain logits of one shape that kernels take and a reduction to a scalar, or nothing.
inline std::optional<PlainPair> plain_pair(pybind11::handle input, pybind11::handle target, std::string_view reduction,
                                           double alpha) {
  const at::Tensor *x = plain(input), *t = plain(target);
  if (x == nullptr || t == nullptr || !has_kernel(x->scalar_type()) || !has_kernel(t->scalar_type()) ||
      x->sizes() != t->sizes() || x->device() != t->device() || x->numel() == 0 || x->dim() == 0 || !std::isfinite(alpha))
    return std::nullopt;
  if (reduction == "sum") return PlainPair{x, t, 1.0};
  if (reduction == "mean") return PlainPair{x, t, 1.0 / double(x->numel())};
  if (reduction == "batchmean") return PlainPair{x, t, 1.0 / double(x->size(0))};
  return std::nullopt;
}

void define_eager(pybind11::module_& module);

}  // namespace smart_fast
