// Elements in memory, 16 bytes at a time.
//
// A row is read in chunks that begin where its logical (row-major) index is a multiple of the chunk: chunk c holds
// columns c * size - skew …, with skew = row * width % size. Chunks of contiguous tensors are then aligned whatever the
// width, and so are the groups of four elements that share a counter of the noise. Only the first and the last chunk of
// a row reach beyond it.
//
// `Any<size>` stands for a tensor whose dtype is known at run time, or whose chunks are not aligned: one element at a
// time.
#pragma once

#include "../rows.h"
#include "device.h"
#include "scalar.h"

namespace smart_fast {
namespace cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
template <int SIZE>
struct Any {};

SMART_FAST_INLINE float bf16_to_float(uint32_t bits) { return Scalar::from_bits(bits << 16); }

SMART_FAST_INLINE float fp16_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(uint16_t(bits)));
  return v;
#else
  _Float16 v;
  const uint16_t half = uint16_t(bits);
  __builtin_memcpy(&v, &half, 2);
  return float(v);
#endif
}

// Rounded to nearest even; `low` in the lower half of the word.
SMART_FAST_INLINE uint32_t floats_to_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto round = [](float v) {
    const uint32_t bits = Scalar::to_bits(v);
    return v != v ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

SMART_FAST_INLINE uint32_t floats_to_fp16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto round = [](float v) {
    const _Float16 half = _Float16(v);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, 2);
    return uint32_t(bits);
  };
  return round(low) | round(high) << 16;
#endif
}

SMART_FAST_INLINE float read_element(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == Dtype::bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

SMART_FAST_INLINE void write_element(void* data, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::fp32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] =
        uint16_t(dtype == Dtype::bf16 ? floats_to_bf16(value, 0.0f) : floats_to_fp16(value, 0.0f));
}

SMART_FAST_INLINE const void* advance(const void* data, Dtype dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == Dtype::fp32 ? 4 : 2);
}
SMART_FAST_INLINE void* advance(void* data, Dtype dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * (dtype == Dtype::fp32 ? 4 : 2);
}

// What lies beyond a row.
enum class Fill { zero, minus_infinity };

template <class T>
struct Chunk {
  static constexpr int size = 16 / int(sizeof(T));
  uint4 raw;

  SMART_FAST_INLINE void unpack(float (&v)[size]) const;
  SMART_FAST_INLINE static Chunk pack(const float (&v)[size]);
  SMART_FAST_INLINE static Chunk filled(Fill fill);
};

template <>
SMART_FAST_INLINE void Chunk<float>::unpack(float (&v)[4]) const {
  v[0] = Scalar::from_bits(raw.x);
  v[1] = Scalar::from_bits(raw.y);
  v[2] = Scalar::from_bits(raw.z);
  v[3] = Scalar::from_bits(raw.w);
}
template <>
SMART_FAST_INLINE void Chunk<Bf16>::unpack(float (&v)[8]) const {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = bf16_to_float(words[i]);
    v[2 * i + 1] = Scalar::from_bits(words[i] & 0xFFFF0000u);
  }
}
template <>
SMART_FAST_INLINE void Chunk<Fp16>::unpack(float (&v)[8]) const {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = fp16_to_float(words[i] & 0xFFFFu);
    v[2 * i + 1] = fp16_to_float(words[i] >> 16);
  }
}

template <>
SMART_FAST_INLINE Chunk<float> Chunk<float>::pack(const float (&v)[4]) {
  return {{Scalar::to_bits(v[0]), Scalar::to_bits(v[1]), Scalar::to_bits(v[2]), Scalar::to_bits(v[3])}};
}
template <>
SMART_FAST_INLINE Chunk<Bf16> Chunk<Bf16>::pack(const float (&v)[8]) {
  return {{floats_to_bf16(v[0], v[1]), floats_to_bf16(v[2], v[3]), floats_to_bf16(v[4], v[5]),
           floats_to_bf16(v[6], v[7])}};
}
template <>
SMART_FAST_INLINE Chunk<Fp16> Chunk<Fp16>::pack(const float (&v)[8]) {
  return {{floats_to_fp16(v[0], v[1]), floats_to_fp16(v[2], v[3]), floats_to_fp16(v[4], v[5]),
           floats_to_fp16(v[6], v[7])}};
}

template <class T>
SMART_FAST_INLINE Chunk<T> Chunk<T>::filled(Fill fill) {
  const float value = fill == Fill::zero ? 0.0f : -Scalar::infinity;
  float v[size];
#pragma unroll
  for (int i = 0; i < size; ++i) v[i] = value;
  return pack(v);
}

template <int SIZE>
struct Chunk<Any<SIZE>> {
  static constexpr int size = SIZE;
  float values[SIZE];

  SMART_FAST_INLINE void unpack(float (&v)[SIZE]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) v[i] = values[i];
  }
  SMART_FAST_INLINE static Chunk filled(Fill fill) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) chunk.values[i] = fill == Fill::zero ? 0.0f : -Scalar::infinity;
    return chunk;
  }
};

SMART_FAST_INLINE bool inside(int64_t first, int size, int64_t width) { return first >= 0 && first + size <= width; }
SMART_FAST_INLINE bool outside(int64_t first, int size, int64_t width) { return first >= width || first + size <= 0; }

