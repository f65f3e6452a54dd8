// Row-wise KL, symmetric KL and JS divergence of logits, with gradients, in formulas that do not cancel: those of
// kernels/divergence.py. Per row, with logits x (input) and t (target), p = softmax(x), q = softmax(t):
//
//     r = log p - log q = delta - L,   delta = x - t - c,
//                                      L = log1p(sum q expm1(delta))             while max |delta| <= 1,
//                                          logsumexp(x) - logsumexp(t) - c       otherwise;
//
// where c is typical of the row's x - t, or zero where these are not all of one size; far apart, the difference of the
// maxima. A constant added to a row, which softmax does not see, then costs no digits: to x - t - c what the rounding of
// x - t left out is added.
//
//     f(r) = expm1(r) - r >= 0, whose series is exact near zero.
//
//     kl      KL(q || p)                           = sum q f(r)                 (p - q) - q r       far apart
//     sym_kl  alpha * KL(q || p) + KL(p || q)      KL(p || q) = sum p f(-r)     p r - (p - q)       far apart
//     js      alpha * (KL(m || p) + KL(m || q))    = alpha * sum (p + q) log cosh(r / 2),   m = (p + q) / 2
//     jsd     beta * KL(q || m) + (1 - beta) * KL(p || m),   m = beta q + (1 - beta) p
//             = sum beta q f(u) + (1 - beta) p f(v),   u = log m - log q,   v = log m - log p
//
// Gradients of a row sum (targets detached as smart-pytorch detaches them):
//     kl      dx = p - q = q expm1(r)     dt = -q (r + KL)
//     sym_kl  dx = alpha (p - q)          dt = -(p - q)
//     js      dx = alpha / 2 (p - q)      dt = -dx
// and not detached, through m as well:
//     jsd     dx = (1 - beta) p (-v - KL(p || m))    dt = beta q (-u - KL(q || m))
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

  // f(r) = expm1(r) - r for |r| <= 1: a Chebyshev fit of f(r) / r^2, relative error below 6e-9 before rounding.
  static SMART_FAST_INLINE F f_near(F r) {
    constexpr float c[] = {0.5f,           1.66666666e-1f, 4.16667367e-2f, 8.33334525e-3f,
                           1.38853949e-3f, 1.98369867e-4f, 2.53586449e-5f, 2.81265463e-6f};
    return polynomial(c, r) * (r * r);
  }

  // log(1 + z), z > -1, relative precision near zero by 2 artanh(z / (2 + z)).
  static SMART_FAST_INLINE F log1p(F z) { return log1p(z, 1.0f + z); }
  // The same where 1 + z can be had without the rounding of z.
  static SMART_FAST_INLINE F log1p(F z, F one_plus_z) {
    const auto small = M::abs(z) < 0.25f;
    F s = M::select(small, z, M::splat(0.0f));
    s = s / (s + 2.0f);
    const F w = s * s;
    const F series = 2.0f * s * (1.0f + w * (1.0f / 3 + w * (1.0f / 5 + w * (1.0f / 7 + w * (1.0f / 9)))));
    return M::select(small, series, M::log(one_plus_z));
  }

  // log cosh(r / 2): for |r| < 1 a Chebyshev fit in r^2, |r| / 2 - log 2 + log(1 + exp(-|r|)) beyond.
  template <bool NEAR>
  static SMART_FAST_INLINE F log_cosh_half(F r) {
    const F a = M::abs(r);
    const auto near = a < 1.0f;
    const F s = r * r;
    constexpr float c[] = {0.125f, -5.20831922e-3f, 3.47107682e-4f, -2.60233506e-5f, 1.74239017e-6f};
    const F series = polynomial(c, s) * s;
    if (NEAR) return series;
    // log(1 + z) / z on [0, 1/e], fitted to the smallest relative error of the whole.
    constexpr float log1p_over_z[] = {0.9999997615814209f,  -0.4999876618385315f,  0.3330853581428528f, -0.24748985469341278f,
                                      0.18560411036014557f, -0.11766623705625534f, 0.0427330881357193f};
    const F z = M::exp(-a);
    const F far = (0.5f * a - 0.6931471805599453f) + z * polynomial(log1p_over_z, z);
    return M::select(near, series, far);
  }

  // x - t - d, exactly, where d is x - t as it was rounded (Knuth's two-sum); NaN where d is not finite.
  static SMART_FAST_INLINE F rounding_error(F x, F t, F d) {
    const F back = d - x;
    return (x - (d - back)) - (t + back);
  }
  static SMART_FAST_INLINE F finite_or_zero(F v) { return M::select(M::abs(v) < M::infinity, v, M::splat(0.0f)); }

  // A maximum that is safe to subtract: rows of minus infinity keep their entries at exp(-inf) = 0.
  static SMART_FAST_INLINE F finite_max(F m) { return M::select(m == -M::infinity, M::splat(0.0f), m); }

  // expm1(d), meaningful while |d| <= 1.
  static SMART_FAST_INLINE F expm1_clamped(F d) {
    d = M::min(M::max(d, M::splat(-1.0f)), M::splat(1.0f));
    return d + f_near(d);
  }

  // L, from the expression that keeps its precision; `shift` is c, scaled.
  static SMART_FAST_INLINE F log_ratio(F max_x, F sum_x, F max_t, F sum_t, F expm1_sum, F max_d, F shift) {
    const F gap = max_x - max_t;
    const F far = ((gap - shift) + rounding_error(max_x, max_t, gap)) + M::log(sum_x / sum_t);
    return M::select(max_d <= 1.0f, log1p(expm1_sum / sum_t), far);
  }

  // Of a row whose sums of exp(t) and of exp(t) expm1(delta) are known, those of exp(x) relative to `max_x`: the rounding
  // of max_t + c goes into the sum.
  static SMART_FAST_INLINE void sums_of_x(F max_t, F sum_t, F expm1_sum, F shift, F& max_x, F& sum_x) {
    max_x = max_t + shift;
    const F rest = rounding_error(max_t, -shift, max_x);
    sum_x = sum_t + expm1_sum;
    sum_x += sum_x * rest;
  }

  // u - log1p(u) >= 0, to its own precision; u > -1.
  static SMART_FAST_INLINE F log1p_gap(F u) {
    const auto small = M::abs(u) < 0.25f;
    const F near = M::select(small, u, M::splat(0.0f)), s = near / (near + 2.0f), w = s * s;
    const F series = s * (near - 2.0f * w * (1.0f / 3 + w * (1.0f / 5 + w * (1.0f / 7 + w * (1.0f / 9)))));
    return M::select(small, series, u - M::log(1.0f + u));
  }

  // KL(q || p) and KL(q || p) + KL(p || q) of a row whose |delta| are at most one, from the means under q of
  // u = expm1(delta), of f = u - delta, of delta and of u delta.
  static SMART_FAST_INLINE F kl_of_means(F u, F f) { return f - log1p_gap(u); }
  static SMART_FAST_INLINE F both_of_means(F u, F delta, F u_delta) { return (u_delta - u * delta) / (1.0f + u); }

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
};

