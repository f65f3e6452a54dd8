// Arithmetic on SIMD vectors: GCC/Clang vector extensions, and the few operations that those cannot express.
//
// Included once by each of portable.cpp, avx2.cpp and avx512.cpp, which set SMART_FAST_LANES (floats per vector) and
// SMART_FAST_ISA. Everything has internal linkage, so that no linker can mix the instruction sets. No C++ standard
// library here, for the same reason.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../platform.h"
#include "../rows.h"

#if !defined(__x86_64__)
#define SMART_FAST_SIMD_LEVEL 0  // vector extensions alone
#elif SMART_FAST_LANES == 4
#define SMART_FAST_SIMD_LEVEL 1  // SSE2, which every x86-64 has
#elif SMART_FAST_LANES == 8
#define SMART_FAST_SIMD_LEVEL 2
#else
#define SMART_FAST_SIMD_LEVEL 3
#endif

namespace smart_fast {
namespace {

// Choices at compile time, as arguments.
struct True {
  constexpr operator bool() const { return true; }
};
struct False {
  constexpr operator bool() const { return false; }
};

constexpr int LANES = SMART_FAST_LANES;
constexpr int BYTES = 4 * LANES;

typedef float F __attribute__((vector_size(BYTES)));
typedef int32_t I __attribute__((vector_size(BYTES)));
typedef uint32_t U __attribute__((vector_size(BYTES)));
typedef uint64_t W __attribute__((vector_size(BYTES)));
typedef uint16_t H __attribute__((vector_size(BYTES / 2)));
typedef float FUnaligned __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t HUnaligned __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

SMART_FAST_INLINE F load(const float* p) { return *reinterpret_cast<const FUnaligned*>(p); }
SMART_FAST_INLINE void store(float* p, F v) { *reinterpret_cast<FUnaligned*>(p) = v; }

// The arithmetic that philox.h and divergence.h are written over.
struct Simd {
  using F = smart_fast::F;
  using U = smart_fast::U;
  using Word = W;  // each 32-bit word in the lower half of a 64-bit lane: ready for the widening product

  static constexpr float infinity = __builtin_inff();
  static constexpr bool short_chains = true;

  static SMART_FAST_INLINE F splat(float value) { return F{} + value; }
  static SMART_FAST_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
  static SMART_FAST_INLINE F abs(F v) { return (F)((U)v & 0x7FFFFFFFu); }
  static SMART_FAST_INLINE F flip_sign(F v, U sign_bit) { return (F)((U)v ^ sign_bit); }
  static SMART_FAST_INLINE F from_signed(U v) { return __builtin_convertvector((I)v, F); }

  static SMART_FAST_INLINE F from_unsigned(U v) {
#if SMART_FAST_SIMD_LEVEL == 3
    return (F)_mm512_cvtepu32_ps((__m512i)v);
#else
    // Halves are exact, so their sum is rounded once.
    const F high = __builtin_convertvector((I)(v >> 16), F);
    const F low = __builtin_convertvector((I)(v & 0xFFFFu), F);
    return high * 65536.0f + low;
#endif
  }

  // b where either is NaN.
  static SMART_FAST_INLINE F max(F a, F b) {
#if SMART_FAST_SIMD_LEVEL == 3
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif SMART_FAST_SIMD_LEVEL == 2
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif SMART_FAST_SIMD_LEVEL == 1
    return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
  }

  static SMART_FAST_INLINE F min(F a, F b) {
#if SMART_FAST_SIMD_LEVEL == 3
    return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif SMART_FAST_SIMD_LEVEL == 2
    return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif SMART_FAST_SIMD_LEVEL == 1
    return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
  }

