// The CUDA half of the operators torch.ops.smart_fast.native_*, whose schemas are in ../bindings.cpp. Thin: shapes,
// strides, outputs, device and stream here, arithmetic in the kernels. ATen/cuda/CUDAContext.h would want the headers of
// cuBLAS and cuSPARSE; c10's are enough.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <mutex>
#include <tuple>

#include "../arguments.h"
#include "kernels.h"

namespace smart_fast {
namespace on_cuda {
namespace {

using cuda::Ascend;
using cuda::Divergence;
using cuda::Perturb;
using cuda::Seed;

constexpr int64_t most_in_kernel = 1024;  // partial norms that every row of a group adds up again

// Makes the device of a tensor the current one, and knows its stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.device()), device_(tensor.device()) {}

  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }

  void same_device(const Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.device() == device_, "smart_fast: tensors on ", device_, " and ", tensor.device());
  }
  void same_device(const optional<Tensor>& tensor) const {
    if (tensor) same_device(*tensor);
  }

  Tensor output(at::IntArrayRef shape, at::ScalarType dtype) const {
    Tensor out = Tensor(at::detail::empty_cuda(shape, dtype, device_, std::nullopt));
    if (fill_outputs() && out.numel() > 0)
      C10_CUDA_CHECK(cudaMemsetAsync(out.mutable_data_ptr(), 0xFF, out.nbytes(), stream()));
    return out;
  }
  Tensor output_if(bool wanted, at::IntArrayRef shape, at::ScalarType dtype) const {
    return wanted ? output(shape, dtype) : Tensor(at::detail::empty_cuda({0}, dtype, device_, std::nullopt));
  }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::Device device_;
};

template <class T>
T* pointer_if(bool wanted, const Tensor& tensor) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// A seed for one call from a generator's state, advanced. Under graph capture the state stays on the device.
Seed draw(const optional<at::Generator>& generator, c10::DeviceIndex device) {
  auto* source = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> guard(source->mutex_);
    state = source->philox_cuda_state(4);
  }
  Seed seed = {};
  if (state.captured_) {
    seed.generator_seed_ptr = state.seed_.ptr;
    seed.offset_ptr = state.offset_.ptr;
    seed.offset = state.offset_intragraph_;
  } else {
    seed.generator_seed = state.seed_.val;
    seed.offset = state.offset_.val;
  }
  return seed;
}

std::tuple<Tensor, Tensor> run_perturb(const Tensor& embed, const Seed& seed, int64_t* seed_out, double noise_var,
                                       const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                       string_view noise_kind, const Launch& launch) {
  const View view({embed});
  launch.same_device(mask);
  launch.same_device(unit);
  const Tensor out = launch.output(embed.sizes(), embed.scalar_type());
  const Tensor noise = launch.output_if(keep_noise, embed.sizes(), at::kFloat);
  Tensor holder;
  const Perturb args = {view.shape, view.rows[0], mask_bytes(mask, view.shape.rows, holder),
                        row_units(unit, view.shape.rows), seed, seed_out, noise_kind_of(noise_kind), float(noise_var),
                        out.mutable_data_ptr(), pointer_if<float>(keep_noise, noise)};
  C10_CUDA_CHECK(cuda::perturb(args, launch.stream()));
  return {out, noise};
}

std::tuple<Tensor, Tensor> perturb(const Tensor& embed, const Tensor& seed, double noise_var,
                                   const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                   string_view noise_kind) {
  const Launch launch(embed);
  launch.same_device(seed);
  Seed given = {};
  given.given = seed.const_data_ptr<int64_t>();
  return run_perturb(embed, given, nullptr, noise_var, mask, keep_noise, unit, noise_kind, launch);
}

// Noise from the state of a generator instead of a seed in memory, without a launch of its own. A GPU computes noise again
// sooner than it reads it back: the seed is all that is kept.
std::tuple<Tensor, Tensor> perturb_fresh(const Tensor& embed, optional<at::Generator> generator, double noise_var,
                                         const optional<Tensor>& mask, bool, const optional<Tensor>& unit,
                                         string_view noise_kind) {
  const Launch launch(embed);
  const Tensor seed = launch.output({1}, at::kLong);
  const Tensor out = std::get<0>(run_perturb(embed, draw(generator, embed.device().index()),
                                             seed.mutable_data_ptr<int64_t>(), noise_var, mask, false, unit,
                                             noise_kind, launch));
  return {out, seed};
}

