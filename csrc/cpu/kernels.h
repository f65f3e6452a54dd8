// The CPU kernels: plain pointers and sizes, no torch. Work is split into chunks, the same ones whatever the number of
// threads; a kernel handles chunks [begin, end) and may be called from several threads at once.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace smart_fast {
namespace cpu {

// out = embed + noise_var * unit * noise(seed). Masked rows (mask byte zero) are copied. Outputs are contiguous.
struct Perturb {
  Shape shape;
  Rows embed;
  const uint8_t* mask;  // a byte per row, or null
  const float* unit;    // of each row, or null for 1
  uint64_t seed;
  Noise kind;  // of the noise
  float noise_var;
  void* out;         // in the dtype of embed
  float* noise_out;  // the noise itself, or null
  bool stream;       // outputs larger than the caches: write past them
};

// One step: see kernels/ascend.py for the update rules.
struct Ascend {
  Shape shape;
  Rows embed, grad;
  const uint8_t* mask;
  const float* unit;   // of each row, or null for 1: noise_var, step_size and epsilon are multiples of it
  const float* noise;  // [rows, width], or null: from the seed
  uint64_t seed;
  Noise kind;  // of the noise of a seed
  float noise_var, step_size, epsilon;
  Update update;
  Norm norm;           // of each row, unless `norms` are given
  const float* norms;  // one for every `group` rows, or null
  const float* moved_norms;  // paper, l2: those of the moved noise in units, one for every `group` rows, or null
  int64_t group;
  void* out;         // in the dtype of embed
  float* noise_out;  // the new noise, or null
  bool stream;
  // `measure` only: a partial norm per row (l2: of squares, unless paper), or m itself (Norm::opaque). Paper: of the
  // gradient, or, given its `norms`, of the moved noise in units.
  float* measured;
};

struct Divergence {
  Shape shape;
  Rows x, t;
  const uint8_t* mask;
  Kind kind;
  float alpha;
  float weight;         // of `losses`
  float scale;          // of both logits
  bool from_difference;        // x holds x - t
  double* partial;      // forward: the sum of every chunk, or null
  float* losses;        // forward: [rows], or null; finish: [rows, shares], those of a slice in the sums over the row
  void* terms;          // forward: elementwise terms, or null
  Dtype terms_dtype;
  float* stats;         // [rows, statistics], or null in a forward pass; measure: [rows, parts]
  void *dx, *dt;        // gradients in the dtypes of x and t, or null
  float upstream;       // of a loss of whole rows: upstream gradient, weight and scale included
  float rescale = 1;    // what gradients beside the loss are multiplied by once they are rounded, as a second pass would
  bool stream;
  Rows grad;            // backward: upstream gradients of terms, or a factor for each row; no data for none
};

// out = softmax(logits) - onehot(argmax logits).
struct Fisher {
  Shape shape;
  Rows logits;
  void* out;
  Dtype out_dtype;
  bool stream;
};

struct Kernels {
  const char* name;
  void (*perturb)(const Perturb&, int64_t begin, int64_t end);
  void (*measure)(const Ascend&, int64_t begin, int64_t end, float* scratch);
  void (*ascend)(const Ascend&, int64_t begin, int64_t end, float* scratch);
  void (*divergence_forward)(const Divergence&, int64_t begin, int64_t end, float* scratch);
  void (*divergence_parts)(const Divergence&, int64_t begin, int64_t end, float* scratch);
  void (*divergence_finish)(const Divergence&, int64_t begin, int64_t end, float* scratch);
  void (*divergence_backward)(const Divergence&, int64_t begin, int64_t end, float* scratch);
  void (*divergence_elements_backward)(const Divergence&, int64_t begin, int64_t end, float* scratch);
  void (*fisher_direction)(const Fisher&, int64_t begin, int64_t end, float* scratch);
};

extern const Kernels portable, avx2, avx512;

// The widest of those that this CPU runs, or the one that `choose` set. `choose` returns false if it cannot run here.
const Kernels& kernels();
bool choose(const char* name);  // "auto": the widest again
bool runs_here(const char* name);

// Bytes from which an output is written past the caches. Below, whoever reads it next finds it there.
constexpr int64_t stream_bytes = int64_t(32) << 20;

// Elements of a chunk of `perturb`: a multiple of the noise that one call of a generator makes.
constexpr int64_t perturb_chunk = 4096;

// Rows of a chunk of the other kernels: a multiple of every vector's length where several rows share a vector.
SMART_FAST_INLINE constexpr int64_t rows_per_chunk(int64_t width) { return width <= 128 ? 128 : width < 8192 ? 8192 / width : 1; }
SMART_FAST_INLINE constexpr int64_t chunks(int64_t rows, int64_t width) {
  return (rows + rows_per_chunk(width) - 1) / rows_per_chunk(width);
}

// Floats of scratch memory that a thread needs, 64-byte aligned.
SMART_FAST_INLINE constexpr int64_t ascend_scratch(int64_t width) { return 2 * (width + 256); }
SMART_FAST_INLINE constexpr int64_t divergence_scratch(int64_t width) { return 2 * (width + 64) + 2 * (width / 1024 + 64) + 16384; }
SMART_FAST_INLINE constexpr int64_t fisher_scratch(int64_t width) { return width + width / 1024 + 4096; }

}  // namespace cpu
}  // namespace smart_fast