  // The square root of a number that is normal or zero; of zero it is about 1e-15 where that is faster.
  static SMART_FAST_INLINE F sqrt(F v) {
#if SMART_FAST_SIMD_LEVEL == 3
    v = max(v, splat(1e-30f));
    const F inverse = (F)_mm512_rsqrt14_ps((__m512)v), root = v * inverse;
    return root + root * (0.5f - 0.5f * inverse * root);  // Newton's step, to 1 ulp
#elif SMART_FAST_SIMD_LEVEL == 2
    return (F)_mm256_sqrt_ps((__m256)v);
#elif SMART_FAST_SIMD_LEVEL == 1
    return (F)_mm_sqrt_ps((__m128)v);
#else
    for (int lane = 0; lane < LANES; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
    return v;
#endif
  }

  static SMART_FAST_INLINE void mul(W word, uint32_t factor, W& high, W& low) {
#if SMART_FAST_SIMD_LEVEL == 3
    low = (W)_mm512_mul_epu32((__m512i)word, _mm512_set1_epi64(factor));
#elif SMART_FAST_SIMD_LEVEL == 2
    low = (W)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x(factor));
#elif SMART_FAST_SIMD_LEVEL == 1
    low = (W)_mm_mul_epu32((__m128i)word, _mm_set1_epi64x(factor));
#else
    low = (word & 0xFFFFFFFFu) * (uint64_t)factor;
#endif
    high = low >> 32;
  }

  // exp(v) for v <= 0, and not far above: Cephes' expf (Moshier), 2 ulp; below the normal numbers it is zero.
  static SMART_FAST_INLINE F exp(F v) {
    const F shifted = v * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2**23 rounds to an integer
    const F n = shifted - 12582912.0f;
    F r = v - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    const F r2 = r * r;
    const F c01 = r * 1.6666665459e-1f + 5.0000001201e-1f, c23 = r * 8.3334519073e-3f + 4.1665795894e-2f;
    const F c45 = r * 1.9875691500e-4f + 1.3981999507e-3f;
    F y = (c45 * r2 + c23) * r2 + c01;
    y = (y * r2 + r) + 1.0f;
#if SMART_FAST_SIMD_LEVEL == 3
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // NaN among them
    return (F)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n);
#else
    y = (F)((U)y + ((U)shifted << 23));
    return select(v < -87.0f, splat(0.0f), y);
#endif
  }

