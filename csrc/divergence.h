// Row-wise KL, symmetric KL and JS divergence of logits, with gradients, in formulas that do not cancel: those of
// kernels/divergence.py. Per row, with logits x (input) and t (target), p = softmax(x), q = softmax(t), d = x - t:
//
//     r = log p - log q = d - D,   D = log1p(sum q expm1(d))      while max |d| <= 1,
//                                  D = logsumexp(x) - logsumexp(t)   otherwise;
//     f(r) = expm1(r) - r >= 0, whose series is exact near zero.
//
//     kl      KL(q || p)                           = sum q f(r)                 (p - q) - q r       far apart
//     sym_kl  alpha * KL(q || p) + KL(p || q)      KL(p || q) = sum p f(-r)     p r - (p - q)       far apart
//     js      alpha * (KL(m || p) + KL(m || q))    = alpha * sum (p + q) log cosh(r / 2),   m = (p + q) / 2
//
// Gradients of a row sum (targets detached as smart-pytorch detaches them):
//     kl      dx = p - q = q expm1(r)     dt = -q (r + KL)
//     sym_kl  dx = alpha (p - q)          dt = -(p - q)
//     js      dx = alpha / 2 (p - q)      dt = -dx
//
// No term of a row sum is negative. Logits of minus infinity on both sides contribute nothing; a row of them is NaN.
// Written over a class M of arithmetic, as philox.h: F, select, abs, exp, log, infinity, short_chains. NEAR says that |r| < 1 is known;
// p is then not read.
#pragma once

#include "platform.h"
#include "rows.h"

namespace smart_fast {

template <class M>
struct Divergence {
  using F = typename M::F;

  // The polynomial with coefficients c[BEGIN …] in x; powers[k] = x ** 2 ** k. By Horner where registers are dear, by
  // Estrin, whose chains of dependent operations are short, elsewhere.
  template <int BEGIN, int COUNT>
  static SMART_FAST_INLINE F estrin(const float* c, const F* powers) {
    if constexpr (COUNT == 1) {
      return M::splat(c[BEGIN]);
    } else if constexpr (COUNT == 2) {
      return powers[0] * c[BEGIN + 1] + c[BEGIN];
    } else {
      constexpr int half = COUNT > 8 ? 8 : COUNT > 4 ? 4 : 2, level = half == 8 ? 3 : half == 4 ? 2 : 1;
      return estrin<BEGIN + half, COUNT - half>(c, powers) * powers[level] + estrin<BEGIN, half>(c, powers);
    }
  }
  template <int COUNT>
  static SMART_FAST_INLINE F polynomial(const float (&c)[COUNT], F x) {
    if constexpr (M::short_chains) {
      const F x2 = x * x, x4 = x2 * x2, powers[] = {x, x2, x4, x4 * x4};
      return estrin<0, COUNT>(c, powers);
    } else {
      F sum = M::splat(c[COUNT - 1]);
      for (int k = COUNT - 2; k >= 0; --k) sum = sum * x + c[k];
      return sum;
    }
  }

  // f(r) = expm1(r) - r for |r| <= 1: its Taylor series, relative error below 3e-8 before rounding.
  static SMART_FAST_INLINE F f_near(F r) {
    constexpr float c[] = {1.0f / 2,    1.0f / 6,     1.0f / 24,     1.0f / 120,    1.0f / 720,
                           1.0f / 5040, 1.0f / 40320, 1.0f / 362880, 1.0f / 3628800};
    return polynomial(c, r) * (r * r);
  }

  // log(1 + z), z > -1, relative precision near zero by 2 artanh(z / (2 + z)).
  static SMART_FAST_INLINE F log1p(F z) {
    const auto small = M::abs(z) < 0.25f;
    F s = M::select(small, z, M::splat(0.0f));
    s = s / (s + 2.0f);
    const F w = s * s;
    const F series = 2.0f * s * (1.0f + w * (1.0f / 3 + w * (1.0f / 5 + w * (1.0f / 7 + w * (1.0f / 9)))));
    return M::select(small, series, M::log(1.0f + z));
  }

  // log cosh(r / 2): Taylor series for |r| < 1, |r|/2 - log 2 + log(1 + exp(-|r|)) beyond.
  template <bool NEAR>
  static SMART_FAST_INLINE F log_cosh_half(F r) {
    const F a = M::abs(r);
    const auto near = a < 1.0f;
    const F y = 0.5f * (NEAR ? r : M::select(near, r, M::splat(0.0f)));
    const F s = y * y;
    constexpr float c[] = {1.0f / 2, -1.0f / 12, 1.0f / 45, -17.0f / 2520, 31.0f / 14175, -691.0f / 935550, 2.5658e-4f};
    const F series = polynomial(c, s) * s;
    if (NEAR) return series;
    // log(1 + z) / z on [0, 1/e], fitted to the smallest relative error of the whole.
    constexpr float log1p_over_z[] = {0.9999997615814209f,  -0.4999876618385315f,  0.3330853581428528f, -0.24748985469341278f,
                                      0.18560411036014557f, -0.11766623705625534f, 0.0427330881357193f};
    const F z = M::exp(-a);
    const F far = (0.5f * a - 0.6931471805599453f) + z * polynomial(log1p_over_z, z);
    return M::select(near, series, far);
  }

  // x - t, zero where both are minus infinity.
  static SMART_FAST_INLINE F difference(F x, F t) {
    return M::select((x == -M::infinity) & (t == -M::infinity), M::splat(0.0f), x - t);
  }