// What measuring and moving have in common. `noise` is the int64 seed or fp32 noise of the shape of the gradient.
Ascend ascend_arguments(const View& view, const Tensor& noise, const optional<Tensor>& mask, string_view kind,
                        double noise_var, double step_size, string_view update, string_view noise_kind,
                        const optional<Tensor>& unit, Tensor& noise_holder, Tensor& mask_holder, const Launch& launch) {
  launch.same_device(noise);
  launch.same_device(mask);
  launch.same_device(unit);
  Ascend args = {};
  args.shape = view.shape;
  args.embed = view.rows.front();
  args.grad = view.rows.back();
  args.mask = mask_bytes(mask, view.shape.rows, mask_holder);
  args.unit = row_units(unit, view.shape.rows);
  if (noise.scalar_type() == at::kLong) {
    args.seed = noise.const_data_ptr<int64_t>();
  } else {
    const int64_t elements = view.shape.rows * view.shape.width;
    TORCH_CHECK_VALUE(noise.numel() == elements, "smart_fast: noise of ", noise.numel(), " elements for ", elements);
    noise_holder = noise.contiguous();
    if (reinterpret_cast<uintptr_t>(noise_holder.const_data_ptr()) % 16 != 0) noise_holder = noise_holder.clone();
    args.noise = noise_holder.const_data_ptr<float>();
  }
  args.kind = noise_kind_of(noise_kind);
  args.noise_var = float(noise_var);
  args.step_size = float(step_size);
  args.update = update_of(update);
  args.norm = norm_of(kind);
  args.group = 1;
  return args;
}

// Norms of groups from the partial norms of their rows.
Tensor group_norms(const Tensor& partial, const Ascend& args) {
  const Tensor grouped = partial.view({-1, args.group});
  if (args.norm == Norm::inf) return at::amax(grouped, 1);
  if (args.norm == Norm::l1) return at::sum(grouped, 1);
  if (args.update != Update::paper) return at::sqrt(at::sum(grouped, 1));
  return at::sqrt(at::sum(grouped.to(at::kDouble).square(), 1)).to(at::kFloat);
}

// The norms that a scope comes with, kept alive by `holder`: partial ones where the kernel is to add them up itself.
const float* norms_of(const optional<Tensor>& norm, string_view scope, Ascend& args, Tensor& holder) {
  holder = row_norms(norm, args.shape.rows, scope);
  args.partial_norms = scope == "group" && args.group <= most_in_kernel;
  if (args.group > most_in_kernel) holder = group_norms(holder.view(-1), args);
  return holder.const_data_ptr<float>();
}