// ---- a divergence each ---------------------------------------------------------------------------------------------

// Which gradients of a row loss cannot be had before the sums over the whole row are known.
enum class Late { none, target, both };

template <Kind>
inline constexpr bool always_false = false;

// All that the kernels know of a divergence. A kind without formulas does not compile: there is no other to fall back to.
// Every specialization has
//
//     row_sums           how many numbers are summed over a row, 1 or 2
//     add_row_terms      adds a class's share of each, none of them negative; NEAR: p is not read
//     conclude           what the statistics of the row keep of the sums, `first` and `second`
//     loss               the loss of the row, from these two
//     means              from how many means over it the loss of a near row follows, 2 or 3: `first_of_means`; 0: it does not
//     factor             of the upstream gradient, before it is passed to `row_gradients` as `scale`
//     opposite           whether dt = -dx
//     late               see above; with `Late::target`, dt follows from q, r and the sums alone
//     row_gradients      of a row loss
//     element_term       of reduction="none"; of kinds other than jsd single ones may be negative
//     element_sums       how many sums over the row `element_gradients` needs
//     add_element_sums   adds a class's share of each: g is its upstream gradient, h = g - g0, g0 the first one of the row
//     element_gradients  of reduction="none" under any upstream gradient
template <class M, Kind KIND>
struct RowFormulas {
  static_assert(always_false<KIND>, "smart_fast: a divergence without formulas in csrc/divergence.h");
};

