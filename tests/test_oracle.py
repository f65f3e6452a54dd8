"""The float64 oracles themselves, against definitions evaluated in 50-digit arithmetic."""

from __future__ import annotations

import mpmath
import pytest
import torch

from bench import accuracy
from tests import oracle


def definition(kind: str, x: list[float], t: list[float], alpha: float) -> mpmath.mpf:
    """The divergence of one row, by smart-pytorch's definition."""

    def softmax(logits: list[float]) -> list[mpmath.mpf]:
        weights = [mpmath.exp(mpmath.mpf(v)) for v in logits]
        return [w / mpmath.fsum(weights) for w in weights]

    def kl(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.fsum(u * mpmath.log(u / v) for u, v in zip(a, b, strict=True))

    p, q = softmax(x), softmax(t)
    if kind == "kl":
        return kl(q, p)
    if kind == "sym_kl":
        return alpha * kl(q, p) + kl(p, q)
    if kind == "jsd":
        m = [alpha * v + (1 - alpha) * u for u, v in zip(p, q, strict=True)]
        return alpha * kl(q, m) + (1 - alpha) * kl(p, m)
    m = [(u + v) / 2 for u, v in zip(p, q, strict=True)]
    return alpha * (kl(m, p) + kl(m, q))


@pytest.mark.parametrize("apart", [1e-7, 1e-5, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js", "jsd"])
def test_divergences(kind: str, apart: float) -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(3, 17, generator=generator, dtype=torch.float64)
    x = t + apart * torch.randn(3, 17, generator=generator, dtype=torch.float64)
    with mpmath.workdps(50):
        exact = [float(definition(kind, *rows, 0.7)) for rows in zip(x.tolist(), t.tolist(), strict=True)]
    # A difference of 1e-7 is itself known to nine digits only.
    tolerance = 1e-12 if apart > 1e-4 else 1e-8
    got = oracle.divergence_rows(kind, x, t, 0.7)
    assert oracle.relative_error(got, torch.tensor(exact, dtype=torch.float64)) < tolerance


@pytest.mark.parametrize("apart", [1e-5, 1.0])
@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js"])
def test_reference_of_the_bench(kind: str, apart: float) -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(3, 100, generator=generator)
    x = t + apart * torch.randn(3, 100, generator=generator)
    loss, gradient = accuracy.exact(kind, x, t)
    assert oracle.relative_error(loss, oracle.divergence_rows(kind, x, t, 1.0)) < 1e-10
    assert oracle.relative_error(gradient, oracle.divergence_grads(kind, x, t, 1.0, torch.ones(1))[0]) < 1e-10


@pytest.mark.parametrize("apart", [1e-5, 1.0])
@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js", "jsd"])
def test_terms_and_gradients(kind: str, apart: float) -> None:
    """Against autograd of the definition in float64, any upstream gradient, smart-pytorch's detachments."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    x = (t + apart * torch.randn(4, 9, generator=generator, dtype=torch.float64)).detach().requires_grad_()
    p, q = x.softmax(-1), t.softmax(-1)
    log_p, log_q = x.log_softmax(-1), t.log_softmax(-1)
    m = 0.7 * q + 0.3 * p
    terms = {
        "kl": lambda: q * (log_q - log_p),
        "sym_kl": lambda: 0.7 * q.detach() * (log_q.detach() - log_p) + p.detach() * (log_p.detach() - log_q),
        "js": lambda: 0.7 * ((p + q) / 2).detach() * (2 * ((p + q) / 2).detach().log() - log_p - log_q),
        "jsd": lambda: 0.7 * q * (log_q - m.log()) + 0.3 * p * (log_p - m.log()),
    }[kind]()
    alpha = 1.0 if kind == "kl" else 0.7
    # Terms of jsd are of the size of the difference squared, which is what its definition loses in float64.
    tolerance = 1e-4 if kind == "jsd" else 1e-5
    assert oracle.relative_error(oracle.divergence_terms(kind, x.detach(), t.detach(), alpha), terms) < tolerance
    for upstream in (torch.ones(4, 9), torch.rand(4, 9, generator=generator), torch.rand(4, 1).expand(4, 9)):
        want = torch.autograd.grad(terms, (x, t), upstream.double(), retain_graph=True)
        got = oracle.divergence_grads(kind, x.detach(), t.detach(), alpha, upstream)
        for value, reference in zip(got, want, strict=True):
            assert oracle.relative_error(value, reference) < 1e-9
