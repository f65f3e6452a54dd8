// The divergences on the CPU, over tiles of rows: a first pass for their statistics, which leaves the exponentials in
// scratch memory, and a second one for the terms and, where they are wanted, the gradients.
#pragma once

#include "tiles.h"

namespace smart_fast {
namespace {

// x - t of the class with the largest t.
inline F shift_of(const Block& block, F max_t) {
  F found = Simd::splat(-Simd::infinity);
  for (int64_t i = 0; i < block.count; ++i)
    found = Simd::max(Simd::select(load(block.t + i * LANES) == max_t, block.difference(i), found), found);
  return found;
}

// First pass: maxima, sums of exponentials, c and L, block by block with a running maximum (Milakov & Gimelshein, 2018).
//
// As long as |delta| < 1/2, the sums of exp(t) and of exp(t) expm1(delta) are all that is needed: exp(x) is exp(t + c) times
// 1 + expm1(delta). Where a later block goes further apart, or holds a NaN that exp(x) must show, the row is read anew.
template <class Tile>
inline void add_up(Tile& tile, RowStatistics& row) {
  const Scratch& scratch = tile.scratch;
  const F nothing = Simd::splat(-Simd::infinity);
  const float scale = tile.given->scale;
  const bool narrow = Tile::rows > 1;
  F max_x = nothing, max_t = nothing, max_d = {}, check = {};
  typename Tile::Sum sum_x, sum_t, sum_e;
  row.near = true;
  row.shift = F{};
  row.shifted = false;

  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    F block_x = max_x, block_t = max_t, most = nothing, least = -nothing;
    for (int64_t i = 0; i < block.count; ++i) {
      const F difference = block.difference(i);
      check += load(block.x + i * LANES);
      block_x = Simd::max(load(block.x + i * LANES), block_x);
      block_t = Simd::max(load(block.t + i * LANES), block_t);
      most = Simd::max(difference, most);
      least = Simd::min(difference, least);
    }
    block_x = tile.across_max(block_x);
    block_t = tile.across_max(block_t);
    if (b == 0) {
      most = tile.across_max(most);
      least = -tile.across_max(-least);
      // Differences that are less apart than they are from zero.
      const I together = most - least < 0.5f * Simd::abs(most + least);
      if (any(together)) {
        const F found = tile.across_max(shift_of(block, block_t));
        row.shift = Simd::select(together, D::finite_or_zero(found), F{});
        row.shifted = true;
      }
    }
    max_d = Simd::max(scale * Simd::max(most - row.shift, row.shift - least), max_d);
    max_d = tile.across_max(max_d);
    if (row.near && (any(max_d >= 0.5f) || any(check != check))) {
      row.near = false;
      if (b > 0) {
        max_x = max_t = nothing;
        max_d = F{};
        sum_x = sum_t = sum_e = typename Tile::Sum();
        row.shift = F{};
        row.shifted = false;
        b = -1;
        continue;
      }
    }
    const F safe_x = D::finite_max(block_x), safe_t = D::finite_max(block_t);
    if (b > 0) {
      if (any(block_x > max_x)) sum_x.scale(Simd::exp(max_x - safe_x));
      if (any(block_t > max_t)) {
        const F factor = Simd::exp(max_t - safe_t);
        sum_t.scale(factor);
        sum_e.scale(factor);
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
        if (with_e) part_e += q * D::expm1_clamped(block.delta(i, row));
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
  row.sum_t = sum_t.get();
  row.sum_e = sum_e.get();
  row.max_d = max_d;
  if (row.near) {
    D::sums_of_x(row.max_t, row.sum_t, row.sum_e, row.shift * scale, row.max_x, row.sum_x);
    return;
  }
  row.max_x = D::finite_max(max_x);
  row.sum_x = sum_x.get();
}

// What follows from the sums.
template <class Tile>
inline void conclude(Tile& tile, RowStatistics& row) {
  const float scale = tile.given->scale;
  row.inv_x = 1.0f / row.sum_x;
  row.inv_t = 1.0f / row.sum_t;
  if (!row.near) {
    row.shift = Simd::select(row.max_d <= 1.0f, row.shift, D::finite_or_zero((row.max_x - row.max_t) / scale));
    row.shifted = true;
  }
  row.log_ratio = D::log_ratio(row.max_x, row.sum_x, row.max_t, row.sum_t, row.sum_e, row.max_d, row.shift * scale);
  if (tile.width == 1)  // one class: p = q = 1, and r must be zero to the last bit
    row.log_ratio = Simd::max(tile.load_block(0).delta(0, row), Simd::splat(-Simd::infinity));
}

template <class Tile>
inline RowStatistics read_statistics(const Tile& tile) {
  RowStatistics row;
  row.max_x = tile.read_statistic(stat_max_x);
  row.max_t = tile.read_statistic(stat_max_t);
  row.inv_x = tile.read_statistic(stat_inv_sum_x);
  row.inv_t = tile.read_statistic(stat_inv_sum_t);
  row.shift = tile.read_statistic(stat_shift);
  row.log_ratio = tile.read_statistic(stat_log_ratio);
  row.first = tile.read_statistic(stat_first);
  row.second = tile.read_statistic(stat_second);
  row.shifted = any(row.shift != 0.0f);
  return row;
}

template <class Tile>
inline void write_statistics(Tile& tile, const RowStatistics& row) {
  tile.write_statistic(stat_max_t, row.max_t);
  tile.write_statistic(stat_inv_sum_t, row.inv_t);
  tile.write_statistic(stat_max_x, row.max_x);
  tile.write_statistic(stat_inv_sum_x, row.inv_x);
  tile.write_statistic(stat_shift, row.shift);
  tile.write_statistic(stat_log_ratio, row.log_ratio);
  tile.write_statistic(stat_first, row.first);
  tile.write_statistic(stat_second, row.second);
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
    r = Simd::max(block.delta(i, row) - row.log_ratio, Simd::splat(NEAR ? -1.0f : -Simd::infinity));
  }
};

template <Kind KIND>
using Row = RowFormulas<Simd, KIND>;

// Sums of N numbers over a row.
template <class Tile, int N>
struct Sums {
  typename Tile::Sum sums[N];

  SMART_FAST_INLINE void add(const F (&parts)[N]) {
    for (int k = 0; k < N; ++k) sums[k].add(parts[k]);
  }
  SMART_FAST_INLINE void get(F (&values)[N]) const {
    for (int k = 0; k < N; ++k) values[k] = sums[k].get();
  }
};

// Gradients of fp32 are rescaled before they are stored, those of 16 bits as they are rounded (write_block).
SMART_FAST_INLINE F rescale_of(const cpu::Divergence& args, Dtype dtype) {
  return Simd::splat(dtype == Dtype::fp32 ? args.rescale : 1.0f);
}

// Third pass where the gradient to t alone had to wait for the sums. q and r lie where the exponentials were.
template <Kind KIND, class Tile>
inline void gradients_to_target(Tile& tile, F scale, const RowStatistics& row) {
  const cpu::Divergence& args = *tile.given;
  const F rescale_t = rescale_of(args, args.t.dtype);
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const float *q = tile.scratch.exp_t + b * BLOCK, *r = tile.scratch.exp_x + b * BLOCK;
    float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
    for (int64_t i = 0; i < tile.vectors(b); ++i) {
      F to_x, to_t;
      Row<KIND>::template row_gradients<false>(F{}, load(q + i * LANES), load(r + i * LANES), args.alpha, scale, row.first,
                                               row.second, to_x, to_t);
      store(dt + i * LANES, to_t * rescale_t);
    }
    tile.write_out(args.dt, args.t.dtype, b, dt, nullptr, args.rescale);
  }
}

// Both gradients, once all statistics are known.
template <Kind KIND, class Tile, bool STORED, bool NEAR>
inline void gradients_of_row(Tile& tile, F scale, const RowStatistics& row) {
  const cpu::Divergence& args = *tile.given;
  const F rescale_x = rescale_of(args, args.x.dtype), rescale_t = rescale_of(args, args.t.dtype);
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, STORED> probabilities(row, tile.scratch, b);
    float* dx = tile.open_out(args.dx, args.x.dtype, b, tile.block_dx);
    float* dt = tile.open_out(args.dt, args.t.dtype, b, tile.block_dt);
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r, to_x, to_t;
      probabilities.template get<NEAR>(block, i, p, q, r);
      Row<KIND>::template row_gradients<NEAR>(p, q, r, args.alpha, scale, row.first, row.second, to_x, to_t);
      store(dx + i * LANES, to_x * rescale_x);
      store(dt + i * LANES, to_t * rescale_t);
    }
    tile.write_out(args.dx, args.x.dtype, b, dx, nullptr, args.rescale);
    tile.write_out(args.dt, args.t.dtype, b, dt, nullptr, args.rescale);
  }
}

