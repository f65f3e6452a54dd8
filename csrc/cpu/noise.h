// Philox noise in SIMD vectors.
#pragma once

#include "../philox.h"
#include "blocks.h"

namespace smart_fast {
namespace {

constexpr int NORMALS = 2 * LANES;  // made at a time, from LANES / 2 counters

// Words of the counters from `group` on, for `count` normals, as `normals` takes them: a vector of first words of pairs,
// then one of second words. CARRY: the upper half of the counter may change on the way.
template <bool CARRY, class Ahead>
inline void make_words(U* words, uint64_t seed, uint64_t group, int64_t count, const Ahead& ahead) {
  // In this order of counters, interleaving within 128-bit lanes puts the normals in theirs.
  W first = {};
  for (int lane = 0; lane < LANES / 2; ++lane) first[lane] = group + uint64_t(lane / 2 + lane % 2 * (LANES / 4));
  const W upper = W{} + (group >> 32);
  for (int64_t i = 0; i < count; i += NORMALS, words += 2, first += uint64_t(LANES / 2)) {
    ahead(i);
    W c0 = first, c1 = CARRY ? first >> 32 : upper, c2 = {}, c3 = {};
    philox<Simd>(c0, c1, c2, c3, uint32_t(seed), uint32_t(seed >> 32));
    // Even lanes take the first two words of a counter, odd lanes the others.
    words[0] = (U)((c0 & 0xFFFFFFFFu) | (c2 << 32));
    words[1] = (U)((c1 & 0xFFFFFFFFu) | (c3 << 32));
  }
}

// The scaled noise of element indices 4 * group … 4 * group + count - 1, NORMALS at a time: `use(i, lower, upper)` takes
// those of i … i + LANES - 1 and the LANES after them. The last call may reach past `count`.
//
// In two passes over a block that stays in the innermost cache: the chains of dependent operations are then short enough
// for a processor to overlap several of them. `ahead(i)` is called before element i is computed, for prefetching.
template <Noise KIND, class Ahead, class Use>
inline void each_noise(uint64_t seed, uint64_t group, int64_t count, float scale, const Ahead& ahead, const Use& use) {
  alignas(64) U words[BLOCK / LANES];
  for (int64_t begin = 0; begin < count; begin += BLOCK, group += BLOCK / 4) {
    const int64_t part = count - begin < BLOCK ? count - begin : BLOCK;
    const auto block_ahead = [&](int64_t i) { ahead(begin + i); };
    if (uint32_t(group) <= 0xFFFFFFFFu - BLOCK / 4)
      make_words<false>(words, seed, group, part, block_ahead);
    else
      make_words<true>(words, seed, group, part, block_ahead);
    for (int64_t i = 0; i < part; i += NORMALS) {
      F x, y, lower, upper;
      draw_noise<Simd, KIND>(words[i / LANES], words[i / LANES + 1], scale, x, y);
      interleave(x, y, lower, upper);
      use(begin + i, lower, upper);
    }
  }
}

// The same in memory. Writes whole multiples of NORMALS.
template <class Ahead>
inline void make_noise(Noise kind, float* out, uint64_t seed, uint64_t group, int64_t count, float scale,
                       const Ahead& ahead) {
  with_noise(
      kind,
      [&](auto noise) {
        each_noise<noise.value>(seed, group, count, scale, ahead, [&](int64_t i, F lower, F upper) {
          store(out + i, lower);
          store(out + i + LANES, upper);
        });
      },
      [] { __builtin_trap(); });
}

}  // namespace
}  // namespace smart_fast
