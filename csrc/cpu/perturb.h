// perturb: embed + noise_var * normal(seed), and the noise if asked for.
#pragma once

#include "kernels.h"
#include "noise.h"

namespace smart_fast {
namespace {

// `count` elements of one row: out = embed + noise.
inline void perturb_segment(const void* embed, Dtype dtype, const float* noise, int64_t count, void* out,
                            bool stream) {
  alignas(64) float from[BLOCK + LANES], to[BLOCK + LANES];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int64_t part = count - begin < BLOCK ? count - begin : BLOCK;
    void* target = advance(out, dtype, begin);
    const float* source = read_block(advance(embed, dtype, begin), dtype, part, from, 0.0f);
    float* result = open_block(target, dtype, part, to, stream);
    for (int64_t i = 0; i < part; i += LANES) store(result + i, load(source + i) + load(noise + begin + i));
    write_block(target, dtype, part, result, stream);
  }
}

inline void perturb(const cpu::Perturb& args, int64_t begin, int64_t end) {
  alignas(64) float buffer[cpu::perturb_chunk + NORMALS];
  const Shape& shape = args.shape;
  const Dtype dtype = args.embed.dtype;
  const int64_t size = shape.rows * shape.width;
  // The element index is what counts: dense memory is one long row.
  const bool dense = args.mask == nullptr && shape.size1 == 1 && shape.size2 == 1 && args.embed.stride0 == shape.width;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * cpu::perturb_chunk;
    const int64_t last = first + cpu::perturb_chunk < size ? first + cpu::perturb_chunk : size;
    const bool in_place = dense && args.noise_out != nullptr && !args.stream &&
                          (last - first) % NORMALS == 0;
    float* noise = in_place ? args.noise_out + first : buffer;
    make_noise(noise, args.seed, uint64_t(first) / 4, last - first, args.noise_var);
    if (dense) {
      perturb_segment(advance(args.embed.data, dtype, first), dtype, noise, last - first,
                      advance(args.out, dtype, first), args.stream);
    } else {
      for (int64_t i = first; i < last;) {
        const int64_t row = i / shape.width, column = i - row * shape.width;
        const int64_t count = shape.width - column < last - i ? shape.width - column : last - i;
        const void* embed = advance(args.embed.data, dtype, row_offset(shape, args.embed, row) + column);
        void* out = advance(args.out, dtype, i);
        if (args.mask != nullptr && args.mask[row] == 0) {
          __builtin_memcpy(out, embed, size_t(count) * (dtype == Dtype::fp32 ? 4 : 2));
          __builtin_memset(noise + (i - first), 0, size_t(count) * 4);
        } else {
          perturb_segment(embed, dtype, noise + (i - first), count, out, args.stream);
        }
        i += count;
      }
    }
    if (args.noise_out != nullptr && !in_place)
      write_block(args.noise_out + first, Dtype::fp32, last - first, noise, args.stream);
  }
  if (args.stream) end_of_stream();
}

}  // namespace
}  // namespace smart_fast
