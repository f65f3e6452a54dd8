// Rows of logits as the divergence kernels walk over them.
//
// `Wide` is one row, a vector holding neighboring columns. `Narrow` is as many rows as a vector has lanes (columns.h).
#pragma once

#include "../divergence.h"
#include "columns.h"
#include "kernels.h"

namespace smart_fast {
namespace {

using D = smart_fast::Divergence<Simd>;

// What is known of a row once it has been read: splats in a Wide tile.
struct RowStatistics {
  F max_x, max_t, inv_x, inv_t;
  F shift, log_ratio;  // c and L of divergence.h
  F first, second;     // sums over the row, as `Statistic` says
  F sum_x, sum_t, sum_e, max_d;
  bool near = false;     // |r| < 1 throughout; the exponentials of x were not needed
  bool shifted = false;  // whether there is a c; without one, x - t is as precise as it need be
};

// Logits of a block as floats, in `count` vectors. `d` holds x - t of logits that are not scaled where x and t are, or
// where it was given instead of x; `rest` what its rounding left out (null: nothing).
struct Block {
  const float *x, *t, *d, *rest;
  int64_t count;
  float scale;

  // NaN where both are minus infinity: no term of a sum depends on it there.
  SMART_FAST_INLINE F difference(int64_t i) const {
    return d != nullptr ? load(d + i * LANES) : load(x + i * LANES) - load(t + i * LANES);
  }
  SMART_FAST_INLINE F rest_of(int64_t i, F difference) const {
    if (d != nullptr) return rest != nullptr ? load(rest + i * LANES) : F{};
    return D::rounding_error(load(x + i * LANES), load(t + i * LANES), difference);
  }
  // x - t - c, scaled.
  SMART_FAST_INLINE F delta(int64_t i, const RowStatistics& row) const {
    const F difference = this->difference(i);
    if (!row.shifted) return difference * scale;
    return ((difference - row.shift) + D::finite_or_zero(rest_of(i, difference))) * scale;
  }
};

// Of `count` vectors of logits, or of x - t in place of x: all that a block with a scale or a given difference holds. A
// class that t leaves out of a given difference is left out of both.
inline void complete(const float* input, const float* target, bool from_difference, float scale, int64_t count, float* x,
                     float* t, float* d, float* rest) {
  for (int64_t i = 0; i < count * LANES; i += LANES) {
    const F given = load(input + i), to = load(target + i);
    F from = given, difference = given - to;
    if (from_difference) {
      const I out = to == -Simd::infinity;
      difference = Simd::select(out, Simd::splat(__builtin_nanf("")), given);  // as of two minus infinities
      from = Simd::select(out, to, to + given);
    } else {
      store(rest + i, D::rounding_error(given, to, difference));
    }
    store(d + i, difference);
    store(x + i, from * scale);
    store(t + i, to * scale);
  }
}

// Scratch of a tile: the exponentials, and in a Wide one what each block of them is relative to.
struct Scratch {
  float *exp_x = nullptr, *exp_t = nullptr, *base_x = nullptr, *base_t = nullptr;
};

struct Wide {
  // A sum over the row: blocks are summed in vectors, the blocks in double.
  struct Sum {
    double value = 0;
    SMART_FAST_INLINE void add(F v) { value += total(v); }
    SMART_FAST_INLINE void scale(F s) { value *= s[0]; }
    SMART_FAST_INLINE F get() const { return Simd::splat(float(value)); }
  };

  static constexpr int64_t rows = 1, most_together = 1;
  static int64_t together(int64_t) { return 1; }

  const cpu::Divergence* given = nullptr;
  int64_t width = 0, row = 0;
  const void *x = nullptr, *t = nullptr, *g = nullptr;
  float *block_x, *block_t, *block_d, *block_rest, *block_g, *block_dx, *block_dt;
  Scratch scratch;

