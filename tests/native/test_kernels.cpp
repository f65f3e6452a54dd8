// The CPU kernels without torch, for AddressSanitizer and UndefinedBehaviorSanitizer: every instruction set, dtype,
// kind, norm and awkward width, in buffers that end where their tensors end.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "pool.h"

using namespace smart_fast;

namespace {

int failures = 0;

void check(bool fine, const char* what, int64_t width) {
  if (fine) return;
  std::printf("%s: %s, width %lld\n", cpu::kernels().name, what, static_cast<long long>(width));
  ++failures;
}

// A tensor of pseudo-random numbers in memory of exactly its size, at an odd offset from any boundary.
struct Tensor {
  std::vector<uint8_t> memory;
  Dtype dtype;

  Tensor(int64_t count, Dtype dtype, uint32_t seed = 0) : memory(size_t(count) * size_of(dtype)), dtype(dtype) {
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float value = float(int32_t(seed)) / 1e9f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype == Dtype::fp32) {
        std::memcpy(&memory[size_t(i) * 4], &bits, 4);
      } else {  // bf16; as fp16 the same bits are some number of either sign
        const uint16_t half = uint16_t(bits >> 16) & (dtype == Dtype::fp16 ? 0xBFFFu : 0xFFFFu);
        std::memcpy(&memory[size_t(i) * 2], &half, 2);
      }
    }
  }
  static size_t size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }
  void* data() { return memory.data(); }
  float* floats() { return reinterpret_cast<float*>(memory.data()); }
};

struct Scratch {
  float* memory;
  explicit Scratch(int64_t floats)
      : memory(static_cast<float*>(std::aligned_alloc(64, (size_t(floats) * 4 + 63) / 64 * 64))) {}
  ~Scratch() { std::free(memory); }
};

const Dtype dtypes[] = {Dtype::fp32, Dtype::bf16, Dtype::fp16};

void perturb_and_ascend(int64_t rows, int64_t width) {
  for (const Dtype dtype : dtypes)
    for (int variant = 0; variant < 16; ++variant) {
      const bool masked = variant & 1, strided = variant & 2, stream = variant & 4, relative = variant & 8;
      const int64_t step = strided ? width + 3 : width;
      Tensor embed(rows * step, dtype, 1), grad(rows * step, dtype, 2), out(rows * width, dtype);
      Tensor noise(rows * width, Dtype::fp32), next(rows * width, Dtype::fp32);
      std::vector<uint8_t> mask(size_t(rows), 1);
      mask[0] = 0;
      const Shape shape = {rows, width, 1, 1};
      const Rows embed_rows = {embed.data(), dtype, step, 0, 0, 1}, grad_rows = {grad.data(), dtype, step, 0, 0, 1};
      const uint8_t* mask_bytes = masked ? mask.data() : nullptr;
      std::vector<float> units(size_t(rows), 0.3f);
      units.back() = 0;
      const float* unit = relative ? units.data() : nullptr;
      cpu::Perturb perturb = {};
      perturb.shape = shape;
      perturb.embed = embed_rows;
      perturb.mask = mask_bytes;
      perturb.unit = unit;
      perturb.seed = 42;
      perturb.noise_var = 0.1f;
      perturb.out = out.data();
      perturb.noise_out = noise.floats();
      perturb.stream = stream;
      for (const Noise kind : {Noise::uniform, Noise::normal}) {
        perturb.kind = kind;
        cpu::kernels().perturb(perturb, 0, (rows * width + cpu::perturb_chunk - 1) / cpu::perturb_chunk);
        check(!masked || noise.floats()[0] == 0, "masked noise", width);
      }

      const Scratch scratch(cpu::ascend_scratch(width));
      for (const Norm norm : {Norm::inf, Norm::l2, Norm::l1, Norm::opaque})
        for (const Update update : {Update::smart_pytorch, Update::sift, Update::paper, Update::sign})
          for (const bool stored : {false, true}) {
            cpu::Ascend ascend = {};
            ascend.shape = shape;
            ascend.embed = embed_rows;
            ascend.grad = grad_rows;
            ascend.mask = mask_bytes;
            ascend.unit = unit;
            ascend.noise = stored ? noise.floats() : nullptr;
            ascend.seed = 42;
            ascend.noise_var = ascend.step_size = ascend.epsilon = 0.1f;
            ascend.update = update;
            ascend.norm = norm;
            ascend.stream = stream;
            const int64_t chunks = cpu::chunks(rows, width);
            if (norm == Norm::opaque) {
              ascend.measured = next.floats();
              cpu::kernels().measure(ascend, 0, chunks, scratch.memory);
              continue;
            }
            ascend.group = 1;
            ascend.out = out.data();
            ascend.noise_out = next.floats();
            cpu::kernels().ascend(ascend, 0, chunks, scratch.memory);
            std::vector<float> first(next.floats(), next.floats() + rows * width), norms(size_t(rows), 0);
            ascend.measured = norms.data();
            cpu::kernels().measure(ascend, 0, chunks, scratch.memory);
            if (norm == Norm::l2 && update != Update::paper)
              for (float& each : norms) each = std::sqrt(each);
            ascend.norms = norms.data();
            std::vector<float> moved_norms(size_t(rows), 0);
            if (norm == Norm::l2 && update == Update::paper) {
              ascend.measured = moved_norms.data();
              cpu::kernels().measure(ascend, 0, chunks, scratch.memory);
              ascend.moved_norms = moved_norms.data();
            }
            cpu::kernels().ascend(ascend, 0, chunks, scratch.memory);
            float apart = 0;  // by rounding, of norms that have passed through memory in other units
            for (size_t i = 0; i < first.size(); ++i) apart = std::fmax(apart, std::fabs(first[i] - next.floats()[i]));
            check(apart <= (update == Update::paper ? 1e-6f : 0.0f), "measured norms", width);
          }
    }
}

