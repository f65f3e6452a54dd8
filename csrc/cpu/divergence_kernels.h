// The divergences on the CPU: a first pass over a row for its statistics, which leaves the exponentials in scratch
// memory, and a second one for the terms and, where they are wanted, the gradients.
//
// The kernels are written over two kinds of tile. `Wide` is one row, a vector holding neighboring columns. `Narrow` is
// as many rows as a vector has lanes, one column of them a vector, for rows too short to fill vectors: nothing then
// runs across lanes.
#pragma once

#include "../divergence.h"
#include "kernels.h"
#include "simd.h"

namespace smart_fast {
namespace {

using D = smart_fast::Divergence<Simd>;

constexpr int64_t NARROW = 64;  // widest row of a Narrow tile

// Logits of a block as floats, in `count` vectors; `d` holds x - t where that was given instead of x.
struct Block {
  const float *x, *t, *d;
  int64_t count;

  // NaN where both are minus infinity: no term of a sum depends on it there.
  SMART_FAST_INLINE F difference(int64_t i) const {
    return d != nullptr ? load(d + i * LANES) : load(x + i * LANES) - load(t + i * LANES);
  }
};

// x and d from t and the differences that came in place of x. A class that t leaves out is left out of both.
inline void complete(float* x, float* d, const float* t, int64_t count) {
  for (int64_t i = 0; i < count * LANES; i += LANES) {
    const F target = load(t + i), given = load(d + i);
    const I out = target == -Simd::infinity;
    store(d + i, Simd::select(out, Simd::splat(0.0f), given));
    store(x + i, Simd::select(out, target, target + given));
  }
}

inline void scale_block(float* values, const float* from, float scale, int64_t count) {
  for (int64_t i = 0; i < count * LANES; i += LANES) store(values + i, load(from + i) * scale);
}

// What is known of a row once it has been read: splats in a Wide tile.
struct RowStatistics {
  F max_x, max_t, inv_x, inv_t, shift, kl;
  F sum_x, sum_t, sum_e, max_d;
  bool near = false;  // |r| < 1 throughout; the exponentials of x were not needed
};

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
  float *block_x, *block_t, *block_d, *block_g, *block_dx, *block_dt;
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
    float** const blocks[] = {&block_x, &block_t, &block_d, &block_g, &block_dx, &block_dt};
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
    const float padding = given->relative ? 0.0f : -Simd::infinity;
    const float* input = read_block(advance(x, given->x.dtype, first), given->x.dtype, count, block_x, padding);
    const float* target = read_block(advance(t, given->t.dtype, first), given->t.dtype, count, block_t, -Simd::infinity);
    if (!given->relative && given->scale == 1.0f) return {input, target, nullptr, vectors};
    scale_block(block_t, target, given->scale, vectors);
    float* scaled = given->relative ? block_d : block_x;
    scale_block(scaled, input, given->scale, vectors);
    if (!given->relative) return {block_x, block_t, nullptr, vectors};
    complete(block_x, block_d, block_t, vectors);
    return {block_x, block_t, block_d, vectors};
  }

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
  void write_out(void* data, Dtype dtype, int64_t block, float* values, void* negated = nullptr) {
    if (data == nullptr) return;
    if (negated != nullptr) negated = advance(negated, dtype, row * width + block * BLOCK);
    write_block(advance(data, dtype, row * width + block * BLOCK), dtype, part(block), values, given->stream, negated);
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, row * width), dtype, width);
  }

  void write_row(float* rows, F v) { rows[row] = v[0]; }
  void write_statistic(int which, F v) { given->stats[row * statistics + which] = v[0]; }
  F read_statistic(int which) const { return Simd::splat(given->stats[row * statistics + which]); }
};

struct Narrow {
  struct Sum {
    F value = {};
    SMART_FAST_INLINE void add(F v) { value += v; }
    SMART_FAST_INLINE void scale(F s) { value *= s; }
    SMART_FAST_INLINE F get() const { return value; }
  };

  // Several tiles go through each step together, as far as they fit the innermost cache: one alone is a single chain of
  // dependent operations.
  static constexpr int64_t rows = LANES, most_together = 8;
  static int64_t padded(int64_t width) { return width <= 8 && LANES > 8 ? 8 : whole(width); }
  static int64_t together(int64_t width) {
    const int64_t fitting = NARROW / padded(width);
    return fitting < 1 ? 1 : fitting < most_together ? fitting : most_together;
  }

