"""float64 oracles, from the definitions. They share no code with the package.

Probabilities are computed from log-probabilities shifted by an exact log-sum-exp, and the divergences of nearly equal
distributions by series, so that the oracle stays accurate where float64 itself would cancel.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


def relative_error(value: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """|| value - reference || / || reference ||; infinite where one is NaN and the other is not.

    Over the norm of ``scale`` where that is larger: what rounds is then larger than the result.
    """
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    if not torch.equal(value.isnan(), reference.isnan()):
        return math.inf
    value, reference = value.nan_to_num(nan=0.0), reference.nan_to_num(nan=0.0)
    if torch.equal(value, reference):
        return 0.0
    size = reference.norm().clamp_min(1e-300)
    if scale is not None:
        size = torch.maximum(size, scale.detach().double().cpu().norm())
    return float((value - reference).norm() / size)


def log_ratio(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(r, p, q): log p - log q and the probabilities of logits [..., V], without cancellation for close x and t."""
    x, t = x.double(), t.double()
    d = x - t
    q = torch.softmax(t, -1)
    if float(d.abs().max()) < 1.0:
        shift = torch.log1p((q * torch.expm1(d)).sum(-1, keepdim=True))
    else:
        shift = torch.logsumexp(x, -1, keepdim=True) - torch.logsumexp(t, -1, keepdim=True)
    return d - shift, torch.softmax(x, -1), q


def _gap(r: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """p - q."""
    near = r.abs() < 1
    return torch.where(near, q * torch.expm1(torch.where(near, r, 0.0)), p - q)


def _f(r: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """q (exp(r) - 1 - r), by its series where float64 would lose digits, by p and q where exp(r) would overflow."""
    small = r.abs() < 1e-2
    s = torch.where(small, r, 0.0)
    series = s * s / 2 * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6 * (1 + s / 7)))))
    return torch.where(small, q * series, _gap(r, p, q) - q * r)


def _log_cosh(y: Tensor) -> Tensor:
    small = y.abs() < 1
    near = torch.log1p(2 * torch.sinh(torch.where(small, y, 0.0) / 2) ** 2)
    return torch.where(small, near, y.abs() - math.log(2) + torch.log1p(torch.exp(-2 * y.abs())))


