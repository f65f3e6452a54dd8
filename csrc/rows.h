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

// What operators call the choices that kernels are compiled for, in the order of their numbers.
enum class Kind : int { kl, sym_kl, js, jsd };
enum class Norm : int { inf, l2, l1, opaque };
enum class Update : int { smart_pytorch, sift, paper, sign };
enum class Noise : int { normal, uniform };
constexpr const char* kind_names[] = {"kl", "sym_kl", "js", "jsd"};
constexpr const char* norm_names[] = {"inf", "l2", "l1", "opaque"};
constexpr const char* update_names[] = {"smart-pytorch", "sift", "paper", "sign"};
constexpr const char* noise_names[] = {"normal", "uniform"};

// The norm of a group of rows from their partial norms, on the host: true norms for paper, else l2 of squares.
inline float group_norm(const float* partial, int64_t group, Norm norm, Update update) {
  float largest = 0;
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < group; ++i) {
    largest = partial[i] > largest ? partial[i] : largest;
    sum += partial[i];
    squares += double(partial[i]) * partial[i];
  }
  switch (norm) {
    case Norm::inf:
      return largest;
    case Norm::l2:
      return float(__builtin_sqrt(update == Update::paper ? squares : sum));
    case Norm::l1:
      return float(sum);
    case Norm::opaque:
      break;
  }
  return __builtin_nanf("");  // shows
}

// A choice as an argument, known at compile time.
template <auto VALUE>
struct Constant {
  static constexpr auto value = VALUE;
};

// Calls visit(Constant<...>()) with the kind, norm, update or noise that a number stands for. A number that stands for none gives
// `unknown()`: it is never taken for another. These are the only lists of what there is.
template <class Visit, class Unknown>
SMART_FAST_HOST_INLINE auto with_kind(Kind kind, const Visit& visit, const Unknown& unknown) {
  switch (kind) {
    case Kind::kl:
      return visit(Constant<Kind::kl>());
    case Kind::sym_kl:
      return visit(Constant<Kind::sym_kl>());
    case Kind::js:
      return visit(Constant<Kind::js>());
    case Kind::jsd:
      return visit(Constant<Kind::jsd>());
  }
  return unknown();
}
template <class Visit, class Unknown>
SMART_FAST_HOST_INLINE auto with_norm(Norm norm, const Visit& visit, const Unknown& unknown) {
  switch (norm) {
    case Norm::inf:
      return visit(Constant<Norm::inf>());
    case Norm::l2:
      return visit(Constant<Norm::l2>());
    case Norm::l1:
      return visit(Constant<Norm::l1>());
    case Norm::opaque:
      return visit(Constant<Norm::opaque>());
  }
  return unknown();
}
template <class Visit, class Unknown>
SMART_FAST_HOST_INLINE auto with_update(Update update, const Visit& visit, const Unknown& unknown) {
  switch (update) {
    case Update::smart_pytorch:
      return visit(Constant<Update::smart_pytorch>());
    case Update::sift:
      return visit(Constant<Update::sift>());
    case Update::paper:
      return visit(Constant<Update::paper>());
    case Update::sign:
      return visit(Constant<Update::sign>());
  }
  return unknown();
}
template <class Visit, class Unknown>
SMART_FAST_HOST_INLINE auto with_noise(Noise noise, const Visit& visit, const Unknown& unknown) {
  switch (noise) {
    case Noise::normal:
      return visit(Constant<Noise::normal>());
    case Noise::uniform:
      return visit(Constant<Noise::uniform>());
  }
  return unknown();
}

// Row statistics that a divergence keeps for its backward pass, one fp32 each: `shift` is c (of logits that are not scaled)
// and `log_ratio` L of divergence.h. The last two are sums over the row: KL(q || m) and KL(p || m) of jsd, the divergence
// of the row and zero of the others.
enum Statistic : int {
  stat_max_t,
  stat_inv_sum_t,
  stat_max_x,
  stat_inv_sum_x,
  stat_shift,
  stat_log_ratio,
  stat_first,
  stat_second,
  statistics
};

// What is known of a slice of a row, in the same place: sums of exponentials relative to the maxima (of expm1: to that
// of t), the largest |delta|, and the c it is relative to.
enum Part : int { part_max_x, part_sum_x, part_max_t, part_sum_t, part_max_d, part_shift, part_sum_e, parts };

// Shares of a slice in the two sums over a row.
enum Share : int { share_first, share_second, shares };

}  // namespace smart_fast
