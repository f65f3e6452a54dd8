// ascend: noise, gradient step, norm, projection and add, a row at a time.
//
//     smart-pytorch   m = noise + step_size * g    noise <- m / (norm(m) + epsilon)
//     sift            m = g                        noise <- noise + step_size * m / (norm(m) + epsilon)
//     paper           m = g                        noise <- the point of norm <= epsilon nearest to
//                                                           s = noise + step_size * m / norm(m), m / norm(m) = 0 if m is
//
//     sign            m = g                        noise <- noise + step_size * sign(m), clipped to +-epsilon
//
// with g = 0 for rows where it is not finite, and noise, step_size and epsilon in units of the row. Masked rows get no
// noise.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace smart_fast {
namespace {

// The noise of a row, padded with zeros to whole vectors; `buffer` holds width + 256 floats.
inline const float* row_noise(const cpu::Ascend& args, int64_t row, float* buffer) {
  const int64_t width = args.shape.width, first = row * width;
  if (args.noise != nullptr && width % LANES == 0) return args.noise + first;
  float* noise = buffer;
  if (args.noise != nullptr) {
    __builtin_memcpy(noise, args.noise + first, size_t(width) * 4);
  } else {
    const void* grad = advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row));
    const void* embed = args.embed.data == nullptr
                            ? grad
                            : advance(args.embed.data, args.embed.dtype, row_offset(args.shape, args.embed, row));
    const float scale = args.noise_var * unit_of(args.unit, row);
    make_noise(args.kind, buffer, args.seed, uint64_t(first) / 4, width + first % 4, scale, [&](int64_t i) {
      prefetch<NORMALS>(grad, args.grad.dtype, i);
      prefetch<NORMALS>(embed, args.embed.dtype, i);
    });
    noise += first % 4;
  }
  __builtin_memset(noise + width, 0, size_t(whole(width) - width) * 4);
  return noise;
}

// The largest magnitude of the m of a row, and the sum of magnitudes (l2: of squares).
struct RowNorm {
  F largest_ = {}, poison = {};
  double sum = 0;

  float partial(Norm kind) const { return kind == Norm::inf ? largest(largest_) : float(sum); }
};

// Writes m (`measured`, whole vectors) and folds its norm. `poison` becomes NaN if any gradient is not finite.
template <Norm NORM, Update UPDATE>
inline void measure_row(const void* grad, Dtype dtype, const float* noise, float step_size, int64_t width,
                        float* measured, RowNorm& norm) {
  static_assert(NORM == Norm::inf || NORM == Norm::l2 || NORM == Norm::l1 || NORM == Norm::opaque, "a norm without a sum");
  static_assert(UPDATE == Update::smart_pytorch || UPDATE == Update::sift || UPDATE == Update::paper ||
                    UPDATE == Update::sign,
                "an update without a rule");
  alignas(64) float from[BLOCK + LANES];
  F largest_ = {}, poison = {};  // not in `norm`, which might be where `measured` points for all a compiler knows
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t part = width - begin < BLOCK ? width - begin : BLOCK;
    const float* g = read_block(advance(grad, dtype, begin), dtype, part, from, 0.0f);
    F sum = {};
    for (int64_t i = 0; i < part; i += LANES) {
      const F value = load(g + i);
      poison += value * 0.0f;
      const F m = UPDATE == Update::smart_pytorch ? load(noise + begin + i) + step_size * value : value;
      if (NORM == Norm::inf || UPDATE == Update::paper) largest_ = Simd::max(largest_, Simd::abs(m));
      if (NORM == Norm::l1) sum += Simd::abs(m);
      if (NORM == Norm::l2) sum += m * m;
      store(measured + begin + i, m);
    }
    if (NORM == Norm::l1 || NORM == Norm::l2) norm.sum += total(sum);
  }
  norm.largest_ = largest_;
  norm.poison = poison;
}

inline void measure_row(Norm kind, Update update, const void* grad, Dtype dtype, const float* noise, float step_size,
                        int64_t width, float* measured, RowNorm& norm) {
  const auto unknown = [] { __builtin_trap(); };
  with_norm(
      kind,
      [&](auto norm_kind) {
        with_update(
            update,
            [&](auto rule) {
              measure_row<norm_kind.value, rule.value>(grad, dtype, noise, step_size, width, measured, norm);
            },
            unknown);
      },
      unknown);
}

// m of a row and its norm, with the gradient left out where it is not finite.
inline RowNorm measure_row(const cpu::Ascend& args, int64_t row, const float* noise, float* measured) {
  const int64_t width = args.shape.width;
  const float step_size = args.step_size * unit_of(args.unit, row);
  const void* grad = advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row));
  RowNorm norm;
  measure_row(args.norm, args.update, grad, args.grad.dtype, noise, step_size, width, measured, norm);
  if (any(norm.poison != 0.0f)) {
    norm = RowNorm();
    for (int64_t i = 0; i < width; i += LANES) {
      const F m = args.update == Update::smart_pytorch ? load(noise + i) : F{};
      norm.largest_ = Simd::max(norm.largest_, Simd::abs(m));
      norm.sum += total(args.norm == Norm::l2 ? m * m : Simd::abs(m));
      store(measured + i, m);
    }
  }
  return norm;
}