// Second pass for a loss of whole rows, GRADIENTS included; completes the statistics of the row. One copy of it, so that
// a gradient has the same bits whatever else is wanted.
template <Kind KIND, class Tile, bool NEAR, bool GRADIENTS>
__attribute__((noinline)) void sum_rows(Tile& tile, RowStatistics& row) {
  const cpu::Divergence& args = *tile.given;
  constexpr Late late = Row<KIND>::late;
  constexpr bool now = GRADIENTS && late != Late::both;
  const float alpha = args.alpha;
  const F scale = Simd::splat(Row<KIND>::factor(args.upstream, alpha));
  const F rescale_x = rescale_of(args, args.x.dtype), rescale_t = rescale_of(args, args.t.dtype);
  // Opposite gradients of 16 bits are rounded once.
  const bool opposite = Row<KIND>::opposite(alpha) && args.dx != nullptr && args.dt != nullptr &&
                        args.x.dtype == args.t.dtype && args.x.dtype != Dtype::fp32;
  const bool with_dt = now && late == Late::none && !opposite;
  Sums<Tile, Row<KIND>::row_sums> sums;
  for (int64_t b = 0; b < tile.blocks(); ++b) {
    const Block block = tile.load_block(b);
    const Probabilities<Tile, true> probabilities(row, tile.scratch, b);
    float* dx = now ? tile.open_out(args.dx, args.x.dtype, b, tile.block_dx) : nullptr;
    float* dt = with_dt ? tile.open_out(args.dt, args.t.dtype, b, tile.block_dt) : nullptr;
    F part[Row<KIND>::row_sums] = {};
    for (int64_t i = 0; i < block.count; ++i) {
      F p, q, r, to_x, to_t;
      probabilities.template get<NEAR>(block, i, p, q, r);
      Row<KIND>::template add_row_terms<NEAR>(p, q, r, alpha, part);
      if (now) {
        Row<KIND>::template row_gradients<NEAR>(p, q, r, alpha, scale, F{}, F{}, to_x, to_t);
        store(dx + i * LANES, to_x * rescale_x);
        if (with_dt) store(dt + i * LANES, to_t * rescale_t);
        if (late == Late::target) {
          store(tile.scratch.exp_t + b * BLOCK + i * LANES, q);
          store(tile.scratch.exp_x + b * BLOCK + i * LANES, r);
        }
      }
    }
    sums.add(part);
    if (now) {
      tile.write_out(args.dx, args.x.dtype, b, dx, opposite ? args.dt : nullptr, args.rescale);
      if (with_dt) tile.write_out(args.dt, args.t.dtype, b, dt, nullptr, args.rescale);
    }
  }
  F totals[Row<KIND>::row_sums];
  sums.get(totals);
  Row<KIND>::conclude(totals, alpha, row.first, row.second);
  if (now && late == Late::target && args.dt != nullptr) gradients_to_target<KIND>(tile, scale, row);
  if (GRADIENTS && late == Late::both) gradients_of_row<KIND, Tile, true, NEAR>(tile, scale, row);
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
      const F term = Row<KIND>::element_term(p, q, r, args.alpha);
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
inline F sum_rows(Tile& tile, RowStatistics& row) {
  if (row.near)
    sum_rows<KIND, Tile, true, GRADIENTS>(tile, row);
  else
    sum_rows<KIND, Tile, false, GRADIENTS>(tile, row);
  return Row<KIND>::loss(row.first, row.second, tile.given->alpha);
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
      F loss;
      if (args.terms != nullptr) {
        loss = row.near ? element_rows<KIND, Tile, false>(tile, row) : element_rows<KIND, Tile, true>(tile, row);
        row.first = loss;  // gradients of terms ask for no sums of the row
      } else if (gradients) {
        loss = sum_rows<KIND, Tile, true>(tile, row);
      } else {
        loss = sum_rows<KIND, Tile, false>(tile, row);
      }
      sum += tile.total_of(loss);
      if (args.losses != nullptr) tile.write_row(args.losses, loss * args.weight);
      if (args.stats != nullptr) write_statistics(tile, row);
    };
    each_tile<Tile>(args, chunk, memory, none, add_up<Tile>, conclude<Tile>, terms);
    if (args.partial != nullptr) args.partial[chunk] = sum;
  }
}

