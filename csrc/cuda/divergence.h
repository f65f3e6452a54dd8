// What the forward and backward kernels of the divergences share.
#pragma once

#include "../divergence.h"
#include "group.h"
#include "kernels.h"
#include "memory.h"

namespace smart_fast {
namespace cuda {

using Formulas = smart_fast::Divergence<Scalar>;
template <Kind KIND>
using Row = RowFormulas<Scalar, KIND>;

// Logits as they came, scaled: in place of x may stand x - t, zero where t leaves a class out of both.
template <class T>
SMART_FAST_INLINE void unpack(const Divergence& args, const Chunk<T>& chunk_x, const Chunk<T>& chunk_t,
                              float (&x)[Chunk<T>::size], float (&t)[Chunk<T>::size]) {
  chunk_x.unpack(x);
  chunk_t.unpack(t);
#pragma unroll
  for (int i = 0; i < Chunk<T>::size; ++i) {
    x[i] *= args.scale;
    t[i] *= args.scale;
    if (args.from_difference && t[i] == -Scalar::infinity) x[i] = 0.0f;
  }
}
SMART_FAST_INLINE float x_of(const Divergence& args, float x, float t) { return args.from_difference ? t + x : x; }
SMART_FAST_INLINE float d_of(const Divergence& args, float x, float t) {
  return args.from_difference ? x : Formulas::difference(x, t);
}

// What is known of a row once it has been read.
struct RowStatistics {
  float max_x, max_t, inv_x, inv_t, shift;
  float first, second;  // sums over the row, as `Statistic` says
  bool near;  // |r| < 1 throughout

  // Maxima and sums over the row; `expm1_sum` is meaningful if max_d <= 1.
  static SMART_FAST_INLINE RowStatistics from(float max_x, float max_t, float max_d, float sum_x, float sum_t,
                                              float expm1_sum) {
    const float safe_x = Formulas::finite_max(max_x), safe_t = Formulas::finite_max(max_t);
    return {safe_x, safe_t, 1.0f / sum_x, 1.0f / sum_t,
            Formulas::log_ratio_shift(safe_x, sum_x, safe_t, sum_t, expm1_sum, max_d), 0.0f, 0.0f,
            max_d < 0.5f};  // |D| <= max |d|
  }

  static SMART_FAST_INLINE RowStatistics read(const float* stats) {
    return {stats[stat_max_x], stats[stat_max_t],  stats[stat_inv_sum_x], stats[stat_inv_sum_t],
            stats[stat_shift], stats[stat_first],  stats[stat_second],    false};
  }
  // Zeros for a masked row.
  SMART_FAST_INLINE void write(float* stats, bool real) const {
    stats[stat_max_t] = real ? max_t : 0.0f;
    stats[stat_inv_sum_t] = real ? inv_t : 0.0f;
    stats[stat_max_x] = real ? max_x : 0.0f;
    stats[stat_inv_sum_x] = real ? inv_x : 0.0f;
    stats[stat_shift] = real ? shift : 0.0f;
    stats[stat_first] = real ? first : 0.0f;
    stats[stat_second] = real ? second : 0.0f;
  }

  SMART_FAST_INLINE float p(float x) const { return Scalar::exp(x - max_x) * inv_x; }
  SMART_FAST_INLINE float q(float t) const { return Scalar::exp(t - max_t) * inv_t; }
  SMART_FAST_INLINE float r(float d) const { return d - shift; }
};

}  // namespace cuda
}  // namespace smart_fast
