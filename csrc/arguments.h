// Arguments of the operators, CPU and CUDA: names, dtypes, and tensors as rows.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "rows.h"

namespace smart_fast {

using at::Tensor;
using std::optional;
using std::string_view;

// Whether outputs start as NaN, as those of torch.empty do where torch.use_deterministic_algorithms and
// torch.utils.deterministic.fill_uninitialized_memory are on: what a kernel leaves unwritten shows.
inline bool fill_outputs() {
  const at::Context& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::fp32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::fp16;
    default:
      TORCH_CHECK_TYPE(false, "smart_fast: kernels take float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

// The choice called `name`; an error that lists `choices` if there is none.
template <class Choice, size_t N>
Choice choice_of(string_view name, const char* const (&names)[N], const char* what, const char* choices) {
  std::string known;
  for (size_t k = 0; k < N; ++k) {
    if (name == names[k]) return Choice(k);
    known += (k == 0 ? "" : ", ") + std::string(names[k]);
  }
  TORCH_CHECK_VALUE(false, "smart_fast: unknown ", what, " '", name, "'; ", choices, ": ", known);
}

inline Kind kind_of(string_view name) { return choice_of<Kind>(name, kind_names, "divergence", "kinds"); }
inline Norm norm_of(string_view name) { return choice_of<Norm>(name, norm_names, "norm", "norms"); }
inline Update update_of(string_view name) { return choice_of<Update>(name, update_names, "update", "updates"); }

inline Noise noise_kind_of(string_view name) { return choice_of<Noise>(name, noise_names, "noise", "noises"); }

enum class Output { terms, rows, sum };
constexpr const char* output_names[] = {"terms", "rows", "sum"};

inline Output output_of(string_view name) { return choice_of<Output>(name, output_names, "output", "outputs"); }

// The upstream gradient of terms, or of rows as if it were one of terms.
inline Tensor upstream_of(const Tensor& grad, const Tensor& input, Output output) {
  return output == Output::rows ? grad.unsqueeze(-1).expand(input.sizes()) : grad;
}

// Tensors of one shape [..., width] as rows: leading dimensions merged where all of them allow it, copies made where
// more than three remain or the last dimension is not dense (the `free`th tensor may have any).
struct View {
  Shape shape;
  std::vector<Tensor> tensors;
  std::vector<Rows> rows;

  explicit View(std::vector<Tensor> given, size_t free = size_t(-1)) : tensors(std::move(given)) {
    const auto sizes = tensors[0].sizes();
    const int64_t width = sizes.back();
    for (size_t k = 0; k < tensors.size(); ++k) {
      TORCH_CHECK_VALUE(tensors[k].sizes() == sizes, "smart_fast: shapes ", sizes, " and ", tensors[k].sizes(),
                        " differ");
      if (k != free && width != 1 && tensors[k].stride(-1) != 1) tensors[k] = tensors[k].contiguous();
    }
    if (!merge(sizes.slice(0, sizes.size() - 1))) {
      for (Tensor& tensor : tensors) tensor = tensor.contiguous();
      merge(sizes.slice(0, sizes.size() - 1));
    }
    shape.width = width;
    shape.rows = 1;
    for (const int64_t size : sizes.slice(0, sizes.size() - 1)) shape.rows *= size;
    for (size_t k = 0; k < tensors.size(); ++k) {
      rows[k].data = tensors[k].const_data_ptr();
      rows[k].dtype = dtype_of(tensors[k]);
      rows[k].column = tensors[k].stride(-1);
    }
  }

 private:
  bool merge(at::IntArrayRef leading) {
    int64_t sizes[3];
    size_t count = 0;
    std::vector<int64_t> strides(3 * tensors.size());
    for (size_t dim = 0; dim < leading.size(); ++dim) {
      if (leading[dim] == 1) continue;
      bool even = count > 0;
      for (size_t k = 0; even && k < tensors.size(); ++k)
        even = strides[3 * k + count - 1] == leading[dim] * tensors[k].stride(int64_t(dim));
      if (even) {
        sizes[count - 1] *= leading[dim];
      } else if (count == 3) {
        return false;
      } else {
        sizes[count++] = leading[dim];
      }
      for (size_t k = 0; k < tensors.size(); ++k) strides[3 * k + count - 1] = tensors[k].stride(int64_t(dim));
    }
    shape.size1 = count == 3 ? sizes[1] : 1;
    shape.size2 = count >= 2 ? sizes[count - 1] : 1;
    rows.resize(tensors.size());
    for (size_t k = 0; k < tensors.size(); ++k) {
      const int64_t* step = &strides[3 * k];
      rows[k].stride0 = count == 0 ? 0 : step[0];
      rows[k].stride1 = count == 3 ? step[1] : 0;
      rows[k].stride2 = count >= 2 ? step[count - 1] : 0;
    }
    return true;
  }
};

inline void check_statistics(const Tensor& stats, int64_t rows) {
  TORCH_CHECK_VALUE(stats.numel() == rows * statistics && stats.is_contiguous(),
                    "smart_fast: statistics of another forward pass");
}

// A byte for each row, kept alive by `holder`.
inline const uint8_t* mask_bytes(const optional<Tensor>& mask, int64_t rows, Tensor& holder) {
  if (!mask) return nullptr;
  TORCH_CHECK_VALUE(mask->numel() == rows, "smart_fast: a mask of ", mask->numel(), " entries for ", rows, " rows");
  holder = mask->contiguous();
  return reinterpret_cast<const uint8_t*>(holder.const_data_ptr<bool>());
}

// One fp32 number for each row, if there are any.
inline const float* row_units(const optional<Tensor>& unit, int64_t rows) {
  if (!unit) return nullptr;
  TORCH_CHECK_TYPE(unit->scalar_type() == at::kFloat, "smart_fast: units are float32, got ", unit->scalar_type());
  TORCH_CHECK_VALUE(unit->numel() == rows && unit->is_contiguous(), "smart_fast: units must be contiguous, one for each of ",
                    rows, " rows, got shape ", unit->sizes());
  return unit->const_data_ptr<float>();
}

// Norms, or what they are made of, one for each row.
inline Tensor row_norms(const optional<Tensor>& norm, int64_t rows, string_view scope) {
  TORCH_CHECK_VALUE(norm && norm->numel() == rows && norm->scalar_type() == at::kFloat, "smart_fast: scope ", scope,
                    " takes a float32 norm for each row");
  return norm->contiguous();
}

}  // namespace smart_fast
