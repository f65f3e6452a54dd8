// The Fisher direction softmax(x) - onehot(argmax x) of logits x; see kernels/fisher.py. A row is read once from memory:
// its exponentials wait in scratch memory until their sum is known.
//
// The entry of the largest (the first of equal ones) is the sum of the others with the sign changed, so that nothing
// cancels where it is near one. Rows with NaN or infinity, or of minus infinity throughout, become NaN.
#pragma once

#include "columns.h"
#include "kernels.h"

namespace smart_fast {
namespace {

SMART_FAST_INLINE F nothing() { return Simd::splat(-Simd::infinity); }

// What exponentials are relative to: rows of minus infinity keep theirs at exp(-inf) = 0.
SMART_FAST_INLINE F finite_base(F largest) { return Simd::select(largest == -Simd::infinity, F{}, largest); }

// 1 / the sum of all exponentials, that of the largest being one.
SMART_FAST_INLINE F inverse_sum(F others, F largest, I odd) {
  const I fine = (Simd::abs(largest) < Simd::infinity) & ~odd;
  return Simd::select(fine, 1.0f / (others + 1.0f), Simd::splat(__builtin_nanf("")));
}

// ---- long rows: a vector holds neighboring columns ------------------------------------------------------------------

class FisherRow {
 public:
  FisherRow(const cpu::Fisher& args, float* memory)
      : args_(args), width_(args.shape.width), exp_(memory), bases_(memory + width_ + 64),
        block_(bases_ + width_ / BLOCK + 64), out_(block_ + BLOCK + 64) {}

  void run(int64_t row) {
    row_ = advance(args_.logits.data, args_.logits.dtype, row_offset(args_.shape, args_.logits, row));
    largest_ = -Simd::infinity;
    first_ = 0;
    others_ = 0;
    odd_ = I{};
    for (int64_t begin = 0; begin < width_; begin += BLOCK) read(begin);
    write(row);
  }

 private:
  int64_t part(int64_t begin) const { return width_ - begin < BLOCK ? width_ - begin : BLOCK; }

  // Exponentials relative to the largest so far (Milakov & Gimelshein, 2018), all but that of the largest added up.
  void read(int64_t begin) {
    const Dtype dtype = args_.logits.dtype;
    const float* x = read_block(advance(row_, dtype, begin), dtype, part(begin), block_, -Simd::infinity);
    const int64_t count = whole(part(begin));
    F top = nothing();
    for (int64_t i = 0; i < count; i += LANES) {
      const F v = load(x + i);
      top = Simd::max(v, top);
      odd_ |= v != v;
    }
    int64_t first = count;  // the vector that the largest is in, if it is in this block
    I in_first = {};
    if (const float block_largest = largest(top); block_largest > largest_) {
      // The largest so far joins the others.
      const F before = Simd::exp(Simd::splat(largest_) - block_largest);
      others_ = (others_ + (largest_ > -Simd::infinity ? 1.0 : 0.0)) * before[0];
      largest_ = block_largest;
      first = 0;
      while (!any(load(x + first) == largest_)) first += LANES;
      int lane = 0;
      while (x[first + lane] != largest_) ++lane;
      in_first = lane_numbers() == lane;
      first_ = begin + first + lane;
    }
    const F base = finite_base(Simd::splat(largest_));
    bases_[begin / BLOCK] = base[0];
    F sum = {};
    const auto visit = [&](int64_t from, int64_t to, auto with_first) {
      for (int64_t i = from; i < to; i += LANES) {
        // Memory latency hides behind the arithmetic, which the hardware prefetchers, stopping at each page, do not manage.
        __builtin_prefetch(advance(row_, dtype, begin + BLOCK + i));
        const F e = Simd::exp(load(x + i) - base);
        store(exp_ + begin + i, e);
        sum += with_first ? Simd::select(in_first, F{}, e) : e;
      }
    };
    visit(0, first, False());
    if (first < count) {
      visit(first, first + LANES, True());
      visit(first + LANES, count, False());
    }
    others_ += total(sum);
  }

  void write(int64_t row) {
    const F others = Simd::splat(float(others_)), largest = Simd::splat(largest_);
    const F inverse = inverse_sum(others, largest, any(odd_) ? I{} - 1 : I{});
    for (int64_t begin = 0; begin < width_; begin += BLOCK) {
      void* const target = advance(args_.out, args_.out_dtype, row * width_ + begin);
      float* const out = open_block(target, args_.out_dtype, part(begin), out_, args_.stream);
      const F scale = inverse * Simd::exp(Simd::splat(bases_[begin / BLOCK]) - finite_base(largest));
      for (int64_t i = 0; i < part(begin); i += LANES) store(out + i, load(exp_ + begin + i) * scale);
      if (first_ >= begin && first_ - begin < BLOCK) out[first_ - begin] = (-others * inverse)[0];
      write_block(target, args_.out_dtype, part(begin), out, args_.stream);
    }
  }

  const cpu::Fisher& args_;
  const int64_t width_;
  float *exp_, *bases_, *block_, *out_;
  const char* row_;
  float largest_;
  int64_t first_;  // column of the largest
  double others_;
  I odd_;  // a NaN was among them
};

// ---- narrow rows: a vector holds one column of several ---------------------------------------------------------------

inline void fisher_columns(const cpu::Fisher& args, int64_t begin, int64_t end, float* memory) {
  Columns tile;
  tile.prepare(args.shape, nullptr, args.stream);
  float* const x = memory;
  tile.lines = memory + tile.pitch * LANES;
  const int32_t width = int32_t(tile.width);
  for (int64_t row = begin; row < end; row += LANES) {
    tile.begin(row, end);
    tile.read(args.logits, x);
    F largest = nothing();
    I odd = {}, first = {};
    for (int32_t j = 0; j < width; ++j) {
      const F v = load(x + j * LANES);
      first = v > largest ? I{} + j : first;
      largest = Simd::max(v, largest);
      odd |= v != v;
    }
    const F base = finite_base(largest);
    F others = {};
    for (int32_t j = 0; j < width; ++j) {
      const F e = Simd::exp(load(x + j * LANES) - base);
      store(x + j * LANES, e);
      others += Simd::select(first == j, F{}, e);
    }
    const F inverse = inverse_sum(others, largest, odd);
    for (int32_t j = 0; j < width; ++j)
      store(x + j * LANES, Simd::select(first == j, -others, load(x + j * LANES)) * inverse);
    tile.write(args.out, args.out_dtype, x);
  }
}

inline void fisher_direction(const cpu::Fisher& args, int64_t begin, int64_t end, float* scratch) {
  const int64_t per_chunk = cpu::rows_per_chunk(args.shape.width);
  const int64_t last = end * per_chunk < args.shape.rows ? end * per_chunk : args.shape.rows;
  if (args.shape.width <= NARROW) {
    fisher_columns(args, begin * per_chunk, last, scratch);
  } else {
    FisherRow one(args, scratch);
    for (int64_t row = begin * per_chunk; row < last; ++row) one.run(row);
  }
  if (args.stream) end_of_stream();
}

}  // namespace
}  // namespace smart_fast