  void place(const cpu::Divergence& args, float* memory, int64_t) {
    given = &args;
    width = args.shape.width;
    const auto take = [&](int64_t floats) {
      float* const taken = memory;
      memory += floats;
      return taken;
    };
    scratch.exp_x = take(width + 64);
    scratch.exp_t = take(width + 64);
    scratch.base_x = take(width / 1024 + 64);
    scratch.base_t = take(width / 1024 + 64);
    float** const blocks[] = {&block_x, &block_t, &block_d, &block_rest, &block_g, &block_dx, &block_dt};
    for (float** block : blocks) *block = take(BLOCK + 64);
  }

  // False if there is nothing to compute.
  bool open(int64_t first, int64_t) {
    row = first;
    x = advance(given->x.data, given->x.dtype, row_offset(given->shape, given->x, row));
    t = advance(given->t.data, given->t.dtype, row_offset(given->shape, given->t, row));
    if (given->grad.data != nullptr)
      g = advance(given->grad.data, given->grad.dtype, row_offset(given->shape, given->grad, row));
    return given->mask == nullptr || given->mask[row] != 0;
  }

  int64_t blocks() const { return (width + BLOCK - 1) / BLOCK; }
  int64_t part(int64_t block) const {
    const int64_t rest = width - block * BLOCK;
    return rest < BLOCK ? rest : BLOCK;
  }
  int64_t vectors(int64_t block) const { return (part(block) + LANES - 1) / LANES; }

  // Padding of minus infinity on both sides contributes nothing anywhere.
  Block load_block(int64_t block) {
    const int64_t first = block * BLOCK, count = part(block), vectors = this->vectors(block);
    const float padding = given->from_difference ? 0.0f : -Simd::infinity;
    const float* input = read_block(advance(x, given->x.dtype, first), given->x.dtype, count, block_x, padding);
    const float* target = read_block(advance(t, given->t.dtype, first), given->t.dtype, count, block_t, -Simd::infinity);
    if (!completed()) return {input, target, nullptr, nullptr, vectors, 1.0f};
    complete(input, target, given->from_difference, given->scale, vectors, block_x, block_t, block_d, block_rest);
    return {block_x, block_t, block_d, given->from_difference ? nullptr : block_rest, vectors, given->scale};
  }
  bool completed() const { return given->from_difference || given->scale != 1.0f; }

  // Where block + 1 will be read from: memory latency then hides behind the arithmetic of this one, which the hardware
  // prefetchers, stopping at each page, do not manage.
  void prefetch(int64_t block, int64_t i) const {
    const char* next_x = advance(x, given->x.dtype, (block + 1) * BLOCK + i * LANES);
    const char* next_t = advance(t, given->t.dtype, (block + 1) * BLOCK + i * LANES);
    __builtin_prefetch(next_x);
    __builtin_prefetch(next_t);
  }

  const float* load_upstream(int64_t block) {
    const int64_t step = given->grad.column;
    return read_strided(advance(g, given->grad.dtype, block * BLOCK * step), given->grad.dtype, step, part(block), block_g,
                        first_upstream()[0]);
  }
  F first_upstream() const { return Simd::splat(element(g, given->grad.dtype, 0)); }
  F row_upstream() const { return given->grad.data == nullptr ? Simd::splat(1.0f) : first_upstream(); }

  F across_max(F v) const { return Simd::splat(largest(v)); }
  F keep_real(F v) const { return v; }
  double total_of(F per_row) const { return per_row[0]; }

  float* open_out(void* data, Dtype dtype, int64_t block, float* buffer) {
    if (data == nullptr) return buffer;
    return open_block(advance(data, dtype, row * width + block * BLOCK), dtype, part(block), buffer,
                      given->stream);
  }
  void write_out(void* data, Dtype dtype, int64_t block, float* values, void* negated = nullptr, float rescale = 1.0f) {
    if (data == nullptr) return;
    if (negated != nullptr) negated = advance(negated, dtype, row * width + block * BLOCK);
    write_block(advance(data, dtype, row * width + block * BLOCK), dtype, part(block), values, given->stream, negated,
                rescale);
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, row * width), dtype, width);
  }