// What most kinds are.
template <class M>
struct OneSum : Divergence<M> {
  using F = typename M::F;

  static constexpr int row_sums = 1, means = 0;
  static constexpr Late late = Late::none;

  static SMART_FAST_INLINE void conclude(const F (&sums)[1], float, F& first, F& second) {
    first = sums[0];
    second = M::splat(0.0f);
  }
  static SMART_FAST_INLINE F loss(F first, F, float) { return first; }
  static SMART_FAST_INLINE float factor(float upstream, float) { return upstream; }
  static SMART_FAST_INLINE bool opposite(float) { return false; }

  // Gradients of reduction="none" under any upstream gradient g:
  //     kl      dx = (p - q) (g0 + S_q) + q (S_q - h)        dt = q (h - S_q) - q (g r - sum q g r)
  //     sym_kl  dx = alpha (the kl dx)                       dt = q (S_p - h) - g (p - q)
  //     js      dx = alpha (p (S_m - h) + g (p - q) / 2)     dt = alpha (q (S_m - h) - g (p - q) / 2)
  // with S_c = sum c h, written so that a constant g, the usual case, cancels exactly instead of to rounding.
  enum { p_h, q_h, q_g_r, element_sums };

  static SMART_FAST_INLINE void add_element_sums(F p, F q, F r, F g, F h, float, F (&sums)[element_sums]) {
    sums[p_h] += p * h;
    sums[q_h] += q * h;
    sums[q_g_r] += Divergence<M>::times(q, g * r);
  }
};

template <class M>
struct RowFormulas<M, Kind::kl> : OneSum<M> {
  using D = Divergence<M>;
  using F = typename M::F;
  using S = OneSum<M>;

  static constexpr int means = 2;
  static constexpr Late late = Late::target;

  static SMART_FAST_INLINE F first_of_means(F delta, F f, F, float) { return D::kl_of_means(delta + f, f); }
  template <bool NEAR>
  static SMART_FAST_INLINE void add_row_terms(F p, F q, F r, float, F (&sums)[1]) {
    const auto near = M::abs(r) < 1.0f;
    const F s = NEAR ? r : M::select(near, r, M::splat(0.0f));
    const F f = D::f_near(s);
    F forward = q * f;
    if (!NEAR) forward = M::select(near, forward, (p - q) - D::times(q, r));
    sums[0] += forward;
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void row_gradients(F p, F q, F r, float, F scale, F kl, F, F& dx, F& dt) {
    dx = scale * D::template p_minus_q<NEAR>(p, q, r);
    dt = -scale * D::times(q, r + kl);
  }
  static SMART_FAST_INLINE F element_term(F, F q, F r, float) { return -D::times(q, r); }
  static SMART_FAST_INLINE void element_gradients(F p, F q, F r, F h, F g0, const F (&sums)[S::element_sums], float,
                                                  F& dx, F& dt) {
    const F g = h + g0;
    const F diff = D::template p_minus_q<false>(p, q, r);
    dx = diff * (g0 + sums[S::q_h]) + q * (sums[S::q_h] - h);
    dt = q * (h - sums[S::q_h]) - (D::times(q, g * r) - q * sums[S::q_g_r]);
  }
};

template <class M>
struct RowFormulas<M, Kind::sym_kl> : OneSum<M> {
  using D = Divergence<M>;
  using F = typename M::F;
  using S = OneSum<M>;

  static constexpr int means = 3;

  static SMART_FAST_INLINE bool opposite(float alpha) { return alpha == 1.0f; }

