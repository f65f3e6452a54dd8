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

// Logits of a block as floats, in `count` vectors.
struct Block {
  const float *x, *t;
  int64_t count;
};

struct Wide {
  // A sum over the row: blocks are summed in vectors, the blocks in double.
  struct Sum {
    double value = 0;
    SMART_FAST_INLINE void add(F v) { value += total(v); }
    SMART_FAST_INLINE void scale(F s) { value *= s[0]; }
    SMART_FAST_INLINE F get() const { return Simd::splat(float(value)); }
  };

  const cpu::Divergence& args;
  int64_t width, row = 0;
  const void *x = nullptr, *t = nullptr, *g = nullptr;
  float *block_x, *block_t, *block_g, *block_dx, *block_dt;

  Wide(const cpu::Divergence& args, float* buffers)
      : args(args), width(args.shape.width), block_x(buffers), block_t(block_x + BLOCK + 64),
        block_g(block_t + BLOCK + 64), block_dx(block_g + BLOCK + 64), block_dt(block_dx + BLOCK + 64) {}

  static constexpr int64_t rows = 1;

  // False if there is nothing to compute.
  bool open(int64_t first, int64_t) {
    row = first;
    x = advance(args.x.data, args.x.dtype, row_offset(args.shape, args.x, row));
    t = advance(args.t.data, args.t.dtype, row_offset(args.shape, args.t, row));
    if (args.grad.data != nullptr)
      g = advance(args.grad.data, args.grad.dtype, row_offset(args.shape, args.grad, row));
    return args.mask == nullptr || args.mask[row] != 0;
  }

  int64_t blocks() const { return (width + BLOCK - 1) / BLOCK; }
  int64_t part(int64_t block) const {
    const int64_t rest = width - block * BLOCK;
    return rest < BLOCK ? rest : BLOCK;
  }

  // Padding of minus infinity on both sides contributes nothing anywhere.
  Block load_block(int64_t block) {
    const int64_t first = block * BLOCK, count = part(block);
    return {read_block(advance(x, args.x.dtype, first), args.x.dtype, count, block_x, -Simd::infinity),
            read_block(advance(t, args.t.dtype, first), args.t.dtype, count, block_t, -Simd::infinity),
            (count + LANES - 1) / LANES};
  }

  // Where block + 1 will be read from: memory latency then hides behind the arithmetic of this one, which the hardware
  // prefetchers, stopping at each page, do not manage.
  void prefetch(int64_t block, int64_t i) const {
    const char* next_x = advance(x, args.x.dtype, (block + 1) * BLOCK + i * LANES);
    const char* next_t = advance(t, args.t.dtype, (block + 1) * BLOCK + i * LANES);
    __builtin_prefetch(next_x);
    __builtin_prefetch(next_t);
  }

  const float* load_upstream(int64_t block) {
    const int64_t step = args.grad.column;
    return read_strided(advance(g, args.grad.dtype, block * BLOCK * step), args.grad.dtype, step, part(block), block_g,
                        first_upstream()[0]);
  }
  F first_upstream() const { return Simd::splat(element(g, args.grad.dtype, 0)); }

  F across_max(F v) const { return Simd::splat(largest(v)); }
  F keep_real(F v) const { return v; }
  double total_of(F per_row) const { return per_row[0]; }

  float* open_out(void* data, Dtype dtype, int64_t block, float* buffer) {
    if (data == nullptr) return buffer;
    return open_block(advance(data, dtype, row * width + block * BLOCK), dtype, part(block), buffer,
                      args.stream);
  }
  void write_out(void* data, Dtype dtype, int64_t block, const float* values) {
    if (data == nullptr) return;
    write_block(advance(data, dtype, row * width + block * BLOCK), dtype, part(block), values, args.stream);
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, row * width), dtype, width);
  }

  void write_statistic(int which, F v) { args.stats[row * statistics + which] = v[0]; }
  F read_statistic(int which) const { return Simd::splat(args.stats[row * statistics + which]); }
};

