// The arithmetic that philox.h and divergence.h are written over, for one element a thread. On the device: the
// approximations that Triton compiles to (ex2 for exp, sqrt.approx) and the accurate logarithm.
#pragma once

#include <cmath>
#include <cstdint>

#include "../platform.h"

namespace smart_fast {

struct Scalar {
  using F = float;
  using U = uint32_t;
  using Word = uint32_t;

  static constexpr float infinity = __builtin_huge_valf();
  static constexpr bool short_chains = false;

  static SMART_FAST_INLINE float splat(float value) { return value; }
  static SMART_FAST_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
  static SMART_FAST_INLINE float abs(float v) { return fabsf(v); }
  static SMART_FAST_INLINE float max(float a, float b) { return fmaxf(a, b); }
  static SMART_FAST_INLINE float min(float a, float b) { return fminf(a, b); }
  static SMART_FAST_INLINE float flip_sign(float v, uint32_t sign_bit) { return from_bits(to_bits(v) ^ sign_bit); }
  static SMART_FAST_INLINE float from_signed(uint32_t v) { return float(int32_t(v)); }
  static SMART_FAST_INLINE float from_unsigned(uint32_t v) { return float(v); }

  static SMART_FAST_INLINE void mul(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    const uint64_t product = uint64_t(a) * b;
    high = uint32_t(product >> 32);
    low = uint32_t(product);
  }

  static SMART_FAST_INLINE float exp(float v) {
#if defined(__CUDA_ARCH__)
    float power;  // without the detour of __expf through numbers that are not normal
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * 1.44269504088896341f));
    return power;
#else
    return expf(v);
#endif
  }
  static SMART_FAST_INLINE float sqrt(float v) {
#if defined(__CUDA_ARCH__)
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v));
    return root;
#else
    return sqrtf(v);
#endif
  }
  static SMART_FAST_INLINE float log(float v) { return logf(v); }
  static SMART_FAST_INLINE float log_normal(float v) { return logf(v); }
  static SMART_FAST_INLINE float minus_two_log(float v) { return logf(v) * -2.0f; }

  static SMART_FAST_INLINE uint32_t to_bits(float v) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(v);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    return bits;
#endif
  }
  static SMART_FAST_INLINE float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float v;
    __builtin_memcpy(&v, &bits, 4);
    return v;
#endif
  }
};

}  // namespace smart_fast