// ---- paper ---------------------------------------------------------------------------------------------------------

// The norm of a row of which `found` is known. Where squares could vanish or overflow, they are those of a multiple.
inline float true_norm(Norm kind, const float* values, int64_t width, const RowNorm& found) {
  const float peak = largest(found.largest_);
  if (kind != Norm::l2) return found.partial(kind);
  if (peak > 1e-12f && peak < 1e12f) return __builtin_sqrtf(float(found.sum));
  const float factor = inverse_of(peak);
  double sum = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const F value = load(values + i) * factor;
    sum += total(value * value);
  }
  return __builtin_sqrtf(float(sum)) / factor;
}

// Replaces g by s = noise + step * g / norm, and of the inf norm by the nearest point of the ball.
template <Norm NORM>
inline RowNorm move_along(const float* noise, float* g, int64_t width, float norm, float step, float radius) {
  const float inverse = norm > 0.0f ? inverse_of(norm) : 0.0f;
  F largest_ = {};
  double total_sum = 0;
  for (int64_t begin = 0; begin < width; begin += BLOCK) {
    const int64_t end = width - begin < BLOCK ? width : begin + BLOCK;
    F sum = {};
    for (int64_t i = begin; i < end; i += LANES) {
      F s = load(noise + i) + load(g + i) * inverse * step;
      if (NORM == Norm::inf) {
        s = Simd::min(Simd::max(s, Simd::splat(-radius)), Simd::splat(radius));
      } else {
        largest_ = Simd::max(largest_, Simd::abs(s));
        sum += NORM == Norm::l2 ? s * s : Simd::abs(s);
      }
      store(g + i, s);
    }
    if (NORM != Norm::inf) total_sum += total(sum);
  }
  RowNorm moved;
  moved.largest_ = largest_;
  moved.sum = total_sum;
  return moved;
}

// Onto the l1 ball: all entries shrink by one threshold, which rises until those above it stay the same (Michelot, "A
// finite algorithm for finding the projection of a point onto the canonical simplex of R^n", 1986), here from a bound
// below it: the largest entry keeps no more than the radius, and no more than `width` entries share what is too much.
inline void shrink_into_ball(float* s, int64_t width, float radius, const RowNorm& norm) {
  if (norm.sum <= radius) return;
  const float peak = largest(norm.largest_), mean = float((norm.sum - radius) / double(width));
  float threshold = peak - radius > mean ? peak - radius : mean, rest;
  for (int64_t above = width + 1;;) {
    double excess = -double(radius);
    int64_t count = 0;
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
      const int64_t end = width - begin < BLOCK ? width : begin + BLOCK;
      F sum = {};
      I still = {};
      for (int64_t i = begin; i < end; i += LANES) {
        const F value = Simd::abs(load(s + i)) - threshold;
        sum += Simd::max(value, F{});
        still -= value >= 0.0f;
      }
      excess += total(sum);
      for (int lane = 0; lane < LANES; ++lane) count += still[lane];
    }
    rest = count == 0 ? 0.0f : float(excess / double(count));
    if (count == 0 || count >= above) break;
    threshold += rest;
    above = count;
  }
  // `rest` is what rounding has left of the threshold.
  for (int64_t i = 0; i < width; i += LANES) {
    const F value = load(s + i), size = Simd::max(Simd::abs(value) - threshold - rest, F{});
    store(s + i, Simd::flip_sign(size, (U)value & 0x80000000u));
  }
}

// The new noise of a row in `moved`, but for the factor that it returns. A call, to leave the other updates' registers.
__attribute__((noinline)) inline float move_in_ball(const cpu::Ascend& args, int64_t row, const float* noise, float* moved) {
  const int64_t width = args.shape.width;
  const float unit = unit_of(args.unit, row), step = args.step_size * unit, radius = args.epsilon * unit;
  const RowNorm found = measure_row(args, row, nullptr, moved);
  const float norm = args.norms != nullptr ? args.norms[row / args.group] : true_norm(args.norm, moved, width, found);
  if (args.norm == Norm::inf) {
    move_along<Norm::inf>(noise, moved, width, norm, step, radius);
    return 1;
  }
  if (args.norm == Norm::l1) {
    shrink_into_ball(moved, width, radius, move_along<Norm::l1>(noise, moved, width, norm, step, radius));
    return 1;
  }
  const RowNorm s = move_along<Norm::l2>(noise, moved, width, norm, step, radius);
  const bool group = args.moved_norms != nullptr;
  const float size = group ? args.moved_norms[row / args.group] : true_norm(Norm::l2, moved, width, s);
  const float most = group ? args.epsilon : radius;
  return size > most ? most / size : 1.0f;
}

// A row's share of the norm of g, or, once norms of g are given, of the l2 norm of s in units.
inline float measure_paper(const cpu::Ascend& args, int64_t row, const float* noise, float* measured) {
  const int64_t width = args.shape.width;
  const RowNorm found = measure_row(args, row, nullptr, measured);
  if (args.norms == nullptr) return true_norm(args.norm, measured, width, found);
  const float norm = args.norms[row / args.group], unit = unit_of(args.unit, row);
  const RowNorm s = move_along<Norm::l2>(noise, measured, width, norm, args.step_size * unit, 0.0f);
  return unit > 0.0f ? true_norm(Norm::l2, measured, width, s) / unit : 0.0f;
}