struct Narrow {
  struct Sum {
    F value = {};
    SMART_FAST_INLINE void add(F v) { value += v; }
    SMART_FAST_INLINE void scale(F s) { value *= s; }
    SMART_FAST_INLINE F get() const { return value; }
  };

  const cpu::Divergence& args;
  int64_t width, first = 0, valid = 0;
  I real = {};
  bool all_real = false;
  float *block_x, *block_t, *block_g, *block_dx, *block_dt;  // [width][LANES] each
  float* lines;  // [LANES][width]: rows as they lie in memory

  Narrow(const cpu::Divergence& args, float* buffers) : args(args), width(args.shape.width) {
    constexpr int64_t size = NARROW * LANES;
    block_x = buffers;
    block_t = block_x + size;
    block_g = block_t + size;
    block_dx = block_g + size;
    block_dt = block_dx + size;
    lines = block_dt + size;
  }

  static constexpr int64_t rows = LANES;

  bool open(int64_t row, int64_t last) {
    first = row;
    valid = last - row < LANES ? last - row : LANES;
    for (int lane = 0; lane < LANES; ++lane)
      real[lane] = lane < valid && (args.mask == nullptr || args.mask[row + lane] != 0) ? -1 : 0;
    if (!any(real)) return false;
    all_real = !any(real == 0);
    transpose(args.x, block_x);
    transpose(args.t, block_t);
    if (args.grad.data != nullptr) transpose(args.grad, block_g);
    return true;
  }

  // Columns become vectors. Rows that are masked or not there are zeros.
  void transpose(const Rows& tensor, float* tile) {
    const bool dense = tensor.column == 1 && args.shape.size1 == 1 && args.shape.size2 == 1 && tensor.stride0 == width;
    if (dense) {
      const void* start = advance(tensor.data, tensor.dtype, first * width);
      for (int64_t i = 0; i < valid * width; i += BLOCK) {
        const int64_t part = valid * width - i < BLOCK ? valid * width - i : BLOCK;
        const float* source = read_block(advance(start, tensor.dtype, i), tensor.dtype, part, lines + i, 0.0f);
        if (source != lines + i) __builtin_memcpy(lines + i, source, size_t(part) * 4);
      }
    } else {
      for (int64_t lane = 0; lane < valid; ++lane) {
        const void* row = advance(tensor.data, tensor.dtype, row_offset(args.shape, tensor, first + lane));
        for (int64_t j = 0; j < width; ++j) lines[lane * width + j] = element(row, tensor.dtype, j * tensor.column);
      }
    }
    for (int64_t lane = 0; lane < valid; ++lane)
      for (int64_t j = 0; j < width; ++j) tile[j * LANES + lane] = lines[lane * width + j];
    if (!all_real)
      for (int64_t j = 0; j < width; ++j) store(tile + j * LANES, keep_real(load(tile + j * LANES)));
  }

  int64_t blocks() const { return 1; }
  Block load_block(int64_t) { return {block_x, block_t, width}; }
  void prefetch(int64_t, int64_t) const {}
  const float* load_upstream(int64_t) { return block_g; }
  F first_upstream() const { return load(block_g); }

  F across_max(F v) const { return v; }
  F keep_real(F v) const { return real ? v : Simd::splat(0.0f); }
  double total_of(F per_row) const { return total(keep_real(per_row)); }

  float* open_out(void*, Dtype, int64_t, float* buffer) { return buffer; }
  void write_out(void* data, Dtype dtype, int64_t, const float* values) {
    if (data == nullptr) return;
    for (int64_t j = 0; j < width; ++j) {
      alignas(64) float column[LANES];
      store(column, all_real ? load(values + j * LANES) : keep_real(load(values + j * LANES)));
      for (int64_t lane = 0; lane < valid; ++lane) lines[lane * width + j] = column[lane];
    }
    for (int64_t i = 0; i < valid * width; i += BLOCK) {
      const int64_t part = valid * width - i < BLOCK ? valid * width - i : BLOCK;
      write_block(advance(data, dtype, first * width + i), dtype, part, lines + i, args.stream);
    }
  }
  void zero_out(void* data, Dtype dtype) {
    if (data != nullptr) write_zeros(advance(data, dtype, first * width), dtype, valid * width);
  }

