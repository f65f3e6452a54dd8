// Tensors [..., width] seen as rows: what every kernel, on CPU and GPU, is told about its arguments.
#pragma once

#include <cstdint>

#include "platform.h"

namespace smart_fast {

enum class Dtype : int { fp32, bf16, fp16 };

// Logical row i of `rows` has indices (i / (size1 * size2), i / size2 % size1, i % size2).
struct Shape {
  int64_t rows, width, size1, size2;
};

// Where the rows of one tensor lie: up to three leading strides, in elements; columns `column` elements apart.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t stride0, stride1, stride2, column;
};

SMART_FAST_INLINE int64_t row_offset(const Shape& shape, const Rows& tensor, int64_t row) {
  if (shape.size1 == 1 && shape.size2 == 1) return row * tensor.stride0;
  const int64_t rest = row / shape.size2;
  return rest / shape.size1 * tensor.stride0 + rest % shape.size1 * tensor.stride1 + row % shape.size2 * tensor.stride2;
}

// The unit of a row, from those of all or null.
SMART_FAST_INLINE float unit_of(const float* units, int64_t row) { return units == nullptr ? 1.0f : units[row]; }

// 1 / size, a number for any size: multiplied by it, numbers as large are about one, and so are their squares.
SMART_FAST_INLINE float inverse_of(float size) { return 1.0f / (size < 1e-37f ? 1e-37f : size > 1e37f ? 1e37f : size); }

enum class Kind : int { kl, sym_kl, js };
enum class Norm : int { inf, l2, l1, opaque };
enum class Update : int { smart_pytorch, sift, paper };

// Row statistics that a divergence keeps for its backward pass, one fp32 each.
enum Statistic : int { stat_max_t, stat_inv_sum_t, stat_max_x, stat_inv_sum_x, stat_shift, stat_kl, statistics };

// What is known of a slice of a row, in the same place: sums of exponentials relative to the maxima (of expm1: to that
// of t), and the largest difference.
enum Part : int { part_max_x, part_sum_x, part_max_t, part_sum_t, part_max_d, part_sum_e };

}  // namespace smart_fast