def _mixed(r: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """``(log(1 + a), a - log(1 + a))`` for a = weight (exp(r) - 1); the second only where a is not large."""
    a = weight * torch.expm1(r.clamp(max=30.0))
    log = torch.where(r < 30, torch.log1p(a), r + torch.log(weight + (1 - weight) * torch.exp(-r)))
    small = a.abs() < 1e-2
    s = torch.where(small, a, 0.0)
    series = sum((-1) ** n * s**n / n for n in range(2, 11))
    return log, torch.where(small, series, a - log)


def _jsd(x: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, q, log(m/q), log(m/p), and the terms of KL(q || m) and of KL(p || m) to which m - q and m - p are added, so
    that none is negative; m = beta q + (1 - beta) p."""
    r, p, q = log_ratio(x, t)
    u, near_q = _mixed(r, 1 - beta)
    v, near_p = _mixed(-r, beta)
    gap = _gap(r, p, q)
    to_q = torch.where(r < 30, q * near_q, (1 - beta) * gap - torch.where(q > 0, q * u, 0.0))
    to_p = torch.where(r > -30, p * near_p, -beta * gap - torch.where(p > 0, p * v, 0.0))
    return p, q, u, v, to_q, to_p


def divergence_rows(kind: str, x: Tensor, t: Tensor, alpha: float) -> Tensor:
    """The divergence of each row [...], float64; ``alpha`` is beta for jsd."""
    if kind == "jsd":
        *_, to_q, to_p = _jsd(x, t, alpha)
        return alpha * to_q.sum(-1) + (1 - alpha) * to_p.sum(-1)
    r, p, q = log_ratio(x, t)
    if kind == "kl":
        return _f(r, p, q).sum(-1)
    if kind == "sym_kl":
        return (alpha * _f(r, p, q) + _f(-r, q, p)).sum(-1)
    return alpha * ((p + q) * _log_cosh(r / 2)).sum(-1)


def divergence_terms(kind: str, x: Tensor, t: Tensor, alpha: float) -> Tensor:
    """The elementwise terms [..., V] of `torch.nn.functional.kl_div`'s definition, float64."""
    if kind == "jsd":
        *_, to_q, to_p = _jsd(x, t, alpha)
        return alpha * to_q + (1 - alpha) * to_p
    r, p, q = log_ratio(x, t)
    if kind == "kl":
        return -q * r
    if kind == "sym_kl":
        return (_gap(r, p, q) + (1 - alpha) * q) * r
    return alpha * (p + q) * _log_cosh(r / 2)


def divergence_grads(kind: str, x: Tensor, t: Tensor, alpha: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to x and t of sum(upstream * terms), upstream [..., V], with smart-pytorch's detachments, float64.

    Written from the softmax Jacobian: d/dx_j sum_i c_i log p_i = c_j - p_j sum_i c_i.
    """
    r, p, q = log_ratio(x, t)
    g = upstream.double().expand_as(q)
    gap = _gap(r, p, q)

    def toward_p(c: Tensor) -> Tensor:  # gradient of sum of -c log p: p sum(c) - c
        return p * c.sum(-1, keepdim=True) - c

    def toward_q(c: Tensor) -> Tensor:
        return q * c.sum(-1, keepdim=True) - c

    if kind == "jsd":
        to_p, to_q = _toward_mixture(x, t, alpha, g)
        return to_p - p * to_p.sum(-1, keepdim=True), to_q - q * to_q.sum(-1, keepdim=True)
    constant = bool((g == g[..., :1]).all())
    if kind == "kl":
        # terms q (log q - log p): p moves the second, q both.
        dx = g * gap if constant else toward_p(g * q)
        inner = g * (1 - r)
        dt = q * (inner - (q * inner).sum(-1, keepdim=True))
        if constant:
            dt = -g * q * (r - (q * r).sum(-1, keepdim=True))
        return dx, dt
    if kind == "sym_kl":
        if constant:
            return alpha * g * gap, -g * gap
        return alpha * toward_p(g * q), toward_q(g * p)
    if constant:
        return alpha * g * gap / 2, -alpha * g * gap / 2
    mean = (p + q) / 2
    return alpha * toward_p(g * mean), alpha * toward_q(g * mean)


def _toward_mixture(x: Tensor, t: Tensor, beta: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """g p and g q times the derivatives of the terms of jsd by p and by q: -(1 - beta) log(m/p), -beta log(m/q)."""
    p, q, u, v, _, _ = _jsd(x, t, beta)
    return -(1 - beta) * g * torch.where(p > 0, p * v, 0.0), -beta * g * torch.where(q > 0, q * u, 0.0)


def gradient_scales(kind: str, x: Tensor, t: Tensor, alpha: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """As `divergence_grads`, the numbers whose differences from their mean the gradients are.

    Of jsd far apart they are near log(1 / beta) for every class that counts, and fp32 rounds them: the gradient of such
    a row, which is nearly zero, is exact to their last digit, not to its own. Where the two sides are near they are as
    small as the gradients. Other gradients are products.
    """
    if kind == "jsd":
        return _toward_mixture(x, t, alpha, upstream.double())
    return divergence_grads(kind, x, t, alpha, upstream)


@functools.lru_cache(maxsize=32)  # Python is slow, and tests ask for the same noise again: not to be written to
def philox_uniform(seed: int, count: int, start: int = 0) -> np.ndarray:
    """The uniform noise of elements start … start + count - 1, float64: words as signed numbers of standard deviation
    one; rounded to fp32 before they are scaled, as the definition has it."""
    first, last = start // 4, (start + count - 1) // 4
    words = np.array([_philox((i & 0xFFFFFFFF, i >> 32, 0, 0), seed) for i in range(first, last + 1)], dtype=np.uint32)
    signed = words.view(np.int32).astype(np.float32).astype(np.float64)
    return (signed * (math.sqrt(3) / 2**31)).reshape(-1)[start - 4 * first :][:count]


@functools.lru_cache(maxsize=32)
def philox_normal(seed: int, count: int, start: int = 0) -> np.ndarray:
    """The noise of elements start … start + count - 1, float64: Philox-4x32-7 and Box-Muller from their papers.

    Random123's round function in Python integers; angles and logarithms in float64. Only the uniform under the
    logarithm is rounded to fp32, as the definition has it.
    """
    first, last = start // 4, (start + count - 1) // 4
    words = np.array([_philox((i & 0xFFFFFFFF, i >> 32, 0, 0), seed) for i in range(first, last + 1)], dtype=np.uint32)
    normals = np.empty((len(words), 4))
    for lane, (a, b) in enumerate(((0, 1), (2, 3))):
        uniform = words[:, a].astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
        radius = np.sqrt(-2.0 * np.log(uniform.astype(np.float64)))
        # Two bits choose the quadrant, thirty the offset from its center: -pi/4 … pi/4.
        word = words[:, b].astype(np.float64)
        angle = (word // 2**30) * (math.pi / 2) + (word % 2**30 - 2**29) * (math.pi / 2 / 2**30)
        normals[:, 2 * lane] = radius * np.cos(angle)
        normals[:, 2 * lane + 1] = radius * np.sin(angle)
    return normals.reshape(-1)[start - 4 * first :][:count]


def _philox(counter: tuple[int, int, int, int], seed: int, rounds: int = 7) -> tuple[int, int, int, int]:
    low = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & low, (product0 >> 32) ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def norm_rows(kind: str, scope: str, x: Tensor) -> Tensor:
    """A norm, broadcastable to x, float64."""
    flat = x.double() if scope == "row" else x.double().flatten(1)
    value = {"inf": flat.abs().amax(-1), "l1": flat.abs().sum(-1), "l2": (flat * flat).sum(-1).sqrt()}[kind]
    return value.reshape(*value.shape, *([1] * (x.dim() - value.dim())))


def ball_projection(kind: str, scope: str, x: Tensor, radius: float) -> Tensor:
    """The point nearest to x of the ball of a norm, float64; that of l1 by bisection for what each entry loses."""
    x = x.double()
    if kind == "inf":
        return x.clamp(-radius, radius)
    if kind == "l2":
        return x * (radius / norm_rows(kind, scope, x).clamp_min(1e-300)).clamp_max(1.0)
    low, high = torch.zeros_like(norm_rows("inf", scope, x)), norm_rows("inf", scope, x)
    for _ in range(200):
        middle = (low + high) / 2
        outside = norm_rows("l1", scope, (x.abs() - middle).clamp_min(0.0)) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    inside = norm_rows("l1", scope, x) <= radius
    return torch.where(inside, x, x.sign() * (x.abs() - high).clamp_min(0.0))


def ascend(noise: Tensor, grad: Tensor, update: str, kind: str, scope: str, step_size: float, epsilon: float,
           mask: Tensor | None, unit: Tensor | None = None) -> Tensor:  # fmt: skip
    """The next noise, float64: non-finite gradient rows count as zero, masked rows get none, nor those of unit 0."""
    noise, grad = noise.double(), grad.double()
    unit = torch.ones_like(noise[..., :1]) if unit is None else unit.double()
    finite = grad.isfinite().all(-1, keepdim=True)
    if mask is not None:
        finite = finite & mask.unsqueeze(-1)
        noise, unit = (torch.where(mask.unsqueeze(-1), each, 0.0) for each in (noise, unit))
    grad = torch.where(finite, grad, 0.0)
    if update == "paper":
        norm = norm_rows(kind, scope, grad)
        step = noise + step_size * unit * torch.where(norm > 0, grad / norm, 0.0)
        return unit * ball_projection(kind, scope, torch.where(unit > 0, step / unit, 0.0), epsilon)
    if update == "sign":
        return torch.minimum(torch.maximum(noise + step_size * unit * grad.sign(), -epsilon * unit), epsilon * unit)
    if update == "sift":
        step = unit * grad / (norm_rows(kind, scope, grad) + epsilon * unit)
        moved = noise + step_size * torch.where(unit > 0, step, 0.0)
    else:
        step = noise + step_size * unit * grad
        size = norm_rows(kind, scope, step) + epsilon * unit
        moved = torch.where(size > 0, step / size, 0.0)
    return moved if mask is None else torch.where(mask.unsqueeze(-1), moved, 0.0)


def projected_divergence(
    kind: str, alpha: float, given: dict[str, Tensor], reduction: str, upstream: Tensor | None = None,
    mask: Tensor | None = None, temperature: float = 1.0, scale: float = 1.0, cap: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss of projected hidden states, ``"loss"``, and its gradient to each of ``given``: input, target, weight and
    bias, and target_weight and target_bias if the target has its own. From whole logits, ``scale`` times what is
    projected, behind a softcap ``cap``, whose derivative is 1 / cosh**2."""
    plain = {name: each.detach().double().cpu() for name, each in given.items()}
    shared = "target_weight" not in plain
    prefixes = ("", "" if shared else "target_")
    raw = [scale * torch.nn.functional.linear(plain[side], plain[f"{prefix}weight"], plain.get(f"{prefix}bias"))
           for side, prefix in zip(("input", "target"), prefixes, strict=True)]  # fmt: skip
    slopes = [scale / temperature * (torch.ones_like(a) if cap is None else torch.cosh(a / cap) ** -2) for a in raw]
    x, t = ((a if cap is None else cap * torch.tanh(a / cap)) / temperature for a in raw)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
    divisor = {"batchmean": x.shape[0], "mean": max(1, int(keep.sum())) * x.shape[-1]}.get(reduction, 1)
    factor = temperature**2 / divisor
    rows = factor * torch.where(keep, divergence_rows(kind, x, t, alpha), 0.0)
    g = torch.ones(()) if upstream is None else upstream.cpu()
    g = torch.where(keep, g.double().expand(keep.shape), 0.0).unsqueeze(-1)
    to_logits = divergence_grads(kind, x, t, alpha, torch.ones(1, dtype=torch.float64))
    found = {"loss": rows if reduction == "none" else rows.sum()}
    for grad, slope, side, prefix in zip(to_logits, slopes, ("input", "target"), prefixes, strict=True):
        grad = factor * g * grad * slope
        found[side] = grad @ plain[f"{prefix}weight"]
        flat, hidden = (each.reshape(-1, each.shape[-1]) for each in (grad, plain[side]))
        for name, value in ((f"{prefix}weight", flat.T @ hidden), (f"{prefix}bias", flat.sum(0))):
            found[name] = found[name] + value if name in found else value
    return found
