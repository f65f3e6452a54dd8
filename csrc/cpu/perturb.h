// perturb: embed + noise_var * unit * noise(seed), and the noise if asked for.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace smart_fast {
namespace {

// `count` elements of one row: out = embed + noise.
inline void perturb_segment(const void* embed, Dtype dtype, const float* noise, int64_t count, void* out) {
  alignas(64) float from[BLOCK + LANES], to[BLOCK + LANES];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int64_t part = count - begin < BLOCK ? count - begin : BLOCK;
    void* target = advance(out, dtype, begin);
    const float* source = read_block(advance(embed, dtype, begin), dtype, part, from, 0.0f);
    float* result = open_block(target, dtype, part, to, false);
    for (int64_t i = 0; i < part; i += LANES) store(result + i, load(source + i) + load(noise + begin + i));
    write_block(target, dtype, part, result, false);
  }
}

// `count` elements of dense memory, a multiple of NORMALS, in one pass: noise goes from registers to where it is needed.
template <Dtype DTYPE, bool KEEP, Noise KIND>
inline void perturb_dense(const cpu::Perturb& args, int64_t first, int64_t count, float scale) {
  const char* embed = advance(args.embed.data, DTYPE, first);
  char* out = advance(args.out, DTYPE, first);
  float* noise = KEEP ? args.noise_out + first : nullptr;
  const auto ahead = [&](int64_t i) {
    prefetch<NORMALS>(embed, DTYPE, i);
    prefetch<NORMALS, true>(out, DTYPE, i);
    if (KEEP) prefetch<NORMALS, true>(noise, Dtype::fp32, i);
  };
  each_noise<KIND>(args.seed, uint64_t(first) / 4, count, scale, ahead, [&](int64_t i, F lower, F upper) {
    if (KEEP) {
      store(noise + i, lower);
      store(noise + i + LANES, upper);
    }
    store_as<DTYPE>(advance(out, DTYPE, i), load_as<DTYPE>(advance(embed, DTYPE, i)) + lower);
    store_as<DTYPE>(advance(out, DTYPE, i + LANES), load_as<DTYPE>(advance(embed, DTYPE, i + LANES)) + upper);
  });
}

template <Noise KIND>
inline void perturb_dense(const cpu::Perturb& args, int64_t first, int64_t count, float scale) {
#define SMART_FAST_CASE(DTYPE)                                                                         \
  case DTYPE:                                                                                          \
    return args.noise_out == nullptr ? perturb_dense<DTYPE, false, KIND>(args, first, count, scale)    \
                                     : perturb_dense<DTYPE, true, KIND>(args, first, count, scale);
  switch (args.embed.dtype) {
    SMART_FAST_CASE(Dtype::fp32)
    SMART_FAST_CASE(Dtype::bf16)
    SMART_FAST_CASE(Dtype::fp16)
  }
#undef SMART_FAST_CASE
}

inline void perturb(const cpu::Perturb& args, int64_t begin, int64_t end) {
  alignas(64) float noise[cpu::perturb_chunk + NORMALS];
  const Shape& shape = args.shape;
  const Dtype dtype = args.embed.dtype;
  const int64_t size = shape.rows * shape.width;
  // The element index is what counts: dense memory is one long row, or, with a unit for each, rows of whole vectors.
  const bool dense = args.mask == nullptr && shape.size1 == 1 && shape.size2 == 1 &&
                     args.embed.stride0 == shape.width && (args.unit == nullptr || shape.width % NORMALS == 0);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    int64_t first = chunk * cpu::perturb_chunk;
    const int64_t last = first + cpu::perturb_chunk < size ? first + cpu::perturb_chunk : size;
    if (dense) {
      while (last - first >= NORMALS) {
        const int64_t row = first / shape.width;
        const int64_t end = args.unit != nullptr && (row + 1) * shape.width < last ? (row + 1) * shape.width : last;
        const int64_t whole_part = (end - first) / NORMALS * NORMALS;
        with_noise(
            args.kind,
            [&](auto kind) {
              perturb_dense<kind.value>(args, first, whole_part, args.noise_var * unit_of(args.unit, row));
            },
            [] { __builtin_trap(); });
        first += whole_part;
      }
      if (first == last) continue;
    }
    make_noise(args.kind, noise, args.seed, uint64_t(first) / 4, last - first, args.noise_var, [](int64_t) {});
    for (int64_t i = first; i < last;) {
      const int64_t row = i / shape.width, column = i - row * shape.width;
      const int64_t count = shape.width - column < last - i ? shape.width - column : last - i;
      const void* embed = advance(args.embed.data, dtype, row_offset(shape, args.embed, row) + column);
      void* out = advance(args.out, dtype, i);
      if (args.mask != nullptr && args.mask[row] == 0) {
        __builtin_memcpy(out, embed, size_t(count) * (dtype == Dtype::fp32 ? 4 : 2));
        __builtin_memset(noise + (i - first), 0, size_t(count) * 4);
      } else {
        if (args.unit != nullptr)
          for (int64_t j = i - first; j < i - first + count; ++j) noise[j] *= args.unit[row];
        perturb_segment(embed, dtype, noise + (i - first), count, out);
      }
      i += count;
    }
    if (args.noise_out != nullptr) __builtin_memcpy(args.noise_out + first, noise, size_t(last - first) * 4);
  }
}

}  // namespace
}  // namespace smart_fast
