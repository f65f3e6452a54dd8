// Rows too short to fill vectors, as many of them as a vector has lanes: one column a vector, so that nothing runs across
// lanes.
#pragma once

#include "blocks.h"

namespace smart_fast {
namespace {

constexpr int64_t NARROW = 64;  // widest row that is taken so

struct Columns {
  static constexpr int64_t rows = LANES;
  static int64_t padded(int64_t width) { return width <= 8 && LANES > 8 ? 8 : whole(width); }

  const Shape* shape = nullptr;
  const uint8_t* mask = nullptr;  // a byte per row, or null
  bool stream = false;
  int64_t width = 0, pitch = 0, first = 0, valid = 0;
  I real = {};
  bool all_real = false;
  float* lines = nullptr;  // [LANES][pitch]: rows as they lie in memory

  void prepare(const Shape& of, const uint8_t* mask_bytes, bool streams) {
    shape = &of;
    mask = mask_bytes;
    stream = streams;
    width = of.width;
    pitch = padded(width);
  }

  // Rows [row, last), as far as there are lanes. False if none of them is real.
  bool begin(int64_t row, int64_t last) {
    first = row;
    valid = last - row < LANES ? last - row : LANES;
    all_real = valid == LANES && mask == nullptr;
    for (int lane = 0; lane < LANES; ++lane)
      real[lane] = lane < valid && (mask == nullptr || mask[row + lane] != 0) ? -1 : 0;
    return any(real);
  }

  F keep_real(F v) const { return real ? v : Simd::splat(0.0f); }

  // Columns become vectors. Rows that are masked or not there are zeros.
  void read(const Rows& tensor, float* tile) {
    const bool dense = tensor.column == 1 && shape->size1 == 1 && shape->size2 == 1 && tensor.stride0 == width;
    if (dense && width <= 8 && valid == LANES) {  // too short to be copied row by row
      const void* start = advance(tensor.data, tensor.dtype, first * width);
      dense_to_columns(read_block(start, tensor.dtype, LANES * width, lines, 0.0f), width, tile);
    } else if (width <= 8) {
      for (int64_t lane = 0; lane < valid; ++lane) {
        const void* row = advance(tensor.data, tensor.dtype, row_offset(*shape, tensor, first + lane));
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
          const void* row = advance(tensor.data, tensor.dtype, row_offset(*shape, tensor, first + lane));
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

  // Back to rows of a dense output. Those that are masked become zeros.
  void write(void* data, Dtype dtype, float* values, void* negated = nullptr, float rescale = 1.0f) {
    if (negated != nullptr) negated = advance(negated, dtype, first * width);
    if (!all_real)
      for (int64_t j = 0; j < width; ++j) store(values + j * LANES, keep_real(load(values + j * LANES)));
    void* const target = advance(data, dtype, first * width);
    if (width <= 8) {
      float* const dense = valid == LANES ? open_block(target, dtype, LANES * width, lines, stream) : lines;
      columns_to_dense(values, width, dense);
      return write_block(target, dtype, valid * width, dense, stream, negated, rescale);
    }
    for (int64_t j = 0; j < pitch; j += LANES) transpose(values + j * LANES, LANES, lines + j, pitch);
    for (int64_t lane = 1; lane < valid; ++lane) copy_vectors(lines + lane * width, lines + lane * pitch, width);
    write_block(target, dtype, valid * width, lines, stream, negated, rescale);
  }
};

}  // namespace
}  // namespace smart_fast
