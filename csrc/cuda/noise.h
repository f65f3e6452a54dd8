// Noise in registers, a chunk at a time, and the seeds it comes from.
#pragma once

#include "../philox.h"
#include "kernels.h"
#include "scalar.h"

namespace smart_fast {
namespace cuda {

// A seed for one call from the state of torch's generator: two words of Philox under its seed. The counter's third word
// is zero for noise and one here, so that the two never meet.
SMART_FAST_INLINE int64_t seed_from(uint64_t generator_seed, uint64_t offset) {
  uint32_t a = uint32_t(offset), b = uint32_t(offset >> 32), c = 1, d = 0;
  philox<Scalar>(a, b, c, d, uint32_t(generator_seed), uint32_t(generator_seed >> 32));
  return int64_t((uint64_t(b) << 32 | a) >> 1);
}

SMART_FAST_INLINE int64_t seed_of(const Seed& seed) {
  if (seed.given != nullptr) return *seed.given;
  if (seed.generator_seed_ptr == nullptr) return seed_from(seed.generator_seed, seed.offset);
  return seed_from(uint64_t(*seed.generator_seed_ptr), uint64_t(*seed.offset_ptr) + seed.offset);
}

// The noise of elements `element` …; both are multiples of four. `kind` is known to be one of those, on the host.
template <int SIZE>
SMART_FAST_INLINE void noise_of(Noise kind, uint64_t seed, int64_t element, float (&n)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; i += 4) {
    const uint64_t group = uint64_t(element + i) / 4;
    uint32_t a = uint32_t(group), b = uint32_t(group >> 32), c = 0, d = 0;
    philox<Scalar>(a, b, c, d, uint32_t(seed), uint32_t(seed >> 32));
    if (kind == Noise::uniform) {
      draw_noise<Scalar, Noise::uniform>(a, b, 1.0f, n[i], n[i + 1]);
      draw_noise<Scalar, Noise::uniform>(c, d, 1.0f, n[i + 2], n[i + 3]);
    } else {
      draw_noise<Scalar, Noise::normal>(a, b, 1.0f, n[i], n[i + 1]);
      draw_noise<Scalar, Noise::normal>(c, d, 1.0f, n[i + 2], n[i + 3]);
    }
  }
}

}  // namespace cuda
}  // namespace smart_fast