  const cpu::Divergence* given = nullptr;
  int64_t width = 0, pitch = 0, first = 0, valid = 0;
  I real = {};
  bool all_real = false;
  float *block_x, *block_t, *block_d, *block_g, *block_dx, *block_dt;  // [pitch][LANES] each
  float* lines;  // [LANES][pitch]: rows as they lie in memory
  Scratch scratch;

  void place(const cpu::Divergence& args, float* memory, int64_t index) {
    given = &args;
    width = args.shape.width;
    pitch = padded(width);
    memory += index * 9 * pitch * LANES;
    float** const blocks[] = {&block_x, &block_t,  &block_d, &block_g,       &block_dx,
                              &block_dt, &lines, &scratch.exp_x, &scratch.exp_t};
    for (float** block : blocks) {
      *block = memory;
      memory += pitch * LANES;
    }
  }

  bool open(int64_t row, int64_t last) {
    first = row;
    valid = last - row < LANES ? last - row : LANES;
    all_real = valid == LANES && given->mask == nullptr;
    for (int lane = 0; lane < LANES; ++lane)
      real[lane] = lane < valid && (given->mask == nullptr || given->mask[row + lane] != 0) ? -1 : 0;
    if (!any(real)) return false;
    float* const input = given->relative ? block_d : block_x;
    transpose_in(given->x, input);
    transpose_in(given->t, block_t);
    if (given->scale != 1.0f) {
      scale_block(input, input, given->scale, width);
      scale_block(block_t, block_t, given->scale, width);
    }
    if (given->relative) complete(block_x, block_d, block_t, width);
    if (given->grad.data != nullptr) transpose_in(given->grad, block_g);
    return true;
  }

  // Columns become vectors. Rows that are masked or not there are zeros.
  void transpose_in(const Rows& tensor, float* tile) {
    const bool dense = tensor.column == 1 && given->shape.size1 == 1 && given->shape.size2 == 1 &&
                       tensor.stride0 == width;
    if (dense && width <= 8 && valid == LANES) {  // too short to be copied row by row
      const void* start = advance(tensor.data, tensor.dtype, first * width);
      dense_to_columns(read_block(start, tensor.dtype, LANES * width, lines, 0.0f), width, tile);
    } else if (width <= 8) {
      for (int64_t lane = 0; lane < valid; ++lane) {
        const void* row = advance(tensor.data, tensor.dtype, row_offset(given->shape, tensor, first + lane));
        for (int64_t j = 0; j < width; ++j) lines[lane * width + j] = element(row, tensor.dtype, j * tensor.column);
      }
      dense_to_columns(lines, width, tile);
    } else {
      const float* source = lines;
      int64_t step = width;
      if (dense) {
        const void* start = advance(tensor.data, tensor.dtype, first * width);
        source = read_block(start, tensor.dtype, valid * width, lines, 0.0f);
        if (source != lines && (width != pitch || valid < LANES)) {  // there may be nothing behind the last row
          copy_vectors(lines, source, valid * width);
          source = lines;
        }
      } else {
        step = pitch;
        for (int64_t lane = 0; lane < valid; ++lane) {
          const void* row = advance(tensor.data, tensor.dtype, row_offset(given->shape, tensor, first + lane));
          float* const line = lines + lane * pitch;
          const float* read = read_strided(row, tensor.dtype, tensor.column, width, line, 0.0f);
          if (read != line) copy_vectors(line, read, width);
        }
      }
      for (int64_t j = 0; j < pitch; j += LANES) transpose(source + j, step, tile + j * LANES, LANES);
    }
    if (!all_real)
      for (int64_t j = 0; j < width; ++j) store(tile + j * LANES, keep_real(load(tile + j * LANES)));
  }

  int64_t blocks() const { return 1; }
  int64_t vectors(int64_t) const { return width; }
  Block load_block(int64_t) { return {block_x, block_t, given->relative ? block_d : nullptr, width}; }
  void prefetch(int64_t, int64_t) const {}
  const float* load_upstream(int64_t) { return block_g; }
  F first_upstream() const { return load(block_g); }
  F row_upstream() const { return given->grad.data == nullptr ? Simd::splat(1.0f) : first_upstream(); }