  // log(v) for positive normal v: Cephes' logf (Moshier), 1 ulp.
  static SMART_FAST_INLINE F log_normal(F v) {
    const U bits = (U)v + (0x3F800000u - 0x3F3504F3u);  // mantissa in [sqrt(1/2), sqrt(2))
    const F e = __builtin_convertvector((I)(bits >> 23) - 127, F);
    const F f = (F)((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    const F square = f * f;
    F y = f * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * (f * square);
    y = y + e * -2.12194440e-4f;
    y = y - 0.5f * square;
    return (f + y) + e * 0.693359375f;
  }

  // -2 log(v) for positive normal v, 2 ulp: log(1 + f) = f - f**2 / 2 + f**3 P(f) on [-1/4, 1/2), P fitted to the
  // smallest relative error of the whole.
  static SMART_FAST_INLINE F minus_two_log(F v) {
    const U exponent = ((U)v - 0x3F400000u) & 0xFF800000u;  // of v relative to [3/4, 3/2)
    const F f = (F)((U)v - exponent) - 1.0f;
    const F square = f * f;
    const F p01 = f * 0.4997137784957886f - 0.6666232347488403f;
    const F p23 = f * 0.34544050693511963f - 0.4018520414829254f;
    const F p45 = f * 0.13459157943725586f - 0.28154909610748291f;
    const F p = (p45 * square + p23) * square + p01;
    const F y = p * (f * square) + (square - 2.0f * f);
    return y + __builtin_convertvector((I)exponent, F) * (-1.3862943611198906f / 8388608.0f);
  }

  // log(v) with its limits: -inf at 0, inf at inf, NaN below 0 and at NaN.
  static SMART_FAST_INLINE F log(F v) {
    F y = select(v == 0.0f, splat(-infinity), log_normal(v));
    y = select(v == infinity, splat(infinity), y);
    return select(v >= 0.0f, y, splat(__builtin_nanf("")));
  }
};

SMART_FAST_INLINE bool any(I mask) {
#if SMART_FAST_SIMD_LEVEL == 3
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif SMART_FAST_SIMD_LEVEL == 2
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif SMART_FAST_SIMD_LEVEL == 1
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

// The sum of the lanes, in double: blocks of a row are added without loss.
SMART_FAST_INLINE double total(F v) {
  double parts[4] = {0, 0, 0, 0};
  for (int lane = 0; lane < LANES; ++lane) parts[lane & 3] += v[lane];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// a0 b0 a1 b1 of each group of four lanes, and a2 b2 a3 b3.
SMART_FAST_INLINE void interleave(F a, F b, F& lower, F& upper) {
#if SMART_FAST_LANES == 16
  lower = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  upper = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif SMART_FAST_LANES == 8
  lower = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  upper = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  lower = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  upper = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Lane indices, and lanes by index.
SMART_FAST_INLINE I lane_numbers() {
  I numbers;
  for (int lane = 0; lane < LANES; ++lane) numbers[lane] = lane;
  return numbers;
}
SMART_FAST_INLINE F permute(F v, I lanes) {  // indices modulo LANES
#if SMART_FAST_SIMD_LEVEL == 3
  return (F)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#elif SMART_FAST_SIMD_LEVEL == 2
  return (F)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#else
  F result;
  for (int lane = 0; lane < LANES; ++lane) result[lane] = v[lanes[lane] & (LANES - 1)];
  return result;
#endif
}

// Of the lanes, halved again and again.
SMART_FAST_INLINE float largest(F v) {
  for (int half = LANES / 2; half > 0; half /= 2) v = Simd::max(permute(v, lane_numbers() + half), v);
  return v[0];
}

// LANES dense rows of a few columns, `width` vectors, as columns; and back.
inline void dense_to_columns(const float* from, int64_t width, float* columns) {
  for (int32_t j = 0; j < width; ++j) {
    const I index = lane_numbers() * int32_t(width) + j;
    F column = {};
    for (int32_t k = 0; k < width; ++k)
      column = Simd::select((index >> (LANES == 16 ? 4 : LANES == 8 ? 3 : 2)) == k, permute(load(from + k * LANES), index), column);
    store(columns + j * LANES, column);
  }
}
inline void columns_to_dense(const float* columns, int64_t width, float* to) {
  const float inverse = 1.0f / float(width);
  for (int32_t k = 0; k < width; ++k) {
    const I index = lane_numbers() + k * LANES;
    const I row = __builtin_convertvector((__builtin_convertvector(index, F) + 0.5f) * inverse, I);
    F dense = {};
    for (int32_t j = 0; j < width; ++j)
      dense = Simd::select(index - row * int32_t(width) == j, permute(load(columns + j * LANES), row), dense);
    store(to + k * LANES, dense);
  }
}

// Whole vectors of `count` floats.
SMART_FAST_INLINE void copy_vectors(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

// A square of LANES rows, `from_step` and `to_step` apart. Interleaving the halves log2(LANES) times transposes.
inline void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
  F rows[LANES], next[LANES];
  for (int i = 0; i < LANES; ++i) rows[i] = load(from + i * from_step);
  for (int stage = 1; stage < LANES; stage *= 2) {
    for (int i = 0; i < LANES / 2; ++i) {
      const F a = rows[i], b = rows[i + LANES / 2];
#if SMART_FAST_LANES == 16
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif SMART_FAST_LANES == 8
      next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      next[2 * i] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
    }
    for (int i = 0; i < LANES; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < LANES; ++i) store(to + i * to_step, rows[i]);
}

}  // namespace
}  // namespace smart_fast