  void write_statistic(int which, F v) {
    alignas(64) float value[LANES];
    store(value, keep_real(v));
    for (int64_t lane = 0; lane < valid; ++lane) args.stats[(first + lane) * statistics + which] = value[lane];
  }
  F read_statistic(int which) const {
    alignas(64) float value[LANES] = {};
    for (int64_t lane = 0; lane < valid; ++lane) value[lane] = args.stats[(first + lane) * statistics + which];
    return load(value);
  }
};

// What is known of a row once it has been read: splats in a Wide tile.
struct RowStatistics {
  F max_x, max_t, inv_x, inv_t, shift, kl;
  bool near = false;  // |r| < 1 throughout
};

// Scratch of a row: the exponentials, and what each block of them is relative to.
struct Scratch {
  float *exp_x, *exp_t, *base_x, *base_t, *buffers;
  Scratch(float* memory, int64_t width) {
    exp_x = memory;
    exp_t = exp_x + width + 64;
    base_x = exp_t + width + 64;
    base_t = base_x + width / 1024 + 64;
    buffers = base_t + width / 1024 + 64;
  }
};

// First pass: maxima, sums of exponentials and D, block by block with a running maximum (Milakov & Gimelshein, 2018).
template <class Tile>
inline RowStatistics measure_rows(Tile& tile, Scratch& scratch) {
  RowStatistics row;
  const F nothing = Simd::splat(-Simd::infinity);
  F max_x = nothing, max_t = nothing, max_d = {};
  typename Tile::Sum sum_x, sum_t, sum_e;
  const bool narrow = Tile::rows > 1;
  float *exp_x = scratch.exp_x, *exp_t = scratch.exp_t;
  if (narrow) exp_x = scratch.buffers + 7 * NARROW * LANES, exp_t = exp_x + NARROW * LANES;
  scratch.exp_x = exp_x, scratch.exp_t = exp_t;

  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    F block_x = max_x, block_t = max_t;
    for (int64_t i = 0; i < block.count; ++i) {
      const F x = load(block.x + i * LANES), t = load(block.t + i * LANES);
      block_x = Simd::max(block_x, x);
      block_t = Simd::max(block_t, t);
      max_d = Simd::max(max_d, Simd::abs(D::difference(x, t)));
    }
    block_x = tile.across_max(block_x);
    block_t = tile.across_max(block_t);
    max_d = tile.across_max(max_d);
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

    F part_x = {}, part_t = {}, part_e = {};
    if (any(max_d <= 1.0f)) {
      for (int64_t i = 0; i < block.count; ++i) {
        const F x = load(block.x + i * LANES), t = load(block.t + i * LANES);
        const F p = Simd::exp(x - safe_x), q = Simd::exp(t - safe_t);
        tile.prefetch(b, i);
        part_x += p;
        part_t += q;
        part_e += q * D::expm1_clamped(D::difference(x, t));
        store(exp_x + i * LANES, p);
        store(exp_t + i * LANES, q);
      }
    } else {
      for (int64_t i = 0; i < block.count; ++i) {
        const F p = Simd::exp(load(block.x + i * LANES) - safe_x), q = Simd::exp(load(block.t + i * LANES) - safe_t);
        tile.prefetch(b, i);
        part_x += p;
        part_t += q;
        store(exp_x + i * LANES, p);
        store(exp_t + i * LANES, q);
      }
    }
    sum_x.add(part_x);
    sum_t.add(part_t);
    sum_e.add(part_e);
    exp_x += block.count * LANES;
    exp_t += block.count * LANES;
  }

  row.max_x = D::finite_max(max_x);
  row.max_t = D::finite_max(max_t);
  const F total_x = sum_x.get(), total_t = sum_t.get();
  row.inv_x = 1.0f / total_x;
  row.inv_t = 1.0f / total_t;
  row.shift = D::log_ratio_shift(row.max_x, total_x, row.max_t, total_t, sum_e.get(), max_d);
  if (tile.width == 1) {  // one class: p = q = 1, and r must be zero to the last bit
    const Block block = tile.load_block(0);
    row.shift = D::difference(load(block.x), load(block.t));
  }
  row.near = !any(max_d >= 0.5f) && !any(max_d != max_d);  // |D| <= max |d|
  row.kl = F{};
  return row;
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

  SMART_FAST_INLINE void get(const Block& block, int64_t i, F& p, F& q, F& r) const {
    const F x = load(block.x + i * LANES), t = load(block.t + i * LANES);
    p = (STORED ? load(exp_x + i * LANES) : Simd::exp(x - row.max_x)) * scale_x;
    q = (STORED ? load(exp_t + i * LANES) : Simd::exp(t - row.max_t)) * scale_t;
    r = D::difference(x, t) - row.shift;
  }
};