  F across_max(F v) const { return v; }
  F keep_real(F v) const { return real ? v : Simd::splat(0.0f); }
  double total_of(F per_row) const { return total(keep_real(per_row)); }

  float* open_out(void*, Dtype, int64_t, float* buffer) { return buffer; }
  void write_out(void* data, Dtype dtype, int64_t, float* values, void* negated = nullptr) {
    if (data == nullptr) return;
    if (negated != nullptr) negated = advance(negated, dtype, first * width);
    if (!all_real)
      for (int64_t j = 0; j < width; ++j) store(values + j * LANES, keep_real(load(values + j * LANES)));
    void* const target = advance(data, dtype, first * width);
    if (width <= 8) {
      float* const dense = valid == LANES ? open_block(target, dtype, LANES * width, lines, given->stream) : lines;
      columns_to_dense(values, width, dense);
      return write_block(target, dtype, valid * width, dense, given->stream, negated);
    }
    for (int64_t j = 0; j < pitch; j += LANES) transpose(values + j * LANES, LANES, lines + j, pitch);
    for (int64_t lane = 1; lane < valid; ++lane) copy_vectors(lines + lane * width, lines + lane * pitch, width);
    write_block(target, dtype, valid * width, lines, given->stream, negated);
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, first * width), dtype, valid * width);
  }

  void write_row(float* rows, F v) {
    alignas(64) float value[LANES];
    store(value, keep_real(v));
    __builtin_memcpy(rows + first, value, size_t(valid) * 4);
  }
  void write_statistic(int which, F v) {
    alignas(64) float value[LANES];
    store(value, keep_real(v));
    for (int64_t lane = 0; lane < valid; ++lane) given->stats[(first + lane) * statistics + which] = value[lane];
  }
  F read_statistic(int which) const {
    alignas(64) float value[LANES] = {};
    for (int64_t lane = 0; lane < valid; ++lane) value[lane] = given->stats[(first + lane) * statistics + which];
    return load(value);
  }
};

// First pass: maxima, sums of exponentials and D, block by block with a running maximum (Milakov & Gimelshein, 2018).
//
// As long as |d| < 1/2, the sums of exp(t) and of exp(t) expm1(d) are all that is needed: exp(x) = exp(t) (1 + expm1(d)).
// Where a later block goes further apart, or holds a NaN that exp(x) must show, the row is read anew.
template <class Tile>
inline void add_up(Tile& tile, RowStatistics& row) {
  const Scratch& scratch = tile.scratch;
  const F nothing = Simd::splat(-Simd::infinity);
  const bool narrow = Tile::rows > 1;
  F max_x = nothing, max_t = nothing, max_d = {}, check = {};
  typename Tile::Sum sum_x, sum_t, sum_e;
  row.near = true;

  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    F block_x = max_x, block_t = max_t;
    for (int64_t i = 0; i < block.count; ++i) {
      check += load(block.x + i * LANES);
      block_x = Simd::max(load(block.x + i * LANES), block_x);
      block_t = Simd::max(load(block.t + i * LANES), block_t);
      max_d = Simd::max(Simd::abs(block.difference(i)), max_d);
    }
    block_x = tile.across_max(block_x);
    block_t = tile.across_max(block_t);
    max_d = tile.across_max(max_d);
    if (row.near && (any(max_d >= 0.5f) || any(check != check))) {
      row.near = false;
      if (b > 0) {
        max_x = max_t = nothing;
        sum_x = sum_t = sum_e = typename Tile::Sum();
        b = -1;
        continue;
      }
    }
    const F safe_x = D::finite_max(block_x), safe_t = D::finite_max(block_t);
    if (b > 0) {
      if (any(block_x > max_x)) sum_x.scale(Simd::exp(max_x - safe_x));
      if (any(block_t > max_t)) {
        const F scale = Simd::exp(max_t - safe_t);
        sum_t.scale(scale);
        sum_e.scale(scale);
      }
    }
    max_x = block_x;
    max_t = block_t;
    if (!narrow) scratch.base_x[b] = max_x[0], scratch.base_t[b] = max_t[0];

    float *exp_x = scratch.exp_x + b * BLOCK, *exp_t = scratch.exp_t + b * BLOCK;
    F part_x = {}, part_t = {}, part_e = {};
    const auto visit = [&](auto with_x, auto with_e) {
      for (int64_t i = 0; i < block.count; ++i) {
        tile.prefetch(b, i);
        const F q = Simd::exp(load(block.t + i * LANES) - safe_t);
        part_t += q;
        store(exp_t + i * LANES, q);
        if (with_e) part_e += q * D::expm1_clamped(block.difference(i));
        if (with_x) {
          const F p = Simd::exp(load(block.x + i * LANES) - safe_x);
          part_x += p;
          store(exp_x + i * LANES, p);
        }
      }
    };
    if (row.near)
      visit(False(), True());
    else if (any(max_d <= 1.0f))
      visit(True(), True());
    else
      visit(True(), False());
    sum_x.add(part_x);
    sum_t.add(part_t);
    sum_e.add(part_e);
  }

  row.max_t = D::finite_max(max_t);
  row.max_x = row.near ? row.max_t : D::finite_max(max_x);
  row.sum_t = sum_t.get();
  row.sum_e = sum_e.get();
  row.sum_x = row.near ? row.sum_t + row.sum_e : sum_x.get();
  row.max_d = max_d;
}

