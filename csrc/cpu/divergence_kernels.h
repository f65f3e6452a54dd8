// The divergences on the CPU, over tiles of rows: a first pass for their statistics, which leaves the exponentials in
// scratch memory, and a second one for the terms and, where they are wanted, the gradients.
#pragma once

#include "tiles.h"

namespace smart_fast {
namespace {

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