// Second pass for a scalar loss, GRADIENTS included; returns the divergence of each row.
template <Kind KIND, class Tile, bool NEAR, bool GRADIENTS>
inline F sum_rows(Tile& tile, const RowStatistics& row, const Scratch& scratch) {
  const cpu::Divergence& args = tile.args;
  const float alpha = args.alpha;
  const F scale = Simd::splat(KIND == Kind::js ? 0.5f * args.upstream * alpha : args.upstream);
  typename Tile::Sum loss;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, true> probabilities(row, scratch, b);
    float* dx = GRADIENTS ? tile.open_out(args.dx, args.x.dtype, b, tile.block_dx) : nullptr;
    float* dt = GRADIENTS ? tile.open_out(args.dt, args.t.dtype, b, tile.block_dt) : nullptr;
    F part = {};
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r, to_x, to_t;
      probabilities.get(block, i, p, q, r);
      part += D::template row_term<KIND, NEAR>(p, q, r, alpha);
      if (GRADIENTS) {
        D::template row_gradients<KIND, NEAR>(p, q, r, alpha, scale, row.kl, to_x, to_t);
        store(dx + i * LANES, to_x);
        store(dt + i * LANES, to_t);
      }
    }
    loss.add(part);
    if (GRADIENTS) {
      tile.write_out(args.dx, args.x.dtype, b, dx);
      tile.write_out(args.dt, args.t.dtype, b, dt);
    }
  }
  return KIND == Kind::js ? alpha * loss.get() : loss.get();
}

// Second pass for reduction="none".
template <Kind KIND, class Tile>
inline F element_rows(Tile& tile, const RowStatistics& row, const Scratch& scratch) {
  const cpu::Divergence& args = tile.args;
  typename Tile::Sum loss;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, true> probabilities(row, scratch, b);
    float* out = tile.open_out(args.terms, args.terms_dtype, b, tile.block_dx);
    F part = {};
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r;
      probabilities.get(block, i, p, q, r);
      const F term = D::template element_term<KIND>(p, q, r, args.alpha);
      part += term;
      store(out + i * LANES, term);
    }
    loss.add(part);
    tile.write_out(args.terms, args.terms_dtype, b, out);
  }
  return loss.get();
}

template <class Tile, class Body>
inline void each_tile(const cpu::Divergence& args, int64_t chunk, float* buffers, const Body& body) {
  const int64_t per_chunk = cpu::rows_per_chunk(args.shape.width), first = chunk * per_chunk;
  const int64_t last = first + per_chunk < args.shape.rows ? first + per_chunk : args.shape.rows;
  Tile tile(args, buffers);
  for (int64_t row = first; row < last; row += Tile::rows) body(tile, tile.open(row, last));
  if (args.stream) end_of_stream();
}

