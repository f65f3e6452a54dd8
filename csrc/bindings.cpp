// The operators torch.ops.smart_fast.native_*, and a Python module that says how they were built. Thin: shapes, strides
// and outputs here, arithmetic in the kernels. Arguments come in the order of the Triton operators (smart_fast/backends/
// triton_launch.py), what only a CPU wants added; the prefix lets both be registered in one process.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/result_type.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "eager.h"
#include "philox.h"
#include "pool.h"
#include "triton.h"

namespace smart_fast {
namespace {

// ---- outputs -------------------------------------------------------------------------------------------------------

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive every static object
  return *instance;
}

struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    Pool::Block* block = pool().take(size);
    c10::profiledCPUMemoryReporter().New(block->data, size);  // torch's profiler sees these outputs too
    return {block->data, block, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* memory) {
    auto* block = static_cast<Pool::Block*>(memory);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    pool().give_back(block);
  }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};

Tensor new_output(at::IntArrayRef shape, at::ScalarType dtype) {
  static PoolAllocator allocator;
  const size_t bytes = at::detail::computeStorageNbytesContiguous(shape, c10::elementSize(dtype));
  Tensor out = bytes < Pool::smallest
                   ? Tensor(at::detail::empty_cpu(shape, dtype))
                   : Tensor(at::detail::empty_generic(shape, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                      dtype, std::nullopt));
  if (fill_outputs()) std::memset(out.mutable_data_ptr(), 0xFF, bytes);
  return out;
}

bool stream(const Tensor& out) { return int64_t(out.nbytes()) >= cpu::stream_bytes; }

Tensor nothing(at::ScalarType dtype) { return at::detail::empty_cpu({0}, dtype); }

// ---- arguments -----------------------------------------------------------------------------------------------------

// `noise` is the int64 seed or fp32 noise of `shape`.
const float* noise_or_seed(const Tensor& noise, int64_t size, Tensor& holder, uint64_t& seed) {
  if (noise.scalar_type() == at::kLong) {
    seed = uint64_t(*noise.const_data_ptr<int64_t>());
    return nullptr;
  }
  TORCH_CHECK_VALUE(noise.numel() == size, "smart_fast: noise of ", noise.numel(), " elements for ", size);
  holder = noise.contiguous();
  seed = 0;
  return holder.const_data_ptr<float>();
}

// ---- threads -------------------------------------------------------------------------------------------------------

struct AlignedFree {
  void operator()(float* memory) const { std::free(memory); }
};

// Chunks over torch's threads, each with its own scratch memory. Small work stays on the caller's thread.
template <class Body>
void parallel(int64_t chunks, int64_t elements_per_chunk, int64_t scratch, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, elements_per_chunk));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const size_t bytes = (size_t(scratch) * sizeof(float) + 63) / 64 * 64;
    std::unique_ptr<float, AlignedFree> memory(static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(64, bytes))));
    if (memory == nullptr) throw std::bad_alloc();
    body(begin, end, memory.get());
  });
}

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_perturb(const Tensor& embed, uint64_t seed, double noise_var,
                                       const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                       string_view noise_kind) {
  const View view({embed});
  Tensor out = new_output(embed.sizes(), embed.scalar_type());
  Tensor noise = keep_noise ? new_output(embed.sizes(), at::kFloat) : nothing(at::kFloat);
  Tensor holder;
  cpu::Perturb args = {view.shape, view.rows[0], mask_bytes(mask, view.shape.rows, holder),
                       row_units(unit, view.shape.rows), seed, noise_kind_of(noise_kind), float(noise_var),
                       out.mutable_data_ptr(), keep_noise ? noise.mutable_data_ptr<float>() : nullptr, stream(out)};
  const auto run = cpu::kernels().perturb;
  parallel((embed.numel() + cpu::perturb_chunk - 1) / cpu::perturb_chunk, cpu::perturb_chunk, 0,
           [&](int64_t begin, int64_t end, float*) { run(args, begin, end); });
  return {out, noise};
}

std::tuple<Tensor, Tensor> perturb(const Tensor& embed, const Tensor& seed, double noise_var,
                                   const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                   string_view noise_kind) {
  return run_perturb(embed, uint64_t(*seed.const_data_ptr<int64_t>()), noise_var, mask, keep_noise, unit, noise_kind);
}