Tensor ascend_norm(const Tensor& grad, const Tensor& noise, const optional<Tensor>& norm,
                      const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind, double noise_var,
                      double step_size, string_view update, string_view noise_kind) {
  const Launch launch(grad);
  const View view({grad});
  const int64_t rows = view.shape.rows;
  Tensor noise_holder, mask_holder, norm_holder;
  Ascend args = ascend_arguments(view, noise, mask, kind, noise_var, step_size, update, noise_kind, unit, noise_holder,
                                 mask_holder, launch);
  if (norm && rows > 0) {
    launch.same_device(norm);
    args.group = rows / grad.size(0);
    args.norms = norms_of(norm, "group", args, norm_holder);
  }
  const Tensor out = args.norm == Norm::opaque ? launch.output(grad.sizes(), at::kFloat)
                                               : launch.output({rows}, at::kFloat);
  args.measured = out.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::ascend(args, launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, string_view noise_kind) {
  const Launch launch(embed);
  launch.same_device(grad);
  const View view({embed, grad});
  const int64_t rows = view.shape.rows;
  Tensor noise_holder, mask_holder, norm_holder, moved_holder;
  Ascend args = ascend_arguments(view, noise, mask, kind, noise_var, step_size, update, noise_kind, unit, noise_holder,
                                 mask_holder, launch);
  args.epsilon = float(epsilon);
  if (scope != "row" && rows > 0) {
    TORCH_CHECK_VALUE(scope == "group" || scope == "given", "smart_fast: unknown scope ", scope);
    launch.same_device(norm);
    launch.same_device(moved_norm);
    if (scope == "group") args.group = rows / embed.size(0);
    args.norms = norms_of(norm, scope, args, norm_holder);
    if (moved_norm) args.moved_norms = norms_of(moved_norm, scope, args, moved_holder);
  }
  const Tensor out = launch.output(embed.sizes(), embed.scalar_type());
  const Tensor noise_out = launch.output_if(keep_noise, embed.sizes(), at::kFloat);
  args.out = out.mutable_data_ptr();
  args.noise_out = pointer_if<float>(keep_noise, noise_out);
  C10_CUDA_CHECK(cuda::ascend(args, launch.stream()));
  return {out, noise_out};
}

Divergence divergence_arguments(const View& view, const optional<Tensor>& mask, double scale, bool from_difference,
                                Tensor& holder, const Launch& launch) {
  for (const Tensor& tensor : view.tensors) launch.same_device(tensor);
  launch.same_device(mask);
  Divergence args = {};
  args.shape = view.shape;
  args.x = view.rows[0];
  args.t = view.rows[1];
  args.mask = mask_bytes(mask, view.shape.rows, holder);
  args.alpha = args.weight = 1;
  args.scale = float(scale);
  args.from_difference = from_difference;
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_forward(const Tensor& input, const Tensor& target,
                                                              const optional<Tensor>& mask, string_view kind,
                                                              string_view output, double alpha, double weight,
                                                              double scale, bool from_difference, bool keep, bool want_input,
                                                              bool want_target, double rescale) {
  const Output form = output_of(output);
  TORCH_CHECK_VALUE(form != Output::terms || !(want_input || want_target),
                    "smart_fast: elementwise terms need their upstream gradient");
  const Launch launch(input);
  const View view({input, target});
  Tensor holder, partial;
  Divergence args = divergence_arguments(view, mask, scale, from_difference, holder, launch);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  args.weight = float(weight);
  const Tensor loss = form == Output::terms  ? launch.output(input.sizes(), at::result_type(input, target))
                      : form == Output::rows ? launch.output(input.sizes().slice(0, input.dim() - 1), at::kFloat)
                                             : launch.output({}, at::kFloat);
  const Tensor stats = launch.output_if(keep || want_input || want_target, {view.shape.rows, statistics}, at::kFloat);
  if (form == Output::terms) {
    args.terms = loss.mutable_data_ptr();
    args.terms_dtype = dtype_of(loss);
  } else if (form == Output::rows) {
    args.losses = loss.mutable_data_ptr<float>();
  } else {
    args.loss = loss.mutable_data_ptr<float>();
    int64_t partials = 0;
    C10_CUDA_CHECK(cuda::forward_partials(args, partials));
    partial = launch.output_if(partials > 1, {partials}, at::kFloat);
    args.partial = pointer_if<float>(partials > 1, partial);
  }
  args.stats = pointer_if<float>(stats.numel() > 0, stats);
  C10_CUDA_CHECK(cuda::divergence_forward(args, launch.stream()));

  const Tensor dx = launch.output_if(want_input, input.sizes(), input.scalar_type());
  const Tensor dt = launch.output_if(want_target, target.sizes(), target.scalar_type());
  if (want_input || want_target) {
    args.dx = pointer_if<void>(want_input, dx);
    args.dt = pointer_if<void>(want_target, dt);
    args.weight = float(weight * scale * rescale);
    C10_CUDA_CHECK(cuda::divergence_backward(args, launch.stream()));
  }
  return {loss, stats, dx, dt};
}

std::tuple<Tensor, Tensor> divergence_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                               const Tensor& stats, const optional<Tensor>& mask, string_view kind,
                                               string_view output, double alpha, double weight, double scale,
                                               bool from_difference, bool want_input, bool want_target) {
  const Output form = output_of(output);
  const Launch launch(input);
  const View view = form == Output::sum ? View({input, target}) : View({input, target, upstream_of(grad, input, form)}, 2);
  Tensor holder;
  Divergence args = divergence_arguments(view, mask, scale, from_difference, holder, launch);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  args.weight = float(weight * scale);
  launch.same_device(grad);
  launch.same_device(stats);
  check_statistics(stats, view.shape.rows);
  args.stats = const_cast<float*>(stats.const_data_ptr<float>());
  const Tensor dx = launch.output_if(want_input, input.sizes(), input.scalar_type());
  const Tensor dt = launch.output_if(want_target, target.sizes(), target.scalar_type());
  args.dx = pointer_if<void>(want_input, dx);
  args.dt = pointer_if<void>(want_target, dt);
  if (form != Output::sum) args.grad = view.rows[2];
  if (form == Output::terms) {
    C10_CUDA_CHECK(cuda::divergence_elements_backward(args, launch.stream()));
    return {dx, dt};
  }
  if (form == Output::sum) {
    TORCH_CHECK_VALUE(grad.numel() == 1, "smart_fast: a scalar loss has a scalar gradient, got shape ", grad.sizes());
    args.upstream = grad.const_data_ptr();
    args.upstream_dtype = dtype_of(grad);
  }
  C10_CUDA_CHECK(cuda::divergence_backward(args, launch.stream()));
  return {dx, dt};
}

Tensor divergence_parts(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, string_view, string_view,
                          double, double, double scale, bool from_difference) {
  const Launch launch(input);
  const View view({input, target});
  Tensor holder;
  Divergence args = divergence_arguments(view, mask, scale, from_difference, holder, launch);
  const Tensor measured = launch.output({view.shape.rows, parts}, at::kFloat);
  args.parts = measured.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::divergence_forward(args, launch.stream()));
  return measured;
}

