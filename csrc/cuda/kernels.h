// The CUDA kernels: device pointers and sizes, no torch. Everything is enqueued on a stream of the current device.
// Outputs are contiguous and 16-byte aligned; inputs may have any strides within a row-wise view (rows.h).
#pragma once

#include <cstdint>

#include "../rows.h"
#include "device.h"

namespace smart_fast {
namespace cuda {

// The seed of the noise: in device memory, or drawn from a generator's state. A captured graph keeps pointers to that
// state, and `offset` counts from where a replay starts.
struct Seed {
  const int64_t* given;
  const int64_t *generator_seed_ptr, *offset_ptr;
  uint64_t generator_seed, offset;
};

// out = embed + noise_var * normal(seed). Masked rows (mask byte zero) are copied.
struct Perturb {
  Shape shape;
  Rows embed;
  const uint8_t* mask;  // a byte per row, or null
  Seed seed;
  int64_t* seed_out;  // the seed, for later steps, or null
  float noise_var;
  void* out;         // in the dtype of embed
  float* noise_out;  // the noise itself, or null
};

// What a step does: see kernels/ascend.py for the update rules.
enum class Stage : int {
  measure,      // a partial norm per row (l2: of squares), or the measured values themselves (Norm::opaque)
  row_norm,     // the whole step, the norm being that of each row
  given_norm,   // the step, one value of `norms` for every `group` rows
  group_norm,   // the step, the norm of `group` rows from their partial norms
};

struct Ascend {
  Shape shape;
  Rows embed, grad;
  const uint8_t* mask;
  const int64_t* seed;  // of the noise, if `noise` is null
  const float* noise;   // [rows, width], 16-byte aligned
  float noise_var, step_size, epsilon;
  Update update;
  Norm norm;
  Stage stage;
  const float* norms;
  int64_t group;
  void* out;         // in the dtype of embed
  float* noise_out;  // the new noise, or null
  float* measured;   // Stage::measure
};

struct Divergence {
  Shape shape;
  Rows x, t;
  const uint8_t* mask;
  Kind kind;
  float alpha, weight;
  float scale;          // of both logits
  bool relative;        // x holds x - t
  float* loss;          // forward: weight times the sum over the rows, or null
  float* partial;       // forward: `forward_partials` floats of scratch memory
  float* losses;        // forward and finish: weight times the divergence of each row, or null
  float* parts;         // measure: [rows, statistics], what `Part` says of a slice of the vocabulary
  void* terms;          // forward: elementwise terms, or null
  Dtype terms_dtype;
  float* stats;         // [rows, statistics], or null in a forward pass
  void *dx, *dt;        // gradients in the dtypes of x and t, or null
  const void* upstream;  // backward of a sum: scalar upstream gradient, or null for one; `scale` is part of `weight`
  Dtype upstream_dtype;
  Rows grad;            // backward: upstream gradients of terms, or a factor for each row; no data for none
};

cudaError_t perturb(const Perturb&, cudaStream_t);
cudaError_t ascend(const Ascend&, cudaStream_t);
int64_t forward_partials(const Divergence&);
cudaError_t divergence_forward(const Divergence&, cudaStream_t);  // measures only, if there are `parts`
cudaError_t divergence_finish(const Divergence&, cudaStream_t);
cudaError_t divergence_backward(const Divergence&, cudaStream_t);
cudaError_t divergence_elements_backward(const Divergence&, cudaStream_t);

}  // namespace cuda
}  // namespace smart_fast