template <Kind KIND, class Tile>
inline void forward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const bool gradients = args.dx != nullptr || args.dt != nullptr;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double sum = 0;
    each_tile<Tile>(args, chunk, Scratch(memory, args.shape.width).buffers, [&](Tile& tile, bool any_real) {
      RowStatistics row = {};
      if (!any_real) {
        tile.zero_out(args.terms, args.terms_dtype);
        tile.zero_out(args.dx, args.x.dtype);
        tile.zero_out(args.dt, args.t.dtype);
        if (args.stats != nullptr) write_statistics(tile, row);
        return;
      }
      Scratch scratch(memory, args.shape.width);
      row = measure_rows(tile, scratch);
      if (args.terms != nullptr) {
        row.kl = element_rows<KIND>(tile, row, scratch);
      } else if (gradients && KIND == Kind::kl && args.dt != nullptr) {
        // dt needs the KL of the whole row.
        row.kl = row.near ? sum_rows<KIND, Tile, true, false>(tile, row, scratch)
                          : sum_rows<KIND, Tile, false, false>(tile, row, scratch);
        row.near ? sum_rows<KIND, Tile, true, true>(tile, row, scratch)
                 : sum_rows<KIND, Tile, false, true>(tile, row, scratch);
      } else if (gradients) {
        row.kl = row.near ? sum_rows<KIND, Tile, true, true>(tile, row, scratch)
                          : sum_rows<KIND, Tile, false, true>(tile, row, scratch);
      } else {
        row.kl = row.near ? sum_rows<KIND, Tile, true, false>(tile, row, scratch)
                          : sum_rows<KIND, Tile, false, false>(tile, row, scratch);
      }
      sum += tile.total_of(row.kl);
      if (args.stats != nullptr) write_statistics(tile, row);
    });
    if (args.partial != nullptr) args.partial[chunk] = sum;
  }
}

// Gradients of a scalar loss from the statistics of the rows.
template <Kind KIND, class Tile>
inline void backward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const F scale = Simd::splat(KIND == Kind::js ? 0.5f * args.upstream * args.alpha : args.upstream);
  const Scratch scratch(memory, args.shape.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    each_tile<Tile>(args, chunk, scratch.buffers, [&](Tile& tile, bool any_real) {
      if (!any_real) {
        tile.zero_out(args.dx, args.x.dtype);
        tile.zero_out(args.dt, args.t.dtype);
        return;
      }
      const RowStatistics row = read_statistics(tile);
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, scratch, b);
        float* dx = tile.open_out(args.dx, args.x.dtype, b, tile.block_dx);
        float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r, to_x, to_t;
          probabilities.get(block, i, p, q, r);
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
  const Scratch scratch(memory, args.shape.width);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    each_tile<Tile>(args, chunk, scratch.buffers, [&](Tile& tile, bool any_real) {
      if (!any_real) {
        tile.zero_out(args.dx, args.x.dtype);
        tile.zero_out(args.dt, args.t.dtype);
        return;
      }
      const RowStatistics row = read_statistics(tile);
      const F g0 = tile.first_upstream();
      typename Tile::Sum sum_p, sum_q, sum_qgr;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, scratch, b);
        const float* upstream = tile.load_upstream(b);
        F part_p = {}, part_q = {}, part_qgr = {};
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r;
          probabilities.get(block, i, p, q, r);
          const F g = load(upstream + i * LANES), h = g - g0;
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
        const Probabilities<Tile, false> probabilities(row, scratch, b);
        const float* upstream = tile.load_upstream(b);
        float* dx = tile.open_out(args.dx, args.x.dtype, b, tile.block_dx);
        float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r, to_x, to_t;
          probabilities.get(block, i, p, q, r);
          const F h = load(upstream + i * LANES) - g0;
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
SMART_FAST_BY_KIND(divergence_backward, backward)
SMART_FAST_BY_KIND(divergence_elements_backward, elements_backward)
#undef SMART_FAST_BY_KIND

}  // namespace
}  // namespace smart_fast
