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

// Logits, and d = x - t, in whose place x may have come; not scaled. d is NaN, which no maximum sees, where both are minus
// infinity. A class that t leaves out is left out of both where d was given.
template <class T>
SMART_FAST_INLINE void unpack(const Divergence& args, const Chunk<T>& chunk_x, const Chunk<T>& chunk_t,
                              float (&x)[Chunk<T>::size], float (&t)[Chunk<T>::size], float (&d)[Chunk<T>::size]) {
  chunk_x.unpack(x);
  chunk_t.unpack(t);
  if (args.from_difference) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::size; ++i) {
      const bool out = t[i] == -Scalar::infinity;
      d[i] = out ? Scalar::from_bits(0x7FC00000u) : x[i];
      x[i] = out ? t[i] : t[i] + x[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<T>::size; ++i) d[i] = x[i] - t[i];
  }
}

// What the differences of a row are relative to.
struct Center {
  float shift;  // c of divergence.h
  bool exact;   // whether c is so large that what the rounding of x - t left out counts
};

// Makes delta, x - t - c, scaled, of d; zero where both are minus infinity.
template <int SIZE>
SMART_FAST_INLINE void center_on(const Divergence& args, const Center& center, const float (&x)[SIZE],
                                 const float (&t)[SIZE], float (&d)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    float rest = 0.0f;
    if (center.exact && !args.from_difference) rest = Formulas::finite_or_zero(Formulas::rounding_error(x[i], t[i], d[i]));
    const bool out = x[i] == -Scalar::infinity && t[i] == -Scalar::infinity;
    d[i] = out ? 0.0f : args.scale * ((d[i] - center.shift) + rest);
  }
}

// t and delta of a chunk. Most have neither infinite logits nor a large c, and x dies at once: registers are dear.
template <class T>
SMART_FAST_INLINE void deltas_of(const Divergence& args, const Center& center, const Chunk<T>& chunk_x,
                                 const Chunk<T>& chunk_t, float (&t)[Chunk<T>::size], float (&delta)[Chunk<T>::size]) {
  constexpr int size = Chunk<T>::size;
  chunk_t.unpack(t);
  float least = t[0];
#pragma unroll
  for (int i = 1; i < size; ++i) least = fminf(least, t[i]);
  float x[size];
  if (least == -Scalar::infinity || (center.exact && !args.from_difference)) {
    unpack<T>(args, chunk_x, chunk_t, x, t, delta);
    center_on(args, center, x, t, delta);
    return;
  }
  chunk_x.unpack(x);
  if (args.from_difference) {
#pragma unroll
    for (int i = 0; i < size; ++i) delta[i] = args.scale * (x[i] - center.shift);
  } else {
#pragma unroll
    for (int i = 0; i < size; ++i) delta[i] = args.scale * ((x[i] - t[i]) - center.shift);
  }
}

// What is known of a row once it has been read; maxima are those of scaled logits.
struct RowStatistics {
  float max_x, max_t, inv_x, inv_t;
  Center center;
  float log_ratio;      // L of divergence.h
  float first, second;  // sums over the row, as `Statistic` says
  bool near;            // |r| < 1 throughout

  // Maxima and sums over the row. Those of x are not read, and that of expm1 is, if max_d <= 1.
  static SMART_FAST_INLINE RowStatistics from(float scale, Center center, float max_x, float max_t, float max_d,
                                              float sum_x, float sum_t, float expm1_sum) {
    const float safe_t = Formulas::finite_max(max_t);
    float safe_x = Formulas::finite_max(max_x);
    if (max_d <= 1.0f)
      Formulas::sums_of_x(safe_t, sum_t, expm1_sum, scale * center.shift, safe_x, sum_x);
    else
      center = {Formulas::finite_or_zero((safe_x - safe_t) / scale), true};
    return {safe_x, safe_t, 1.0f / sum_x, 1.0f / sum_t, center,
            Formulas::log_ratio(safe_x, sum_x, safe_t, sum_t, expm1_sum, max_d, scale * center.shift), 0.0f, 0.0f,
            max_d < 0.5f};  // |L| <= max |delta|
  }

  static SMART_FAST_INLINE RowStatistics read(const float* stats) {
    const float shift = stats[stat_shift];
    return {stats[stat_max_x], stats[stat_max_t], stats[stat_inv_sum_x], stats[stat_inv_sum_t], {shift, shift != 0.0f},
            stats[stat_log_ratio], stats[stat_first], stats[stat_second], false};
  }
  // Zeros for a masked row. A c that is no larger than the differences from it goes into L.
  SMART_FAST_INLINE void write(float* stats, float scale, bool real) const {
    stats[stat_max_t] = real ? max_t : 0.0f;
    stats[stat_inv_sum_t] = real ? inv_t : 0.0f;
    stats[stat_max_x] = real ? max_x : 0.0f;
    stats[stat_inv_sum_x] = real ? inv_x : 0.0f;
    stats[stat_shift] = real && center.exact ? center.shift : 0.0f;
    stats[stat_log_ratio] = !real ? 0.0f : center.exact ? log_ratio : log_ratio + scale * center.shift;
    stats[stat_first] = real ? first : 0.0f;
    stats[stat_second] = real ? second : 0.0f;
  }

  SMART_FAST_INLINE float p(float scaled_x) const { return Scalar::exp(scaled_x - max_x) * inv_x; }
  SMART_FAST_INLINE float q(float scaled_t) const { return Scalar::exp(scaled_t - max_t) * inv_t; }
};

}  // namespace cuda
}  // namespace smart_fast