  static SMART_FAST_INLINE F first_of_means(F delta, F f, F u_delta, float alpha) {
    const F u = delta + f, both = D::both_of_means(u, delta, u_delta);
    return alpha == 1.0f ? both : both + (alpha - 1.0f) * D::kl_of_means(u, f);
  }
  template <bool NEAR>
  static SMART_FAST_INLINE F row_term(F p, F q, F r, float alpha) {
    if (alpha == 1.0f) {  // (p - q) r, of which gradients need the first factor anyway
      const F diff = D::template p_minus_q<NEAR>(p, q, r);
      return NEAR ? diff * r : D::times(diff, r);
    }
    const auto near = M::abs(r) < 1.0f;
    const F s = NEAR ? r : M::select(near, r, M::splat(0.0f));
    const F f = D::f_near(s);
    F forward = q * f;
    if (!NEAR) forward = M::select(near, forward, (p - q) - D::times(q, r));
    F reverse = q * (s * (s + f) - f);
    if (!NEAR) reverse = M::select(near, reverse, D::times(p, r) - (p - q));
    return alpha * forward + reverse;
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void add_row_terms(F p, F q, F r, float alpha, F (&sums)[1]) {
    sums[0] += row_term<NEAR>(p, q, r, alpha);
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void row_gradients(F p, F q, F r, float alpha, F scale, F, F, F& dx, F& dt) {
    const F diff = scale * D::template p_minus_q<NEAR>(p, q, r);
    dx = alpha * diff;
    dt = -diff;
  }
  static SMART_FAST_INLINE F element_term(F p, F q, F r, float alpha) {
    return D::times(D::template p_minus_q<false>(p, q, r), r) + (1.0f - alpha) * D::times(q, r);
  }
  static SMART_FAST_INLINE void element_gradients(F p, F q, F r, F h, F g0, const F (&sums)[S::element_sums], float alpha,
                                                  F& dx, F& dt) {
    const F g = h + g0;
    const F diff = D::template p_minus_q<false>(p, q, r);
    dx = diff * (g0 + sums[S::q_h]) + q * (sums[S::q_h] - h);
    dx = alpha * dx;
    dt = q * (sums[S::p_h] - h) - g * diff;
  }
};

template <class M>
struct RowFormulas<M, Kind::js> : OneSum<M> {
  using D = Divergence<M>;
  using F = typename M::F;
  using S = OneSum<M>;

  static SMART_FAST_INLINE void conclude(const F (&sums)[1], float alpha, F& first, F& second) {
    first = alpha * sums[0];
    second = M::splat(0.0f);
  }
  static SMART_FAST_INLINE float factor(float upstream, float alpha) { return 0.5f * upstream * alpha; }
  static SMART_FAST_INLINE bool opposite(float) { return true; }

  // Without alpha.
  template <bool NEAR>
  static SMART_FAST_INLINE F row_term(F p, F q, F r) {
    const F log_cosh = D::template log_cosh_half<NEAR>(r);
    return NEAR ? (2.0f * q + D::template p_minus_q<true>(p, q, r)) * log_cosh : D::times(p + q, log_cosh);
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void add_row_terms(F p, F q, F r, float, F (&sums)[1]) {
    sums[0] += row_term<NEAR>(p, q, r);
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void row_gradients(F p, F q, F r, float, F scale, F, F, F& dx, F& dt) {
    dx = scale * D::template p_minus_q<NEAR>(p, q, r);
    dt = -dx;
  }
  static SMART_FAST_INLINE F element_term(F p, F q, F r, float alpha) { return alpha * row_term<false>(p, q, r); }
  static SMART_FAST_INLINE void element_gradients(F p, F q, F r, F h, F g0, const F (&sums)[S::element_sums], float alpha,
                                                  F& dx, F& dt) {
    const F g = h + g0;
    const F diff = D::template p_minus_q<false>(p, q, r);
    const F sum_m = 0.5f * (sums[S::p_h] + sums[S::q_h]);
    dx = alpha * (p * (sum_m - h) + 0.5f * g * diff);
    dt = alpha * (q * (sum_m - h) - 0.5f * g * diff);
  }
};

// `alpha` holds beta.
template <class M>
struct RowFormulas<M, Kind::jsd> : Divergence<M> {
  using D = Divergence<M>;
  using F = typename M::F;

  static constexpr int row_sums = 2, means = 0;
  static constexpr Late late = Late::both;

  // u = log m - log q and v = log m - log p. The logarithm of 1 + w expm1(-|r|) never sees more than one: of the larger
  // probability it takes m's part in it.
  template <bool NEAR>
  static SMART_FAST_INLINE void mixture(F r, float beta, F& u, F& v) {
    const F a = M::abs(r), ratio = M::exp(-a);
    const auto near = a < 1.0f;
    const F s = NEAR ? -a : M::select(near, -a, M::splat(0.0f));
    F e = s + D::f_near(s);
    if (!NEAR) e = M::select(near, e, ratio - 1.0f);
    const auto below = r <= 0.0f;
    const F of_p = M::splat(1.0f - beta), of_q = M::splat(beta);
    const F w = M::select(below, of_p, of_q), rest = M::select(below, of_q, of_p);
    const F l = D::log1p(w * e, rest + w * ratio);
    u = M::select(below, l, l + r);
    v = M::select(below, l - r, l);
  }

  // q f(u) and p f(v), whose sums are KL(q || m) and KL(p || m): the series of f as far as it reaches, whatever r is.
  template <bool NEAR>
  static SMART_FAST_INLINE void row_terms(F p, F q, F r, float beta, F& first, F& second) {
    F u, v;
    mixture<NEAR>(r, beta, u, v);
    if (NEAR) p = q + D::template p_minus_q<true>(p, q, r);
    first = q * D::f_near(u);
    second = p * D::f_near(v);
    if (NEAR) return;
    const F diff = p - q;
    // Of a row with NaN among x the CPU kernels know r as minus infinity: p shows it then.
    first = M::select((M::abs(u) < 1.0f) & (r > -M::infinity), first, (1.0f - beta) * diff - D::times(q, u));
    second = M::select(M::abs(v) < 1.0f, second, -beta * diff - D::times(p, v));
  }
  template <bool NEAR>
  static SMART_FAST_INLINE void add_row_terms(F p, F q, F r, float beta, F (&sums)[2]) {
    F first, second;
    row_terms<NEAR>(p, q, r, beta, first, second);
    sums[0] += first;
    sums[1] += second;
  }
  static SMART_FAST_INLINE void conclude(const F (&sums)[2], float, F& first, F& second) {
    first = sums[0];
    second = sums[1];
  }
  static SMART_FAST_INLINE F loss(F first, F second, float beta) { return beta * first + (1.0f - beta) * second; }
  static SMART_FAST_INLINE float factor(float upstream, float) { return upstream; }
  static SMART_FAST_INLINE bool opposite(float) { return false; }

  template <bool NEAR>
  static SMART_FAST_INLINE void row_gradients(F p, F q, F r, float beta, F scale, F kl_q, F kl_p, F& dx, F& dt) {
    F u, v;
    mixture<NEAR>(r, beta, u, v);
    if (NEAR) p = q + D::template p_minus_q<true>(p, q, r);
    dx = (beta - 1.0f) * scale * D::times(p, v + kl_p);
    dt = -beta * scale * D::times(q, u + kl_q);
  }

  // Not negative: near, what rows are summed from; farther, what is added there to both sides adds up to zero.
  static SMART_FAST_INLINE F element_term(F p, F q, F r, float beta) {
    F u, v;
    mixture<false>(r, beta, u, v);
    const auto near = M::abs(r) < 1.0f;
    const F to_q = M::select(near, q * D::f_near(u), -D::times(q, u));
    const F to_p = M::select(near, p * D::f_near(v), -D::times(p, v));
    return loss(to_q, to_p, beta) + (p - p);  // NaN where p is, as above
  }

  // With c = -(1 - beta) g v and e = -beta g u: dx = p (c - sum p c), dt = q (e - sum q e).
  enum { p_c, q_e, element_sums };

  static SMART_FAST_INLINE void add_element_sums(F p, F q, F r, F g, F, float beta, F (&sums)[element_sums]) {
    F u, v;
    mixture<false>(r, beta, u, v);
    sums[p_c] += D::times(p, (beta - 1.0f) * g * v);
    sums[q_e] += D::times(q, -beta * g * u) + (p - p);  // NaN where p is, as above
  }
  static SMART_FAST_INLINE void element_gradients(F p, F q, F r, F h, F g0, const F (&sums)[element_sums], float beta,
                                                  F& dx, F& dt) {
    const F g = h + g0;
    F u, v;
    mixture<false>(r, beta, u, v);
    dx = D::times(p, (beta - 1.0f) * g * v - sums[p_c]);
    dt = D::times(q, -beta * g * u - sums[q_e]);
  }
};

}  // namespace smart_fast