// What follows from the sums.
template <class Tile>
inline void conclude(Tile& tile, RowStatistics& row) {
  row.inv_x = 1.0f / row.sum_x;
  row.inv_t = 1.0f / row.sum_t;
  row.shift = D::log_ratio_shift(row.max_x, row.sum_x, row.max_t, row.sum_t, row.sum_e, row.max_d);
  if (tile.width == 1)  // one class: p = q = 1, and r must be zero to the last bit
    row.shift = Simd::max(tile.load_block(0).difference(0), Simd::splat(-Simd::infinity));
  row.kl = F{};
}

template <class Tile>
inline RowStatistics read_statistics(const Tile& tile) {
  RowStatistics row;
  row.max_x = tile.read_statistic(stat_max_x);
  row.max_t = tile.read_statistic(stat_max_t);
  row.inv_x = tile.read_statistic(stat_inv_sum_x);
  row.inv_t = tile.read_statistic(stat_inv_sum_t);
  row.shift = tile.read_statistic(stat_shift);
  row.kl = tile.read_statistic(stat_kl);
  return row;
}

template <class Tile>
inline void write_statistics(Tile& tile, const RowStatistics& row) {
  tile.write_statistic(stat_max_t, row.max_t);
  tile.write_statistic(stat_inv_sum_t, row.inv_t);
  tile.write_statistic(stat_max_x, row.max_x);
  tile.write_statistic(stat_inv_sum_x, row.inv_x);
  tile.write_statistic(stat_shift, row.shift);
  tile.write_statistic(stat_kl, row.kl);
}

// p, q and r of vector i of a block: from the exponentials in scratch memory, or computed anew from the statistics.
template <class Tile, bool STORED>
struct Probabilities {
  const RowStatistics& row;
  const float *exp_x, *exp_t;
  F scale_x, scale_t;

  Probabilities(const RowStatistics& row, const Scratch& scratch, int64_t b)
      : row(row), exp_x(scratch.exp_x), exp_t(scratch.exp_t), scale_x(row.inv_x), scale_t(row.inv_t) {
    if (STORED && Tile::rows == 1) {
      exp_x += b * BLOCK;
      exp_t += b * BLOCK;
      scale_x *= Simd::exp(Simd::splat(scratch.base_x[b]) - row.max_x);
      scale_t *= Simd::exp(Simd::splat(scratch.base_t[b]) - row.max_t);
    }
  }

  // NEAR: p is not needed.
  template <bool NEAR>
  SMART_FAST_INLINE void get(const Block& block, int64_t i, F& p, F& q, F& r) const {
    if (NEAR)
      p = F{};
    else
      p = (STORED ? load(exp_x + i * LANES) : Simd::exp(load(block.x + i * LANES) - row.max_x)) * scale_x;
    q = (STORED ? load(exp_t + i * LANES) : Simd::exp(load(block.t + i * LANES) - row.max_t)) * scale_t;
    // Any number at all where both logits are minus infinity; the least one keeps away from the terms of the near.
    r = Simd::max(block.difference(i) - row.shift, Simd::splat(NEAR ? -1.0f : -Simd::infinity));
  }
};

