// Counter-based noise: Philox-4x32, followed by Box-Muller where it is to be normal. The counter map is that of kernels/philox.py:
//
//     key     = (seed mod 2**32, seed >> 32)
//     counter = (i mod 2**32, i >> 32, 0, 0)      with i = e // 4, e the row-major index of an element
//     words   = Philox-4x32-7(counter, key)
//     normal    n0, n1 = box_muller(w0, w1);  n2, n3 = box_muller(w2, w3)
//     uniform   n0 … n3 = uniform(w0) … uniform(w3)
//     noise   = n[e % 4]
//
// Seven rounds are the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
//
// Everything is written over a class M of arithmetic: one element on a GPU, a SIMD vector on a CPU. It provides
//     F, I, Word             floats; 32-bit integers as wide as F; whatever holds a 32-bit word of a counter
//     mul(word, m, hi, lo)   the two halves of a 32 x 32 bit product; upper bits of a Word may hold anything
//     minus_two_log, sqrt, select, from_unsigned (32-bit unsigned to float), from_signed
#pragma once

#include <cstdint>

#include "rows.h"

namespace smart_fast {

constexpr int philox_rounds = 7;

template <class M>
SMART_FAST_INLINE void philox(typename M::Word& c0, typename M::Word& c1, typename M::Word& c2, typename M::Word& c3,
                              uint32_t k0, uint32_t k1) {
  for (int round = 0; round < philox_rounds; ++round) {
    typename M::Word hi0, lo0, hi1, lo1;
    M::mul(c0, 0xD2511F53u, hi0, lo0);
    M::mul(c2, 0xCD9E8D57u, hi1, lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Two independent normals of standard deviation `scale` from two 32-bit words (Box & Muller, 1958).
//
// The radius uses 32 bits, u = fp32((a + 1/2) / 2**32): tails to 6.7 sigma. The angle is a quadrant and an offset in
// [-pi/4, pi/4), for which short polynomials are accurate to fp32 rounding.
template <class M>
SMART_FAST_INLINE void box_muller(typename M::U a, typename M::U b, float scale, typename M::F& x,
                                  typename M::F& y) {
  using F = typename M::F;
  const F u = M::from_unsigned(a) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const F radius = M::sqrt(M::minus_two_log(u)) * scale;

  const F theta = M::from_signed((b & 0x3FFFFFFFu) - 536870912u) * 1.4629180792671596e-09f;  // (pi / 2) / 2**30
  const F s = theta * theta;
  // Cephes' sinf and cosf (Moshier): one term less than Taylor's for the same accuracy.
  const F sin = theta + theta * s * (-1.6666654611e-1f + s * (8.3321608736e-3f + s * -1.9515295891e-4f));
  const F cos = 1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));

  // Quadrants 0 … 3 give (cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos).
  const auto odd = (b & 0x40000000u) != 0u;
  x = M::flip_sign(M::select(odd, sin, cos), (b + 0x40000000u) & 0x80000000u) * radius;
  y = M::flip_sign(M::select(odd, cos, sin), b & 0x80000000u) * radius;
}

// A number uniform on [-sqrt(3), sqrt(3)] times `scale`, so that its standard deviation is `scale`: the word as a signed
// one in fp32, times sqrt(3) / 2**31, then times `scale`, rounded each time as everywhere.
template <class M>
SMART_FAST_INLINE typename M::F uniform(typename M::U word, float scale) {
  return M::from_signed(word) * 8.065489942588044e-10f * scale;
}

// Two independent numbers of the noise from two words of a counter, times `scale`.
template <class M, Noise NOISE>
SMART_FAST_INLINE void draw_noise(typename M::U a, typename M::U b, float scale, typename M::F& x, typename M::F& y) {
  static_assert(NOISE == Noise::normal || NOISE == Noise::uniform, "unknown noise");
  if constexpr (NOISE == Noise::uniform) {
    x = uniform<M>(a, scale);
    y = uniform<M>(b, scale);
  } else {
    box_muller<M>(a, b, scale, x, y);
  }
}

}  // namespace smart_fast