void divergences(int64_t rows, int64_t width) {
  const Scratch scratch(cpu::divergence_scratch(width));
  const int64_t chunks = cpu::chunks(rows, width);
  for (const Kind kind : {Kind::kl, Kind::sym_kl, Kind::js, Kind::jsd})
    for (const Dtype x_dtype : dtypes)
      for (const Dtype t_dtype : {x_dtype, Dtype::fp32})
        for (int variant = 0; variant < 16; ++variant) {
          const bool masked = variant & 1, strided = variant & 2, stream = variant & 4, difference = variant & 8;
          const int64_t step = strided ? width + 5 : width;
          Tensor x(rows * step, x_dtype, 3), t(rows * step, t_dtype, 4), dx(rows * width, x_dtype),
              dt(rows * width, t_dtype), terms(rows * width, x_dtype), stats(rows * statistics, Dtype::fp32);
          std::vector<uint8_t> mask(size_t(rows), 1);
          mask[size_t(rows) / 2] = 0;
          std::vector<double> partial(size_t(chunks), -1);
          cpu::Divergence args = {};
          args.shape = {rows, width, 1, 1};
          args.x = {x.data(), x_dtype, step, 0, 0, 1};
          args.t = {t.data(), t_dtype, step, 0, 0, 1};
          args.mask = masked ? mask.data() : nullptr;
          args.kind = kind;
          args.alpha = 0.5f;
          args.upstream = args.weight = 1.0f;
          args.scale = difference ? 0.5f : 1.0f;
          args.from_difference = difference;
          args.stream = stream;
          args.stats = stats.floats();
          args.partial = partial.data();
          cpu::kernels().divergence_forward(args, 0, chunks, scratch.memory);
          args.dx = dx.data();
          args.dt = dt.data();
          cpu::kernels().divergence_forward(args, 0, chunks, scratch.memory);
          double sum = 0;
          for (const double each : partial) {
            check(each >= 0, "divergence", width);
            sum += each;
          }
          args.partial = nullptr;
          cpu::kernels().divergence_backward(args, 0, chunks, scratch.memory);
          Tensor factors(rows, x_dtype, 5);
          args.grad = {factors.data(), x_dtype, 1, 0, 0, 0};
          cpu::kernels().divergence_backward(args, 0, chunks, scratch.memory);
          args.grad = {};
          std::vector<float> losses(size_t(rows * shares), -1);
          args.losses = losses.data();
          cpu::kernels().divergence_finish(args, 0, chunks, scratch.memory);
          double finished = 0;
          for (size_t row = 0; row < size_t(rows); ++row) {
            const double first = losses[row * shares], second = losses[row * shares + 1];
            finished += kind == Kind::jsd ? 0.5 * first + 0.5 * second : first;
          }
          check(std::abs(finished - sum) <= 1e-5 * sum, "finished", width);
          args.losses = nullptr;
          Tensor slice(rows * parts, Dtype::fp32);
          float* const kept = args.stats;
          args.stats = slice.floats();
          cpu::kernels().divergence_parts(args, 0, chunks, scratch.memory);
          args.stats = kept;
          args.dx = args.dt = nullptr;
          args.terms = terms.data();
          args.terms_dtype = x_dtype;
          cpu::kernels().divergence_forward(args, 0, chunks, scratch.memory);
          args.terms = nullptr;
          args.dx = dx.data();
          args.dt = dt.data();
          for (const int64_t column : {0, 1, 2}) {
            Tensor upstream(rows * width * 2, x_dtype, 5);
            args.grad = {upstream.data(), x_dtype, width * 2, 0, 0, column};
            cpu::kernels().divergence_elements_backward(args, 0, chunks, scratch.memory);
          }
        }
}