// Third pass of kl: its gradient to t needs the KL of the whole row. q and r lie where the exponentials were.
template <class Tile>
inline void gradients_to_target(Tile& tile, F scale, F kl) {
  const cpu::Divergence& args = *tile.given;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const float *q = tile.scratch.exp_t + b * BLOCK, *r = tile.scratch.exp_x + b * BLOCK;
    float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
    for (int64_t i = 0; i < tile.vectors(b); ++i)
      store(dt + i * LANES, -scale * D::times(load(q + i * LANES), load(r + i * LANES) + kl));
    tile.write_out(args.dt, args.t.dtype, b, dt);
  }
}

// Second pass for a loss of whole rows, GRADIENTS included; returns the divergence of each row. One copy of it, so that
// a gradient has the same bits whatever else is wanted.
template <Kind KIND, class Tile, bool NEAR, bool GRADIENTS>
__attribute__((noinline)) F sum_rows(Tile& tile, const RowStatistics& row) {
  const cpu::Divergence& args = *tile.given;
  const float alpha = args.alpha;
  const F scale = Simd::splat(KIND == Kind::js ? 0.5f * args.upstream * alpha : args.upstream);
  // Opposite gradients of 16 bits are rounded once.
  const bool opposite = (KIND == Kind::js || (KIND == Kind::sym_kl && alpha == 1.0f)) && args.dx != nullptr &&
                        args.dt != nullptr && args.x.dtype == args.t.dtype && args.x.dtype != Dtype::fp32;
  const bool with_dt = GRADIENTS && KIND != Kind::kl && !opposite;
  typename Tile::Sum loss;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, true> probabilities(row, tile.scratch, b);
    float* dx = GRADIENTS ? tile.open_out(args.dx, args.x.dtype, b, tile.block_dx) : nullptr;
    float* dt = with_dt ? tile.open_out(args.dt, args.t.dtype, b, tile.block_dt) : nullptr;
    F part = {};
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r, to_x, to_t;
      probabilities.template get<NEAR>(block, i, p, q, r);
      part += D::template row_term<KIND, NEAR>(p, q, r, alpha);
      if (GRADIENTS) {
        D::template row_gradients<KIND, NEAR>(p, q, r, alpha, scale, row.kl, to_x, to_t);
        store(dx + i * LANES, to_x);
        if (with_dt) store(dt + i * LANES, to_t);
        if (KIND == Kind::kl) {
          store(tile.scratch.exp_t + b * BLOCK + i * LANES, q);
          store(tile.scratch.exp_x + b * BLOCK + i * LANES, r);
        }
      }
    }
    loss.add(part);
    if (GRADIENTS) {
      tile.write_out(args.dx, args.x.dtype, b, dx, opposite ? args.dt : nullptr);
      if (with_dt) tile.write_out(args.dt, args.t.dtype, b, dt);
    }
  }
  const F sum = KIND == Kind::js ? alpha * loss.get() : loss.get();
  if (GRADIENTS && KIND == Kind::kl && args.dt != nullptr) gradients_to_target(tile, scale, sum);
  return sum;
}

// Second pass for reduction="none".
template <Kind KIND, class Tile, bool STORED>
inline F element_rows(Tile& tile, const RowStatistics& row) {
  const cpu::Divergence& args = *tile.given;
  typename Tile::Sum loss;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, STORED> probabilities(row, tile.scratch, b);
    float* out = tile.open_out(args.terms, args.terms_dtype, b, tile.block_dx);
    F part = {};
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r;
      probabilities.template get<false>(block, i, p, q, r);
      const F term = D::template element_term<KIND>(p, q, r, args.alpha);
      part += term;
      store(out + i * LANES, term);
    }
    loss.add(part);
    tile.write_out(args.terms, args.terms_dtype, b, out);
  }
  return loss.get();
}

// Every tile of a chunk through all phases, several tiles through each phase together; `none` takes those without a real
// row.
template <class Tile, class None, class... Phases>
inline void each_tile(const cpu::Divergence& args, int64_t chunk, float* memory, const None& none,
                      const Phases&... phases) {
  const int64_t per_chunk = cpu::rows_per_chunk(args.shape.width), first = chunk * per_chunk;
  const int64_t last = first + per_chunk < args.shape.rows ? first + per_chunk : args.shape.rows;
  const int64_t together = Tile::together(args.shape.width);
  Tile tiles[Tile::most_together];
  RowStatistics rows[Tile::most_together];
  bool real[Tile::most_together];
  for (int64_t k = 0; k < together; ++k) tiles[k].place(args, memory, k);
  for (int64_t start = first; start < last;) {
    int64_t count = 0;
    for (; count < together && start < last; ++count, start += Tile::rows) {
      real[count] = tiles[count].open(start, last);
      rows[count] = RowStatistics();
      if (!real[count]) none(tiles[count]);
    }
    const auto run = [&](const auto& phase) {
      for (int64_t k = 0; k < count; ++k)
        if (real[k]) phase(tiles[k], rows[k]);
    };
    (run(phases), ...);
  }
  if (args.stream) end_of_stream();
}