// Gradients of a loss of whole rows from their statistics.
template <Kind KIND, class Tile>
inline void backward(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const float factor = Row<KIND>::factor(args.upstream, args.alpha);
  const auto none = [&](Tile& tile) {
    tile.zero_out(args.dx, args.x.dtype);
    tile.zero_out(args.dt, args.t.dtype);
  };
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    each_tile<Tile>(args, chunk, memory, none, [&](Tile& tile, RowStatistics& row) {
      row = read_statistics(tile);
      gradients_of_row<KIND, Tile, false, false>(tile, tile.row_upstream() * factor, row);
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
      constexpr int count = Row<KIND>::element_sums;
      Sums<Tile, count> sums;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        const float* upstream = tile.load_upstream(b);
        F part[count] = {};
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r;
          probabilities.template get<false>(block, i, p, q, r);
          const F g = load(upstream + i * LANES) * args.scale, h = g - g0;
          Row<KIND>::add_element_sums(p, q, r, g, h, args.alpha, part);
        }
        sums.add(part);
      }
      F totals[count];
      sums.get(totals);
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
          Row<KIND>::element_gradients(p, q, r, h, g0, totals, args.alpha, to_x, to_t);
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
  tile.write_number(tile.given->stats, parts, part_max_x, row.max_x);
  tile.write_number(tile.given->stats, parts, part_sum_x, row.sum_x);
  tile.write_number(tile.given->stats, parts, part_max_t, row.max_t);
  tile.write_number(tile.given->stats, parts, part_sum_t, row.sum_t);
  tile.write_number(tile.given->stats, parts, part_max_d, row.max_d);
  tile.write_number(tile.given->stats, parts, part_shift, row.shift);
  tile.write_number(tile.given->stats, parts, part_sum_e, row.sum_e);
}