Tensor divergence_finish(const Tensor& input, const Tensor& target, const Tensor& stats, const optional<Tensor>& mask,
                         string_view kind, string_view, double alpha, double, double scale, bool from_difference) {
  const Launch launch(input);
  const View view({input, target});
  Tensor holder;
  Divergence args = divergence_arguments(view, mask, scale, from_difference, holder, launch);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  launch.same_device(stats);
  check_statistics(stats, view.shape.rows);
  args.stats = const_cast<float*>(stats.const_data_ptr<float>());
  const Tensor losses = launch.output({view.shape.rows, shares}, at::kFloat);
  args.losses = losses.mutable_data_ptr<float>();
  C10_CUDA_CHECK(cuda::divergence_finish(args, launch.stream()));
  return losses;
}

Tensor fisher_direction(const Tensor& logits, bool wide) {
  const Launch launch(logits);
  const Tensor out = launch.output(logits.sizes(), wide ? at::kFloat : logits.scalar_type());
  const View view({logits});
  const cuda::Fisher args = {view.shape, view.rows[0], out.mutable_data_ptr(), dtype_of(out)};
  C10_CUDA_CHECK(cuda::fisher_direction(args, launch.stream()));
  return out;
}

}  // namespace
}  // namespace on_cuda
}  // namespace smart_fast

TORCH_LIBRARY_IMPL(smart_fast, CUDA, library) {
  library.impl("native_perturb", &smart_fast::on_cuda::perturb);
  library.impl("native_perturb_fresh", &smart_fast::on_cuda::perturb_fresh);
  library.impl("native_ascend_norm", &smart_fast::on_cuda::ascend_norm);
  library.impl("native_ascend", &smart_fast::on_cuda::ascend);
  library.impl("native_divergence_forward", &smart_fast::on_cuda::divergence_forward);
  library.impl("native_divergence_backward", &smart_fast::on_cuda::divergence_backward);
  library.impl("native_divergence_parts", &smart_fast::on_cuda::divergence_parts);
  library.impl("native_divergence_finish", &smart_fast::on_cuda::divergence_finish);
  library.impl("native_fisher_direction", &smart_fast::on_cuda::fisher_direction);
}