// The seed that torch.randint(2**63 - 1, (1,)) would draw.
uint64_t draw(const optional<at::Generator>& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> guard(source->mutex_);
  return source->random64() % 0x7FFFFFFFFFFFFFFFu;
}

std::tuple<Tensor, Tensor> perturb_fresh(const Tensor& embed, optional<at::Generator> generator, double noise_var,
                                         const optional<Tensor>& mask, bool keep_noise, const optional<Tensor>& unit,
                                         string_view noise_kind) {
  return run_perturb(embed, draw(generator), noise_var, mask, keep_noise, unit, noise_kind);
}

// Norms of groups of rows from the partial norms of the rows.
std::vector<float> group_norms(const Tensor& partial, int64_t group, Norm norm, Update update) {
  const float* values = partial.const_data_ptr<float>();
  std::vector<float> norms(size_t(partial.numel() / group));
  for (size_t g = 0; g < norms.size(); ++g) norms[g] = group_norm(values + int64_t(g) * group, group, norm, update);
  return norms;
}

Tensor ascend_norm(const Tensor& grad, const Tensor& noise, const optional<Tensor>& norm,
                      const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind, double noise_var,
                      double step_size, string_view update, string_view noise_kind) {
  const View view({grad});
  const Shape& shape = view.shape;
  cpu::Ascend args = {};
  args.shape = shape;
  args.grad = view.rows[0];
  Tensor mask_holder, noise_holder;
  args.mask = mask_bytes(mask, shape.rows, mask_holder);
  args.noise = noise_or_seed(noise, grad.numel(), noise_holder, args.seed);
  args.kind = noise_kind_of(noise_kind);
  args.noise_var = float(noise_var);
  args.step_size = float(step_size);
  args.update = update_of(update);
  args.norm = norm_of(kind);
  args.unit = row_units(unit, shape.rows);
  std::vector<float> norms;
  if (norm) {
    args.group = shape.rows / grad.size(0);
    norms = group_norms(row_norms(norm, shape.rows, "group"), args.group, args.norm, args.update);
    args.norms = norms.data();
  }
  Tensor out = args.norm == Norm::opaque ? new_output(grad.sizes(), at::kFloat) : new_output({shape.rows}, at::kFloat);
  args.measured = out.mutable_data_ptr<float>();
  const auto run = cpu::kernels().measure;
  parallel(cpu::chunks(shape.rows, shape.width), cpu::rows_per_chunk(shape.width) * shape.width,
           cpu::ascend_scratch(shape.width),
           [&](int64_t begin, int64_t end, float* scratch) { run(args, begin, end, scratch); });
  return out;
}

std::tuple<Tensor, Tensor> ascend(const Tensor& embed, const Tensor& grad, const Tensor& noise,
                                  const optional<Tensor>& norm, const optional<Tensor>& moved_norm,
                                  const optional<Tensor>& mask, const optional<Tensor>& unit, string_view kind,
                                  string_view scope, double noise_var, double step_size, string_view update,
                                  double epsilon, bool keep_noise, string_view noise_kind) {
  const View view({embed, grad});
  const Shape& shape = view.shape;
  Tensor out = new_output(embed.sizes(), embed.scalar_type());
  Tensor noise_out = keep_noise ? new_output(embed.sizes(), at::kFloat) : nothing(at::kFloat);
  cpu::Ascend args = {};
  args.shape = shape;
  args.embed = view.rows[0];
  args.grad = view.rows[1];
  Tensor mask_holder, noise_holder, norm_holder;
  args.mask = mask_bytes(mask, shape.rows, mask_holder);
  args.noise = noise_or_seed(noise, embed.numel(), noise_holder, args.seed);
  args.kind = noise_kind_of(noise_kind);
  args.noise_var = float(noise_var);
  args.step_size = float(step_size);
  args.epsilon = float(epsilon);
  args.update = update_of(update);
  args.norm = norm_of(kind);
  args.unit = row_units(unit, shape.rows);
  args.group = 1;
  std::vector<float> norms, moved_norms;
  if (scope != "row") {
    norm_holder = row_norms(norm, shape.rows, scope);
    args.norms = norm_holder.const_data_ptr<float>();
  }
  if (scope == "group") {
    args.group = shape.rows / embed.size(0);
    norms = group_norms(norm_holder, args.group, args.norm, args.update);
    args.norms = norms.data();
    if (moved_norm) {
      moved_norms = group_norms(row_norms(moved_norm, shape.rows, scope), args.group, args.norm, args.update);
      args.moved_norms = moved_norms.data();
    }
  }
  args.out = out.mutable_data_ptr();
  args.stream = stream(out);
  args.noise_out = keep_noise ? noise_out.mutable_data_ptr<float>() : nullptr;
  const auto run = cpu::kernels().ascend;
  parallel(cpu::chunks(shape.rows, shape.width), cpu::rows_per_chunk(shape.width) * shape.width,
           cpu::ascend_scratch(shape.width),
           [&](int64_t begin, int64_t end, float* scratch) { run(args, begin, end, scratch); });
  return {out, noise_out};
}