// Statistics of a slice of the vocabulary, for merging with those of the others.
template <class Tile>
inline void parts_of_slices(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const auto none = [](Tile& tile) { write_parts(tile, RowStatistics()); };
  for (int64_t chunk = begin; chunk < end; ++chunk)
    each_tile<Tile>(args, chunk, memory, none, add_up<Tile>, [](Tile& tile, RowStatistics& row) {
      // Without a finite logit there is nothing that sums could be relative to.
      row.max_x = Simd::select(row.sum_x == 0.0f, Simd::splat(-Simd::infinity), row.max_x);
      row.max_t = Simd::select(row.sum_t == 0.0f, Simd::splat(-Simd::infinity), row.max_t);
      write_parts(tile, row);
    });
}

inline void divergence_parts(const cpu::Divergence& args, int64_t begin, int64_t end, float* scratch) {
  return args.shape.width <= NARROW ? parts_of_slices<Narrow>(args, begin, end, scratch)
                                    : parts_of_slices<Wide>(args, begin, end, scratch);
}

template <class Tile>
inline void write_shares(Tile& tile, F first, F second) {
  tile.write_number(tile.given->losses, shares, share_first, first);
  tile.write_number(tile.given->losses, shares, share_second, second);
}

// A slice's share of the sums over each row, from the statistics of whole rows.
template <Kind KIND, class Tile>
inline void finish(const cpu::Divergence& args, int64_t begin, int64_t end, float* memory) {
  const auto none = [&](Tile& tile) { write_shares(tile, F{}, F{}); };
  for (int64_t chunk = begin; chunk < end; ++chunk)
    each_tile<Tile>(args, chunk, memory, none, [&](Tile& tile, RowStatistics& row) {
      row = read_statistics(tile);
      constexpr int count = Row<KIND>::row_sums;
      Sums<Tile, count> sums;
      for (int64_t b = 0; b < tile.blocks(); ++b) {
        const Block block = tile.load_block(b);
        const Probabilities<Tile, false> probabilities(row, tile.scratch, b);
        F part[count] = {};
        for (int64_t i = 0; i < block.count; ++i) {
          F p, q, r;
          probabilities.template get<false>(block, i, p, q, r);
          Row<KIND>::template add_row_terms<false>(p, q, r, args.alpha, part);
        }
        sums.add(part);
      }
      F totals[count], first, second;
      sums.get(totals);
      Row<KIND>::conclude(totals, args.alpha, first, second);
      write_shares(tile, first, second);
    });
}

#define SMART_FAST_BY_KIND(name, function)                                                    \
  inline void name(const cpu::Divergence& args, int64_t begin, int64_t end, float* scratch) { \
    with_kind(                                                                                \
        args.kind,                                                                            \
        [&](auto kind) {                                                                      \
          if (args.shape.width <= NARROW)                                                     \
            function<kind.value, Narrow>(args, begin, end, scratch);                          \
          else                                                                                \
            function<kind.value, Wide>(args, begin, end, scratch);                            \
        },                                                                                    \
        [] { __builtin_trap(); });                                                            \
  }
SMART_FAST_BY_KIND(divergence_forward, forward)
SMART_FAST_BY_KIND(divergence_finish, finish)
SMART_FAST_BY_KIND(divergence_backward, backward)
SMART_FAST_BY_KIND(divergence_elements_backward, elements_backward)
#undef SMART_FAST_BY_KIND

}  // namespace
}  // namespace smart_fast
