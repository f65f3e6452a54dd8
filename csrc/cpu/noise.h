// Philox noise in SIMD vectors.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace smart_fast {
namespace {

constexpr int NORMALS = 2 * LANES;  // made at a time, from LANES / 2 counters

// The scaled noise of element indices 4 * group … 4 * group + count - 1. Writes whole multiples of NORMALS.
inline void make_noise(float* out, uint64_t seed, uint64_t group, int64_t count, float scale) {
  W first = {};
  for (int lane = 0; lane < LANES / 2; ++lane) first[lane] = group + uint64_t(lane);
  for (int64_t i = 0; i < count; i += NORMALS, first += uint64_t(LANES / 2)) {
    W c0 = first, c1 = first >> 32, c2 = {}, c3 = {};
    philox<Simd>(c0, c1, c2, c3, uint32_t(seed), uint32_t(seed >> 32));
    // Even lanes take the first two words of a counter, odd lanes the others.
    const U a = (U)((c0 & 0xFFFFFFFFu) | (c2 << 32));
    const U b = (U)((c1 & 0xFFFFFFFFu) | (c3 << 32));
    F x, y, lower, upper;
    box_muller<Simd>(a, b, x, y);
    interleave(x, y, lower, upper);
    store(out + i, lower * scale);
    store(out + i + LANES, upper * scale);
  }
}

}  // namespace
}  // namespace smart_fast