// What forward and backward passes have in common; `holder` keeps the mask alive.
cpu::Divergence divergence_arguments(const View& view, const optional<Tensor>& mask, Tensor& holder, double scale,
                                     bool from_difference) {
  cpu::Divergence args = {};
  args.shape = view.shape;
  args.x = view.rows[0];
  args.t = view.rows[1];
  args.mask = mask_bytes(mask, view.shape.rows, holder);
  args.alpha = args.weight = 1;
  args.scale = float(scale);
  args.from_difference = from_difference;
  return args;
}

void run_divergence(void (*run)(const cpu::Divergence&, int64_t, int64_t, float*), const cpu::Divergence& args) {
  const int64_t width = args.shape.width;
  parallel(cpu::chunks(args.shape.rows, width), cpu::rows_per_chunk(width) * width, cpu::divergence_scratch(width),
           [&](int64_t begin, int64_t end, float* scratch) { run(args, begin, end, scratch); });
}

// A gradient like `tensor` and where a kernel writes it, if wanted.
Tensor gradient_like(const Tensor& tensor, bool wanted, void*& data) {
  if (!wanted) return nothing(tensor.scalar_type());
  Tensor out = new_output(tensor.sizes(), tensor.scalar_type());
  data = out.mutable_data_ptr();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_forward(const Tensor& input, const Tensor& target,
                                                              const optional<Tensor>& mask, string_view kind,
                                                              string_view output, double alpha, double weight,
                                                              double scale, bool from_difference, bool keep, bool want_input,
                                                              bool want_target, double rescale) {
  const View view({input, target});
  const Output shape = output_of(output);
  Tensor holder;
  cpu::Divergence args = divergence_arguments(view, mask, holder, scale, from_difference);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  args.weight = float(weight);
  args.upstream = float(weight * scale);
  args.rescale = float(rescale);
  const int64_t rows = view.shape.rows;
  const at::IntArrayRef leading = input.sizes().slice(0, input.dim() - 1);
  Tensor loss = shape == Output::terms ? new_output(input.sizes(), at::result_type(input, target))
                : shape == Output::rows ? new_output(leading, at::kFloat)
                                        : Tensor(at::detail::empty_cpu({}, at::kFloat));
  Tensor stats = keep ? new_output({rows, statistics}, at::kFloat) : nothing(at::kFloat);
  Tensor dx = gradient_like(input, want_input, args.dx), dt = gradient_like(target, want_target, args.dt);
  std::vector<double> partial;
  if (shape == Output::terms) {
    TORCH_CHECK_VALUE(!want_input && !want_target, "smart_fast: elementwise terms need their upstream gradient");
    args.terms = loss.mutable_data_ptr();
    args.terms_dtype = dtype_of(loss);
  } else if (shape == Output::rows) {
    args.losses = loss.mutable_data_ptr<float>();
  } else {
    partial.resize(size_t(cpu::chunks(rows, view.shape.width)));
    args.partial = partial.data();
  }
  args.stats = keep ? stats.mutable_data_ptr<float>() : nullptr;
  args.stream = stream(loss) || stream(dx) || stream(dt);
  run_divergence(cpu::kernels().divergence_forward, args);
  if (shape == Output::sum) {
    double sum = 0;
    for (const double each : partial) sum += each;
    *loss.mutable_data_ptr<float>() = float(weight * sum);
  }
  return {loss, stats, dx, dt};
}

std::tuple<Tensor, Tensor> divergence_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                               const Tensor& stats, const optional<Tensor>& mask, string_view kind,
                                               string_view output, double alpha, double weight, double scale,
                                               bool from_difference, bool want_input, bool want_target) {
  const Output shape = output_of(output);
  const View view = shape == Output::sum ? View({input, target}) : View({input, target, upstream_of(grad, input, shape)}, 2);
  Tensor holder;
  cpu::Divergence args = divergence_arguments(view, mask, holder, scale, from_difference);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  check_statistics(stats, view.shape.rows);
  args.stats = const_cast<float*>(stats.const_data_ptr<float>());
  Tensor dx = gradient_like(input, want_input, args.dx), dt = gradient_like(target, want_target, args.dt);
  args.stream = stream(dx) || stream(dt);
  if (shape != Output::sum) args.grad = view.rows[2];
  args.upstream = float(weight * scale * (shape == Output::sum ? grad.item<double>() : 1.0));
  run_divergence(shape == Output::terms ? cpu::kernels().divergence_elements_backward : cpu::kernels().divergence_backward,
                 args);
  return {dx, dt};
}

