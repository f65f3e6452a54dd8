// Memory in SIMD vectors: numbers of 16 bits, and rows a few KiB at a time.
#pragma once

#include "simd.h"

namespace smart_fast {
namespace {

// ---- numbers of 16 bits --------------------------------------------------------------------------------------------

SMART_FAST_INLINE F from_bf16(H v) { return (F)(__builtin_convertvector(v, U) << 16); }

// Round to nearest, ties to even; every NaN becomes the quiet one.
SMART_FAST_INLINE H to_bf16(F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((U)((v != v) ? (I)(U{} + 0x7FC0u) : (I)rounded), H);
}

SMART_FAST_INLINE F from_fp16(H v) {
#if SMART_FAST_SIMD_LEVEL == 3
  return (F)_mm512_cvtph_ps((__m256i)v);
#elif SMART_FAST_SIMD_LEVEL == 2
  return (F)_mm256_cvtph_ps((__m128i)v);
#else
  // Exponent and mantissa moved into place; the product with 2**112 rebiases, subnormals included.
  const U bits = __builtin_convertvector(v, U);
  const F magnitude = (F)((bits & 0x7FFFu) << 13) * 0x1p112f;
  const U special = (U)((bits & 0x7C00u) == 0x7C00u) & 0x7F800000u;
  return (F)((U)magnitude | special | ((bits & 0x8000u) << 16));
#endif
}

SMART_FAST_INLINE H to_fp16(F v) {
#if SMART_FAST_SIMD_LEVEL == 3
  return (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif SMART_FAST_SIMD_LEVEL == 2
  return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const U sign = ((U)v >> 16) & 0x8000u;
  const F a = Simd::abs(v);
  // Subnormals: adding 1/2 leaves the rounded mantissa in the lowest bits. Normals: round to even on the integer.
  const U subnormal = (U)(a + 0.5f) - 0x3F000000u;
  const U bits = (U)a;
  const U normal = (bits + (0xC8000FFFu + ((bits >> 13) & 1u))) >> 13;
  U half = (U)(a < 0x1p-14f ? (I)subnormal : (I)normal);
  half = (U)(a >= 65520.0f ? (I)(U{} + 0x7C00u) : (I)half);
  half = (U)(v != v ? (I)(U{} + 0x7E00u) : (I)half);
  return __builtin_convertvector(half | sign, H);
#endif
}

// A vector of elements where they lie.
template <Dtype DTYPE>
SMART_FAST_INLINE F load_as(const void* p) {
  if (DTYPE == Dtype::fp32) return load(static_cast<const float*>(p));
  const H bits = *static_cast<const HUnaligned*>(p);
  return DTYPE == Dtype::bf16 ? from_bf16(bits) : from_fp16(bits);
}
template <Dtype DTYPE>
SMART_FAST_INLINE void store_as(void* p, F v) {
  if (DTYPE == Dtype::fp32) return store(static_cast<float*>(p), v);
  *static_cast<HUnaligned*>(p) = DTYPE == Dtype::bf16 ? to_bf16(v) : to_fp16(v);
}

SMART_FAST_INLINE float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// One element as float.
SMART_FAST_INLINE float element(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::fp32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (dtype == Dtype::bf16) return from_bits(uint32_t(bits) << 16);
  H v = {};
  v[0] = bits;
  return from_fp16(v)[0];
}

// ---- blocks: a few KiB of a row, as floats in the innermost cache ---------------------------------------------------

constexpr int BLOCK = 1024;  // a multiple of every vector's length

SMART_FAST_INLINE int64_t whole(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

SMART_FAST_INLINE const char* advance(const void* data, Dtype dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == Dtype::fp32 ? 4 : 2);
}
SMART_FAST_INLINE char* advance(void* data, Dtype dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * (dtype == Dtype::fp32 ? 4 : 2);
}

// Fetch the cache lines of elements [begin, begin + COUNT) early. Addresses past the end do no harm.
template <int COUNT, bool WRITE = false>
SMART_FAST_INLINE void prefetch(const void* data, Dtype dtype, int64_t begin) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data) + uintptr_t(begin) * (dtype == Dtype::fp32 ? 4 : 2);
  const int bytes = COUNT * (dtype == Dtype::fp32 ? 4 : 2);
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(start + uintptr_t(line)), WRITE);
}