  // A maximum that is safe to subtract: rows of minus infinity keep their entries at exp(-inf) = 0.
  static SMART_FAST_INLINE F finite_max(F m) { return M::select(m == -M::infinity, M::splat(0.0f), m); }

  // expm1(d), meaningful while |d| <= 1.
  static SMART_FAST_INLINE F expm1_clamped(F d) {
    d = M::min(M::max(d, M::splat(-1.0f)), M::splat(1.0f));
    return d + f_near(d);
  }

  // D = logsumexp(x) - logsumexp(t), from the expression that keeps its precision.
  static SMART_FAST_INLINE F log_ratio_shift(F max_x, F sum_x, F max_t, F sum_t, F expm1_sum, F max_d) {
    const F far = (max_x - max_t) + M::log(sum_x / sum_t);
    return M::select(max_d <= 1.0f, log1p(expm1_sum / sum_t), far);
  }

  // q * r with 0 * inf = 0: an event of probability zero adds nothing.
  static SMART_FAST_INLINE F times(F q, F r) { return M::select(q == 0.0f, M::splat(0.0f), q * r); }

  // p - q, by q * expm1(r) where the two are close.
  template <bool NEAR>
  static SMART_FAST_INLINE F p_minus_q(F p, F q, F r) {
    if (NEAR) return q * (r + f_near(r));
    const auto near = M::abs(r) < 1.0f;
    const F s = M::select(near, r, M::splat(0.0f));
    return M::select(near, q * (s + f_near(s)), p - q);
  }

  template <bool NEAR>
  static SMART_FAST_INLINE F js_term(F p, F q, F r) {
    const F log_cosh = log_cosh_half<NEAR>(r);
    return NEAR ? (2.0f * q + p_minus_q<true>(p, q, r)) * log_cosh : times(p + q, log_cosh);
  }

  // The non-negative terms whose sum is the divergence of the row, without the alpha of js.
  template <Kind KIND, bool NEAR>
  static SMART_FAST_INLINE F row_term(F p, F q, F r, float alpha) {
    if (KIND == Kind::js) return js_term<NEAR>(p, q, r);
    if (KIND == Kind::sym_kl && alpha == 1.0f) {  // (p - q) r, of which gradients need the first factor anyway
      const F diff = p_minus_q<NEAR>(p, q, r);
      return NEAR ? diff * r : times(diff, r);
    }
    const auto near = M::abs(r) < 1.0f;
    const F s = NEAR ? r : M::select(near, r, M::splat(0.0f));
    const F f = f_near(s);
    F forward = q * f;
    if (!NEAR) forward = M::select(near, forward, (p - q) - times(q, r));
    if (KIND == Kind::kl) return forward;
    F reverse = q * (s * (s + f) - f);
    if (!NEAR) reverse = M::select(near, reverse, times(p, r) - (p - q));
    return alpha * forward + reverse;
  }

  // The terms as torch.nn.functional.kl_div(reduction="none") defines them; single ones may be negative.
  template <Kind KIND>
  static SMART_FAST_INLINE F element_term(F p, F q, F r, float alpha) {
    if (KIND == Kind::kl) return -times(q, r);
    if (KIND == Kind::sym_kl) return times(p_minus_q<false>(p, q, r), r) + (1.0f - alpha) * times(q, r);
    return alpha * js_term<false>(p, q, r);
  }

  // Gradients of a row sum, for an upstream gradient `scale` (of js: alpha / 2 times it). `kl`: the KL of the row.
  template <Kind KIND, bool NEAR>
  static SMART_FAST_INLINE void row_gradients(F p, F q, F r, float alpha, F scale, F kl, F& dx, F& dt) {
    const F diff = scale * p_minus_q<NEAR>(p, q, r);
    dx = KIND == Kind::sym_kl ? alpha * diff : diff;
    dt = KIND == Kind::kl ? -scale * times(q, r + kl) : -diff;
  }

  // Sums over a row that the gradients of reduction="none" need: h = g - g0, g0 the first upstream gradient of the row.
  struct ElementSums {
    F p_h, q_h, q_g_r;
  };

  // Gradients of reduction="none" under any upstream gradient g:
  //     kl      dx = (p - q) (g0 + S_q) + q (S_q - h)        dt = q (h - S_q) - q (g r - sum q g r)
  //     sym_kl  dx = alpha (the kl dx)                       dt = q (S_p - h) - g (p - q)
  //     js      dx = alpha (p (S_m - h) + g (p - q) / 2)     dt = alpha (q (S_m - h) - g (p - q) / 2)
  // with S_c = sum c h, written so that a constant g, the usual case, cancels exactly instead of to rounding.
  template <Kind KIND>
  static SMART_FAST_INLINE void element_gradients(F p, F q, F r, F h, F g0, const ElementSums& sums, float alpha,
                                                  F& dx, F& dt) {
    const F g = h + g0;
    const F diff = p_minus_q<false>(p, q, r);
    if (KIND == Kind::js) {
      const F sum_m = 0.5f * (sums.p_h + sums.q_h);
      dx = alpha * (p * (sum_m - h) + 0.5f * g * diff);
      dt = alpha * (q * (sum_m - h) - 0.5f * g * diff);
      return;
    }
    dx = diff * (g0 + sums.q_h) + q * (sums.q_h - h);
    if (KIND == Kind::kl) {
      dt = q * (h - sums.q_h) - (times(q, g * r) - q * sums.q_g_r);
    } else {
      dx = alpha * dx;
      dt = q * (sums.p_h - h) - g * diff;
    }
  }
};

}  // namespace smart_fast