template <Kind KIND, class Tile, bool GRADIENTS>
inline F sum_rows(Tile& tile, const RowStatistics& row) {
  return row.near ? sum_rows<KIND, Tile, true, GRADIENTS>(tile, row) : sum_rows<KIND, Tile, false, GRADIENTS>(tile, row);
}

template <Kind KIND, class Tile>
inline void forward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const bool gradients = args.dx != nullptr || args.dt != nullptr;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double sum = 0;
    const auto none = [&](Tile& tile) {
      tile.zero_out(args.terms, args.terms_dtype);
      tile.zero_out(args.dx, args.x.dtype);
      tile.zero_out(args.dt, args.t.dtype);
      if (args.stats != nullptr) write_statistics(tile, RowStatistics());
      if (args.losses != nullptr) tile.write_row(args.losses, F{});
    };
    const auto terms = [&](Tile& tile, RowStatistics& row) {
      if (args.terms != nullptr) {
        row.kl = row.near ? element_rows<KIND, Tile, false>(tile, row) : element_rows<KIND, Tile, true>(tile, row);
      } else if (gradients) {
        row.kl = sum_rows<KIND, Tile, true>(tile, row);
      } else {
        row.kl = sum_rows<KIND, Tile, false>(tile, row);
      }
      sum += tile.total_of(row.kl);
      if (args.losses != nullptr) tile.write_row(args.losses, row.kl * args.weight);
      if (args.stats != nullptr) write_statistics(tile, row);
    };
    each_tile<Tile>(args, chunk, memory, none, add_up<Tile>, conclude<Tile>, terms);
    if (args.partial != nullptr) args.partial[chunk] = sum;
  }
}

// Gradients of a loss of whole rows from their statistics.
template <Kind KIND, class Tile>
inline void backward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const float factor = KIND == Kind::js ? 0.5f * args.upstream * args.alpha : args.upstream;
  const auto none = [&](Tile& tile) {
    tile.zero_out(args.dx, args.x.dtype);
    tile.zero_out(args.dt, args.t.dtype);
  };
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    each_tile<Tile>(args, chunk, memory, none, [&](Tile& tile, RowStatistics& row) {
      row = read_statistics(tile);
      const F scale = tile.row_upstream() * factor;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        float* dx = tile.open_out(args.dx, args.x.dtype, b, tile.block_dx);
        float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r, to_x, to_t;
          probabilities.template get<false>(block, i, p, q, r);
          D::template row_gradients<KIND, false>(p, q, r, args.alpha, scale, row.kl, to_x, to_t);
          store(dx + i * LANES, to_x);
          store(dt + i * LANES, to_t);
        }
        tile.write_out(args.dx, args.x.dtype, b, dx);
        tile.write_out(args.dt, args.t.dtype, b, dt);
      }
    });
  }
}

template <Kind KIND, class Tile>
inline void elements_backward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const auto none = [&](Tile& tile) {
    tile.zero_out(args.dx, args.x.dtype);
    tile.zero_out(args.dt, args.t.dtype);
  };
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    each_tile<Tile>(args, chunk, memory, none, [&](Tile& tile, RowStatistics& row) {
      row = read_statistics(tile);
      const F g0 = tile.first_upstream() * args.scale;
      typename Tile::Sum sum_p, sum_q, sum_qgr;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        const float* upstream = tile.load_upstream(b);
        F part_p = {}, part_q = {}, part_qgr = {};
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r;
          probabilities.template get<false>(block, i, p, q, r);
          const F g = load(upstream + i * LANES) * args.scale, h = g - g0;
          part_p += p * h;
          part_q += q * h;
          part_qgr += D::times(q, g * r);
        }
        sum_p.add(part_p);
        sum_q.add(part_q);
        sum_qgr.add(part_qgr);
      }
      const D::ElementSums sums = {sum_p.get(), sum_q.get(), sum_qgr.get()};
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        const float* upstream = tile.load_upstream(b);
        float* dx = tile.open_out(args.dx, args.x.dtype, b, tile.block_dx);
        float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r, to_x, to_t;
          probabilities.template get<false>(block, i, p, q, r);
          const F h = load(upstream + i * LANES) * args.scale - g0;
          D::template element_gradients<KIND>(p, q, r, h, g0, sums, args.alpha, to_x, to_t);
          store(dx + i * LANES, to_x);
          store(dt + i * LANES, to_t);
        }
        tile.write_out(args.dx, args.x.dtype, b, dx);
        tile.write_out(args.dt, args.t.dtype, b, dt);
      }
    });
  }
}