// Takes the whole specification, as every operator of the divergences does; what it gives depends on the logits alone.
Tensor divergence_parts(const Tensor& input, const Tensor& target, const optional<Tensor>& mask, string_view, string_view,
                          double, double, double scale, bool from_difference) {
  const View view({input, target});
  Tensor holder;
  cpu::Divergence args = divergence_arguments(view, mask, holder, scale, from_difference);
  Tensor measured = new_output({view.shape.rows, parts}, at::kFloat);
  args.stats = measured.mutable_data_ptr<float>();
  run_divergence(cpu::kernels().divergence_parts, args);
  return measured;
}

Tensor divergence_finish(const Tensor& input, const Tensor& target, const Tensor& stats, const optional<Tensor>& mask,
                         string_view kind, string_view, double alpha, double, double scale, bool from_difference) {
  const View view({input, target});
  Tensor holder;
  cpu::Divergence args = divergence_arguments(view, mask, holder, scale, from_difference);
  args.kind = kind_of(kind);
  args.alpha = float(alpha);
  check_statistics(stats, view.shape.rows);
  args.stats = const_cast<float*>(stats.const_data_ptr<float>());
  Tensor losses = new_output({view.shape.rows, shares}, at::kFloat);
  args.losses = losses.mutable_data_ptr<float>();
  run_divergence(cpu::kernels().divergence_finish, args);
  return losses;
}

Tensor fisher_direction(const Tensor& logits, bool wide) {
  Tensor out = new_output(logits.sizes(), wide ? at::kFloat : logits.scalar_type());
  if (out.numel() == 0) return out;
  const View view({logits});
  const int64_t width = view.shape.width;
  const cpu::Fisher args = {view.shape, view.rows[0], out.mutable_data_ptr(), dtype_of(out), stream(out)};
  const auto run = cpu::kernels().fisher_direction;
  parallel(cpu::chunks(view.shape.rows, width), cpu::rows_per_chunk(width) * width, cpu::fisher_scratch(width),
           [&](int64_t begin, int64_t end, float* scratch) { run(args, begin, end, scratch); });
  return out;
}

// ---- how it was built ----------------------------------------------------------------------------------------------

template <size_t N>
pybind11::list names_of(const char* const (&names)[N]) {
  pybind11::list list;
  for (const char* name : names) list.append(name);
  return list;
}

pybind11::dict built_with() {
  pybind11::dict about;
#if defined(__clang__)
  about["compiler"] = "clang " __clang_version__;
#else
  about["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  about["threads"] = "openmp";
#else
  about["threads"] = "one";
#endif
  about["torch"] = TORCH_VERSION;
  pybind11::list sets;
  for (const char* name : {"avx512", "avx2", "portable"})
    if (cpu::runs_here(name)) sets.append(name);
  about["instruction_sets"] = sets;  // those that this machine runs, widest first
  about["instruction_set"] = cpu::kernels().name;
#if defined(SMART_FAST_CUDA)
  about["cuda"] = true;
#else
  about["cuda"] = false;
#endif
  about["divergences"] = names_of(kind_names);
  about["norms"] = names_of(norm_names);
  about["updates"] = names_of(update_names);
  about["noises"] = names_of(noise_names);
  return about;
}

}  // namespace
}  // namespace smart_fast

