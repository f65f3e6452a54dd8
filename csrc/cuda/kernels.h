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

// out = embed + noise_var * unit * noise(seed). Masked rows (mask byte zero) are copied.
struct Perturb {
  Shape shape;
  Rows embed;
  const uint8_t* mask;  // a byte per row, or null
  const float* unit;    // of each row, or null for 1
  Seed seed;
  int64_t* seed_out;  // the seed, for later steps, or null
  Noise kind;         // of the noise
  float noise_var;
  void* out;         // in the dtype of embed
  float* noise_out;  // the noise itself, or null
};

// One step, or what it measures first: see kernels/ascend.py for the update rules.
struct Ascend {
  Shape shape;
  Rows embed, grad;
  const uint8_t* mask;
  const float* unit;    // of each row, or null for 1: noise_var, step_size and epsilon are multiples of it
  const int64_t* seed;  // of the noise, if `noise` is null
  const float* noise;   // [rows, width], 16-byte aligned
  Noise kind;           // of the noise of a seed
  float noise_var, step_size, epsilon;
  Update update;
  Norm norm;
  const float* norms;        // one for every `group` rows, or null: of each row itself
  const float* moved_norms;  // paper, l2, groups: of the moved noise in units
  bool partial_norms;        // both are partial norms of rows instead, to be folded over `group` of them
  int64_t group;
  void* out;         // in the dtype of embed
  float* noise_out;  // the new noise, or null
  // Only measure: a partial norm per row (l2: of squares, unless paper), or the measured values themselves
  // (Norm::opaque). Paper: of the gradient, or, given its `norms`, of the moved noise in units.
  float* measured;
};

struct Divergence {
  Shape shape;
  Rows x, t;
  const uint8_t* mask;
  Kind kind;
  float alpha, weight;
  float scale;          // of both logits
  bool from_difference;        // x holds x - t
  float* loss;          // forward: weight times the sum over the rows, or null
  float* partial;       // forward: `forward_partials` floats of scratch memory
  float* losses;        // forward: weight times the divergence of each row, or null; finish: [rows, shares], those of a
                        // slice in the sums over the row
  float* parts;         // of slices: [rows, parts], what `Part` says of a slice of the vocabulary
  void* terms;          // forward: elementwise terms, or null
  Dtype terms_dtype;
  float* stats;         // [rows, statistics], or null in a forward pass
  void *dx, *dt;        // gradients in the dtypes of x and t, or null
  const void* upstream;  // backward of a sum: scalar upstream gradient, or null for one; `scale` is part of `weight`
  Dtype upstream_dtype;
  Rows grad;            // backward: upstream gradients of terms, or a factor for each row; no data for none
};

// out = softmax(logits) - onehot(argmax logits).
struct Fisher {
  Shape shape;
  Rows logits;
  void* out;
  Dtype out_dtype;  // fp32, or that of the logits
};

[[nodiscard]] cudaError_t perturb(const Perturb&, cudaStream_t);
[[nodiscard]] cudaError_t ascend(const Ascend&, cudaStream_t);
[[nodiscard]] cudaError_t forward_partials(const Divergence&, int64_t& count);
[[nodiscard]] cudaError_t divergence_forward(const Divergence&, cudaStream_t);  // measures only, if there are `parts`
[[nodiscard]] cudaError_t divergence_finish(const Divergence&, cudaStream_t);
[[nodiscard]] cudaError_t divergence_backward(const Divergence&, cudaStream_t);
[[nodiscard]] cudaError_t divergence_elements_backward(const Divergence&, cudaStream_t);
[[nodiscard]] cudaError_t fisher_direction(const Fisher&, cudaStream_t);

}  // namespace cuda
}  // namespace smart_fast