// ---- sign ----------------------------------------------------------------------------------------------------------

// The new noise of a row in `moved`. A call, to leave the other updates' registers.
__attribute__((noinline)) inline void move_by_signs(const cpu::Ascend& args, int64_t row, const float* noise, float* moved) {
  const int64_t width = args.shape.width;
  const float unit = unit_of(args.unit, row), step = args.step_size * unit, radius = args.epsilon * unit;
  measure_row(args, row, nullptr, moved);
  for (int64_t i = 0; i < width; i += LANES) {
    const F g = load(moved + i), zero = {};
    const F s = load(noise + i) + Simd::select(g > 0.0f, Simd::splat(step), Simd::select(g < 0.0f, Simd::splat(-step), zero));
    store(moved + i, Simd::min(Simd::max(s, Simd::splat(-radius)), Simd::splat(radius)));
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

inline void measure(const cpu::Ascend& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = args.shape.width, per_chunk = cpu::rows_per_chunk(width);
  float* buffer = scratch + width + 256;
  const int64_t last = end * per_chunk < args.shape.rows ? end * per_chunk : args.shape.rows;
  for (int64_t row = begin * per_chunk; row < last; ++row) {
    const bool masked = args.mask != nullptr && args.mask[row] == 0;
    float norm = 0;
    if (!masked) {
      const bool moved = args.update == Update::smart_pytorch || args.norms != nullptr;
      const float* noise = moved ? row_noise(args, row, scratch) : nullptr;
      norm = args.update == Update::paper ? measure_paper(args, row, noise, buffer)
                                          : measure_row(args, row, noise, buffer).partial(args.norm);
    }
    if (args.norm != Norm::opaque) {
      args.measured[row] = norm;
    } else if (masked) {
      __builtin_memset(args.measured + row * width, 0, size_t(width) * 4);
    } else {
      __builtin_memcpy(args.measured + row * width, buffer, size_t(width) * 4);
    }
  }
}

inline void ascend(const cpu::Ascend& args, int64_t begin, int64_t end, float* scratch) {
  alignas(64) float from[BLOCK + LANES], to[BLOCK + LANES];
  const int64_t width = args.shape.width, per_chunk = cpu::rows_per_chunk(width);
  const Dtype dtype = args.embed.dtype;
  float* measured = scratch + width + 256;
  const int64_t last = end * per_chunk < args.shape.rows ? end * per_chunk : args.shape.rows;
  for (int64_t row = begin * per_chunk; row < last; ++row) {
    const void* embed = advance(args.embed.data, dtype, row_offset(args.shape, args.embed, row));
    void* out = advance(args.out, dtype, row * width);
    float* noise_out = args.noise_out == nullptr ? nullptr : args.noise_out + row * width;
    if (args.mask != nullptr && args.mask[row] == 0) {
      __builtin_memcpy(out, embed, size_t(width) * (dtype == Dtype::fp32 ? 4 : 2));
      if (noise_out != nullptr) __builtin_memset(noise_out, 0, size_t(width) * 4);
      continue;
    }
    const float* noise = row_noise(args, row, scratch);
    float scale = 1;
    bool add_noise = false;
    if (args.update == Update::paper) {
      scale = move_in_ball(args, row, noise, measured);
    } else if (args.update == Update::sign) {
      move_by_signs(args, row, noise, measured);
    } else {
      float norm = measure_row(args, row, noise, measured).partial(args.norm);
      if (args.norms != nullptr)
        norm = args.norms[row / args.group];
      else if (args.norm == Norm::l2)
        norm = __builtin_sqrtf(norm);
      // A zero denominator leaves the noise where it is.
      const float unit = unit_of(args.unit, row), denominator = norm + args.epsilon * unit;
      const bool sift = args.update == Update::sift;
      add_noise = sift || denominator == 0.0f;
      scale = denominator == 0.0f ? 0.0f : (sift ? args.step_size * unit : 1.0f) / denominator;
    }

    for (int64_t start = 0; start < width; start += BLOCK) {
      const int64_t part = width - start < BLOCK ? width - start : BLOCK;
      void* target = advance(out, dtype, start);
      const float* source = read_block(advance(embed, dtype, start), dtype, part, from, 0.0f);
      float* result = open_block(target, dtype, part, to, args.stream);
      for (int64_t i = 0; i < part; i += LANES) {
        F moved = load(measured + start + i) * scale;
        if (add_noise) moved += load(noise + start + i);
        store(measured + start + i, moved);
        store(result + i, load(source + i) + moved);
      }
      write_block(target, dtype, part, result, args.stream);
      if (noise_out != nullptr) write_block(noise_out + start, Dtype::fp32, part, measured + start, args.stream);
    }
  }
  if (args.stream) end_of_stream();
}

}  // namespace
}  // namespace smart_fast