TORCH_LIBRARY_FRAGMENT(smart_fast, library) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  library.def("native_perturb(Tensor embed, Tensor seed, float noise_var, Tensor? mask, bool keep_noise,"
              " Tensor? unit=None, str noise_kind=\"normal\") -> (Tensor, Tensor)", tags);
  // Draws its own seed. The second result is what ascend takes as noise: its values, or on a GPU the seed.
  library.def("native_perturb_fresh(Tensor embed, Generator? generator, float noise_var, Tensor? mask, bool keep_noise,"
              " Tensor? unit=None, str noise_kind=\"normal\") -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  library.def("native_ascend_norm(Tensor grad, Tensor noise, Tensor? norm, Tensor? mask, Tensor? unit, str kind,"
              " float noise_var, float step_size, str update, str noise_kind=\"normal\") -> Tensor", tags);
  library.def("native_ascend(Tensor embed, Tensor grad, Tensor noise, Tensor? norm, Tensor? moved_norm, Tensor? mask,"
              " Tensor? unit, str kind, str scope, float noise_var, float step_size, str update, float epsilon,"
              " bool keep_noise, str noise_kind=\"normal\") -> (Tensor, Tensor)", tags);
  library.def("native_divergence(Tensor input, Tensor target, Tensor? mask, str kind, str output, float alpha,"
              " float weight, float scale, bool from_difference) -> Tensor", tags);
  library.def("native_divergence_forward(Tensor input, Tensor target, Tensor? mask, str kind, str output, float alpha,"
              " float weight, float scale, bool from_difference, bool keep, bool want_input, bool want_target,"
              " float rescale=1.0) -> (Tensor, Tensor, Tensor, Tensor)", tags);
  library.def("native_divergence_backward(Tensor grad, Tensor input, Tensor target, Tensor stats, Tensor? mask,"
              " str kind, str output, float alpha, float weight, float scale, bool from_difference, bool want_input,"
              " bool want_target) -> (Tensor, Tensor)", tags);
  library.def("native_divergence_parts(Tensor input, Tensor target, Tensor? mask, str kind, str output, float alpha,"
              " float weight, float scale, bool from_difference) -> Tensor", tags);
  library.def("native_divergence_finish(Tensor input, Tensor target, Tensor stats, Tensor? mask, str kind, str output,"
              " float alpha, float weight, float scale, bool from_difference) -> Tensor", tags);
  library.def("native_fisher_direction(Tensor logits, bool wide) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(smart_fast, CPU, library) {
  library.impl("native_perturb", &smart_fast::perturb);
  library.impl("native_perturb_fresh", &smart_fast::perturb_fresh);
  library.impl("native_ascend_norm", &smart_fast::ascend_norm);
  library.impl("native_ascend", &smart_fast::ascend);
  library.impl("native_divergence_forward", &smart_fast::divergence_forward);
  library.impl("native_divergence_backward", &smart_fast::divergence_backward);
  library.impl("native_divergence_parts", &smart_fast::divergence_parts);
  library.impl("native_divergence_finish", &smart_fast::divergence_finish);
  library.impl("native_fisher_direction", &smart_fast::fisher_direction);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("built_with", &smart_fast::built_with, "Compiler, torch version, instruction sets and the names that operators know, as a dict.");
  module.def("use_instruction_set", &smart_fast::cpu::choose,
             "Run the kernels of this instruction set (\"auto\": the widest); False if this machine cannot.");
  module.def("empty_cache", [] { return smart_fast::pool().clear(); }, "Free the blocks kept for outputs; bytes freed.");
  module.def("cached_bytes", [] { return smart_fast::pool().bytes(); }, "Bytes kept for outputs.");
  smart_fast::define_eager(module);
  smart_fast::define_triton(module);
}