// 16 bytes as a shift register of elements: an array indexed at run time would live in memory.
struct Shifter {
  uint64_t low, high;

  SMART_FAST_INLINE void push(uint64_t bits, int width) {
    low = low >> width | high << (64 - width);
    high = high >> width | bits << (64 - width);
  }
  SMART_FAST_INLINE uint64_t pop(int width) {
    const uint64_t bits = low;
    push(0, width);
    return bits;
  }
};

template <class T>
struct Bits {
  using type = uint16_t;
};
template <>
struct Bits<float> {
  using type = uint32_t;
};

// The columns of one row of a tensor, with its dense last dimension.
template <class T>
struct Reader {
  const T* data;

  SMART_FAST_INLINE Reader(const Shape& shape, const Rows& tensor, int64_t row)
      : data(static_cast<const T*>(tensor.data) + row_offset(shape, tensor, row)) {}

  SMART_FAST_INLINE Chunk<T> read(int64_t first, int64_t width, Fill fill) const {
    constexpr int size = Chunk<T>::size;
    if (inside(first, size, width)) return {vector_at<const uint4>(data + first)};
    const Chunk<T> padding = Chunk<T>::filled(fill);
    if (outside(first, size, width)) return padding;
    using Bit = typename Bits<T>::type;
    const Bit pad = Bit(padding.raw.x);
    const Bit* from = reinterpret_cast<const Bit*>(data);
    Shifter chunk = {0, 0};
#pragma unroll 1
    for (int64_t i = first; i < first + size; ++i) chunk.push(i >= 0 && i < width ? from[i] : pad, 8 * sizeof(T));
    return {{uint32_t(chunk.low), uint32_t(chunk.low >> 32), uint32_t(chunk.high), uint32_t(chunk.high >> 32)}};
  }
};

template <int SIZE>
struct Reader<Any<SIZE>> {
  const void* data;
  Dtype dtype;

  SMART_FAST_INLINE Reader(const Shape& shape, const Rows& tensor, int64_t row)
      : data(advance(tensor.data, tensor.dtype, row_offset(shape, tensor, row))), dtype(tensor.dtype) {}

  SMART_FAST_INLINE Chunk<Any<SIZE>> read(int64_t first, int64_t width, Fill fill) const {
    Chunk<Any<SIZE>> chunk = Chunk<Any<SIZE>>::filled(fill);
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (first + i >= 0 && first + i < width) chunk.values[i] = read_element(data, dtype, first + i);
    return chunk;
  }
};

// One row of a contiguous, 16-byte aligned output [rows, width].
template <class T>
struct Writer {
  T* data;

  SMART_FAST_INLINE Writer(void* out, Dtype, int64_t row, int64_t width) : data(static_cast<T*>(out) + row * width) {}

  SMART_FAST_INLINE void write(int64_t first, int64_t width, const float (&values)[Chunk<T>::size]) const {
    constexpr int size = Chunk<T>::size;
    if (outside(first, size, width)) return;
    const uint4 raw = Chunk<T>::pack(values).raw;
    if (inside(first, size, width)) {
      vector_at<uint4>(data + first) = raw;
      return;
    }
    using Bit = typename Bits<T>::type;
    Bit* to = reinterpret_cast<Bit*>(data);
    Shifter chunk = {raw.x | uint64_t(raw.y) << 32, raw.z | uint64_t(raw.w) << 32};
#pragma unroll 1
    for (int64_t i = first; i < first + size; ++i) {
      const Bit bits = Bit(chunk.pop(8 * sizeof(T)));
      if (i >= 0 && i < width) to[i] = bits;
    }
  }
};

template <int SIZE>
struct Writer<Any<SIZE>> {
  void* data;
  Dtype dtype;

  SMART_FAST_INLINE Writer(void* out, Dtype dtype, int64_t row, int64_t width)
      : data(advance(out, dtype, row * width)), dtype(dtype) {}

  SMART_FAST_INLINE void write(int64_t first, int64_t width, const float (&values)[SIZE]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (first + i >= 0 && first + i < width) write_element(data, dtype, first + i, values[i]);
  }
};

// fp32 beside a tensor of any dtype, `SIZE` elements (four or eight) at a time.
template <int SIZE>
struct Floats {
  SMART_FAST_INLINE static void read(const float* row, int64_t first, int64_t width, float (&v)[SIZE]) {
    if (SIZE % 4 == 0 && inside(first, SIZE, width)) {
#pragma unroll
      for (int i = 0; i < SIZE; i += 4) {
        const float4 four = vector_at<const float4>(row + first + i);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) v[i] = first + i >= 0 && first + i < width ? row[first + i] : 0.0f;
  }
  SMART_FAST_INLINE static void write(float* row, int64_t first, int64_t width, const float (&v)[SIZE]) {
    if (SIZE % 4 == 0 && inside(first, SIZE, width)) {
#pragma unroll
      for (int i = 0; i < SIZE; i += 4)
        vector_at<float4>(row + first + i) = {v[i], v[i + 1], v[i + 2], v[i + 3]};
      return;
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (first + i >= 0 && first + i < width) row[first + i] = v[i];
  }
};

}  // namespace cuda
}  // namespace smart_fast