// `count` elements as floats, padded to whole vectors: where they lie if that will do, else in `buffer`.
inline const float* read_block(const void* data, Dtype dtype, int64_t count, float* buffer, float padding) {
  const int64_t full = count / LANES * LANES;
  if (dtype == Dtype::fp32) {
    const float* source = static_cast<const float*>(data);
    if (full == count) return source;
    for (int64_t i = 0; i < full; i += LANES) store(buffer + i, load(source + i));
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(data);
    if (dtype == Dtype::bf16) {
      for (int64_t i = 0; i < full; i += LANES)
        store(buffer + i, from_bf16(*reinterpret_cast<const HUnaligned*>(source + i)));
    } else {
      for (int64_t i = 0; i < full; i += LANES)
        store(buffer + i, from_fp16(*reinterpret_cast<const HUnaligned*>(source + i)));
    }
  }
#if SMART_FAST_SIMD_LEVEL == 3
  if (full < count) {
    const __mmask16 inside = __mmask16((1u << (count - full)) - 1);
    F v;
    if (dtype == Dtype::fp32) {
      v = (F)_mm512_maskz_loadu_ps(inside, static_cast<const float*>(data) + full);
    } else {
      const H bits = (H)_mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(data) + full);
      v = dtype == Dtype::bf16 ? from_bf16(bits) : from_fp16(bits);
    }
    store(buffer + full, (F)_mm512_mask_mov_ps(_mm512_set1_ps(padding), inside, (__m512)v));
  }
#else
  for (int64_t i = full; i < whole(count); ++i) buffer[i] = i < count ? element(data, dtype, i) : padding;
#endif
  return buffer;
}

// The same for elements `column` apart.
inline const float* read_strided(const void* data, Dtype dtype, int64_t column, int64_t count, float* buffer,
                                 float padding) {
  if (column == 1) return read_block(data, dtype, count, buffer, padding);
  for (int64_t i = 0; i < whole(count); ++i) buffer[i] = i < count ? element(data, dtype, i * column) : padding;
  return buffer;
}

// Copy past the caches, for outputs larger than they are: lines are not read before they are overwritten.
inline void stream_out(void* to, const void* from, size_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
#if SMART_FAST_SIMD_LEVEL > 0
  const size_t rest = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64;
  const size_t head = rest < bytes ? rest : bytes;
  __builtin_memcpy(target, source, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#if SMART_FAST_SIMD_LEVEL == 3
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#else
    for (size_t j = i; j < i + 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j)));
#endif
  }
  __builtin_memcpy(target + i, source + i, bytes - i);
#else
  __builtin_memcpy(target, source, bytes);
#endif
}

// After the last stream_out: other threads see what was written.
SMART_FAST_INLINE void end_of_stream() {
#if SMART_FAST_SIMD_LEVEL > 0
  _mm_sfence();
#endif
}

// Where to write `count` floats, whole vectors of them, that write_block will find: the target itself if that will do.
inline float* open_block(void* data, Dtype dtype, int64_t count, float* buffer, bool stream) {
  return dtype == Dtype::fp32 && count % LANES == 0 && !stream ? static_cast<float*>(data) : buffer;
}

// `negated`: of 16-bit numbers, where to write the same with the other sign, or null. `rescale` multiplies 16-bit numbers
// once they are rounded, and they are rounded again.
inline void write_block(void* data, Dtype dtype, int64_t count, const float* values, bool stream,
                        void* negated = nullptr, float rescale = 1.0f) {
  if (values == data) return;
  if (dtype == Dtype::fp32) {
    if (stream)
      stream_out(data, values, size_t(count) * 4);
    else
      __builtin_memcpy(data, values, size_t(count) * 4);
    return;
  }
  alignas(64) uint16_t rounded[BLOCK + LANES];
  uint16_t* target = stream || count % LANES != 0 ? rounded : static_cast<uint16_t*>(data);
  if (dtype == Dtype::bf16 && rescale != 1.0f) {
    for (int64_t i = 0; i < count; i += LANES)
      *reinterpret_cast<HUnaligned*>(target + i) = to_bf16(from_bf16(to_bf16(load(values + i))) * rescale);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < count; i += LANES) *reinterpret_cast<HUnaligned*>(target + i) = to_bf16(load(values + i));
  } else if (rescale != 1.0f) {
    for (int64_t i = 0; i < count; i += LANES)
      *reinterpret_cast<HUnaligned*>(target + i) = to_fp16(from_fp16(to_fp16(load(values + i))) * rescale);
  } else {
    for (int64_t i = 0; i < count; i += LANES) *reinterpret_cast<HUnaligned*>(target + i) = to_fp16(load(values + i));
  }
  if (stream)
    stream_out(data, rounded, size_t(count) * 2);
  else if (target == rounded)
    __builtin_memcpy(data, rounded, size_t(count) * 2);
  if (negated == nullptr) return;
  uint16_t* const other = stream || count % LANES != 0 ? rounded : static_cast<uint16_t*>(negated);
  for (int64_t i = 0; i < count; i += LANES)
    *reinterpret_cast<HUnaligned*>(other + i) = *reinterpret_cast<const HUnaligned*>(target + i) ^ uint16_t(0x8000);
  if (stream)
    stream_out(negated, rounded, size_t(count) * 2);
  else if (other == rounded)
    __builtin_memcpy(negated, rounded, size_t(count) * 2);
}

inline void write_zeros(void* data, Dtype dtype, int64_t count) {
  __builtin_memset(data, 0, size_t(count) * (dtype == Dtype::fp32 ? 4 : 2));
}

}  // namespace
}  // namespace smart_fast