template <class Tile>
inline void write_parts(Tile& tile, const RowStatistics& row) {
  tile.write_statistic(part_max_x, row.max_x);
  tile.write_statistic(part_sum_x, row.sum_x);
  tile.write_statistic(part_max_t, row.max_t);
  tile.write_statistic(part_sum_t, row.sum_t);
  tile.write_statistic(part_max_d, row.max_d);
  tile.write_statistic(part_sum_e, row.sum_e);
}

// Statistics of a slice of the vocabulary, for merging with those of the others.
template <class Tile>
inline void measure_slices(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const auto none = [](Tile& tile) { write_parts(tile, RowStatistics()); };
  for (int64_t chunk = begin; chunk < end; ++chunk)
    each_tile<Tile>(args, chunk, memory, none, add_up<Tile>, [](Tile& tile, RowStatistics& row) {
      // Without a finite logit there is nothing that sums could be relative to.
      row.max_x = Simd::select(row.sum_x == 0.0f, Simd::splat(-Simd::infinity), row.max_x);
      row.max_t = Simd::select(row.sum_t == 0.0f, Simd::splat(-Simd::infinity), row.max_t);
      write_parts(tile, row);
    });
}

inline void divergence_measure(const cpu::Divergence& args, int64_t begin, int64_t end, float* scratch) {
  return args.shape.width <= NARROW ? measure_slices<Narrow>(args, begin, end, scratch)
                                    : measure_slices<Wide>(args, begin, end, scratch);
}

// A slice's share of the divergence of each row, from the statistics of whole rows.
template <Kind KIND, class Tile>
inline void finish(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const auto none = [&](Tile& tile) { tile.write_row(args.losses, F{}); };
  for (int64_t chunk = begin; chunk < end; ++chunk)
    each_tile<Tile>(args, chunk, memory, none, [&](Tile& tile, RowStatistics& row) {
      row = read_statistics(tile);
      typename Tile::Sum loss;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        F part = {};
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r;
          probabilities.template get<false>(block, i, p, q, r);
          part += D::template row_term<KIND, false>(p, q, r, args.alpha);
        }
        loss.add(part);
      }
      tile.write_row(args.losses, KIND == Kind::js ? args.alpha * loss.get() : loss.get());
    });
}

#define SMART_FAST_BY_KIND(name, function)                                                              \
  inline void name(const cpu::Divergence& args, int64_t begin, int64_t end, float* scratch) {           \
    const bool narrow = args.shape.width <= NARROW;                                                     \
    switch (args.kind) {                                                                                \
      case Kind::kl:                                                                                    \
        return narrow ? function<Kind::kl, Narrow>(args, begin, end, scratch)                           \
                      : function<Kind::kl, Wide>(args, begin, end, scratch);                            \
      case Kind::sym_kl:                                                                                \
        return narrow ? function<Kind::sym_kl, Narrow>(args, begin, end, scratch)                       \
                      : function<Kind::sym_kl, Wide>(args, begin, end, scratch);                        \
      case Kind::js:                                                                                    \
        return narrow ? function<Kind::js, Narrow>(args, begin, end, scratch)                           \
                      : function<Kind::js, Wide>(args, begin, end, scratch);                            \
    }                                                                                                   \
  }
SMART_FAST_BY_KIND(divergence_forward, forward)
SMART_FAST_BY_KIND(divergence_finish, finish)
SMART_FAST_BY_KIND(divergence_backward, backward)
SMART_FAST_BY_KIND(divergence_elements_backward, elements_backward)
#undef SMART_FAST_BY_KIND

}  // namespace
}  // namespace smart_fast