  void write_row(float* rows, F v) { rows[row] = v[0]; }
  // One of the `each` that every row has.
  void write_number(float* numbers, int each, int which, F v) { numbers[row * each + which] = v[0]; }
  void write_statistic(int which, F v) { write_number(given->stats, statistics, which, v); }
  F read_statistic(int which) const { return Simd::splat(given->stats[row * statistics + which]); }
};

struct Narrow : Columns {
  struct Sum {
    F value = {};
    SMART_FAST_INLINE void add(F v) { value += v; }
    SMART_FAST_INLINE void scale(F s) { value *= s; }
    SMART_FAST_INLINE F get() const { return value; }
  };

  // Several tiles go through each step together, as far as they fit the innermost cache: one alone is a single chain of
  // dependent operations.
  static constexpr int64_t most_together = 8;
  static int64_t together(int64_t width) {
    const int64_t fitting = NARROW / padded(width);
    return fitting < 1 ? 1 : fitting < most_together ? fitting : most_together;
  }

  const cpu::Divergence* given = nullptr;
  float *block_x, *block_t, *block_d, *block_rest, *block_g, *block_dx, *block_dt;  // [pitch][LANES] each
  Scratch scratch;

  void place(const cpu::Divergence& args, float* memory, int64_t index) {
    given = &args;
    prepare(args.shape, args.mask, args.stream);
    memory += index * 10 * pitch * LANES;
    float** const blocks[] = {&block_x,  &block_t,  &block_d, &block_rest,    &block_g,
                              &block_dx, &block_dt, &lines,   &scratch.exp_x, &scratch.exp_t};
    for (float** block : blocks) {
      *block = memory;
      memory += pitch * LANES;
    }
  }

  bool open(int64_t row, int64_t last) {
    if (!begin(row, last)) return false;
    read(given->x, block_x);
    read(given->t, block_t);
    if (completed())
      complete(block_x, block_t, given->from_difference, given->scale, width, block_x, block_t, block_d, block_rest);
    if (given->grad.data != nullptr) read(given->grad, block_g);
    return true;
  }

  int64_t blocks() const { return 1; }
  int64_t vectors(int64_t) const { return width; }
  Block load_block(int64_t) {
    return {block_x, block_t, completed() ? block_d : nullptr, given->from_difference ? nullptr : block_rest, width,
            given->scale};
  }
  bool completed() const { return given->from_difference || given->scale != 1.0f; }
  void prefetch(int64_t, int64_t) const {}
  const float* load_upstream(int64_t) { return block_g; }
  F first_upstream() const { return load(block_g); }
  F row_upstream() const { return given->grad.data == nullptr ? Simd::splat(1.0f) : first_upstream(); }

  F across_max(F v) const { return v; }
  double total_of(F per_row) const { return total(keep_real(per_row)); }

  float* open_out(void*, Dtype, int64_t, float* buffer) { return buffer; }
  void write_out(void* data, Dtype dtype, int64_t, float* values, void* negated = nullptr, float rescale = 1.0f) {
    if (data != nullptr) write(data, dtype, values, negated, rescale);
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, first * width), dtype, valid * width);
  }

  void write_row(float* rows, F v) {
    alignas(64) float value[LANES];
    store(value, keep_real(v));
    __builtin_memcpy(rows + first, value, size_t(valid) * 4);
  }
  // One of the `each` that every row has.
  void write_number(float* numbers, int each, int which, F v) {
    alignas(64) float value[LANES];
    store(value, keep_real(v));
    for (int64_t lane = 0; lane < valid; ++lane) numbers[(first + lane) * each + which] = value[lane];
  }
  void write_statistic(int which, F v) { write_number(given->stats, statistics, which, v); }
  F read_statistic(int which) const {
    alignas(64) float value[LANES] = {};
    for (int64_t lane = 0; lane < valid; ++lane) value[lane] = given->stats[(first + lane) * statistics + which];
    return load(value);
  }
};

}  // namespace
}  // namespace smart_fast