void fisher_directions(int64_t rows, int64_t width) {
  const Scratch scratch(cpu::fisher_scratch(width));
  for (const Dtype dtype : dtypes)
    for (int variant = 0; variant < 8; ++variant) {
      const bool wide = variant & 1, strided = variant & 2, stream = variant & 4;
      const int64_t step = strided ? width + 5 : width;
      Tensor logits(rows * step, dtype, 3), out(rows * width, wide ? Dtype::fp32 : dtype);
      const cpu::Fisher args = {{rows, width, 1, 1}, {logits.data(), dtype, step, 0, 0, 1}, out.data(), out.dtype, stream};
      cpu::kernels().fisher_direction(args, 0, cpu::chunks(rows, width), scratch.memory);
      if (out.dtype != Dtype::fp32) continue;
      for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        int negative = 0;
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
          sum += out.floats()[i];
          negative += out.floats()[i] < 0;
        }
        check(std::abs(sum) < 1e-6 && negative <= 1, "Fisher direction", width);
      }
    }
}

void pool() {
  Pool pool;
  std::vector<Pool::Block*> blocks;
  for (int i = 0; i < 100; ++i) blocks.push_back(pool.take(Pool::smallest + size_t(i) * 4096));
  for (Pool::Block* block : blocks) std::memset(block->data, 1, block->size);
  for (Pool::Block* block : blocks) pool.give_back(block);
  check(pool.bytes() <= Pool::most_bytes, "bytes kept", 0);
  check(pool.bytes() <= Pool::most_blocks * (Pool::smallest + 100 * 4096), "blocks kept", 0);
  pool.give_back(pool.take(Pool::smallest + 99 * 4096));
  check(pool.clear() > 0 && pool.bytes() == 0, "cleared", 0);
}

}  // namespace

int main() {
  int sets = 0;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    if (!cpu::choose(name)) continue;
    ++sets;
    for (const int64_t width : {1, 3, 7, 16, 33, 65, 1023, 1025}) {
      perturb_and_ascend(width > 1000 ? 2 : 5, width);
      divergences(width > 1000 ? 2 : 5, width);
      fisher_directions(width > 1000 ? 2 : 37, width);
    }
  }
  pool();
  std::printf("%d instruction sets, %d failures\n", sets, failures);
  return failures == 0 ? 0 : 1;
}
