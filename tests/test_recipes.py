"""Recipes against their papers' formulas, written out here in float64, ten lines each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart_fast import SMARTLoss, kl_loss, perturbation, recipes, sym_kl_loss
from smart_fast.noise import NOISES
from smart_fast.recipes import uniform_within

pytestmark = pytest.mark.usefixtures("pytorch_by_default")

FOR_SMART = ("ALUM", "R3F", "R3F_UNIFORM", "RECOMMENDED", "R_DROP", "SIFT", "SMART_PAPER", "VAT")
FOR_PERTURBATION = ("CAT", "FREELB", "LAT", "NEFTUNE", "TRADES")
B, S, D, V = 3, 4, 8, 5


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, V)).double()


def data() -> tuple[Tensor, Tensor]:
    return torch.rand(B, S, D, dtype=torch.float64), torch.randint(V, (B, S))


def drawn(kind: str, like: Tensor) -> Tensor:
    """The noise that the next call will draw."""
    state = torch.get_rng_state()
    noise = NOISES[kind](like, None)
    torch.set_rng_state(state)
    return noise


def gradient(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_of(x), x)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q), summed."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()


def close(found: Tensor, want: Tensor) -> None:
    assert (found - want).norm() <= 1e-5 * want.norm()


def test_every_recipe_is_for_a_tool() -> None:
    functions = {"half_sym_kl", "uniform_within"}
    assert {*FOR_SMART, *FOR_PERTURBATION} | functions == set(recipes.__all__)
    for name in FOR_SMART:
        assert set(getattr(recipes, name)) <= set(inspect.signature(SMARTLoss).parameters)
    for name in FOR_PERTURBATION:
        assert set(getattr(recipes, name)) <= set(inspect.signature(perturbation).parameters)
    with pytest.raises(TypeError):
        recipes.SIFT["num_steps"] = 3


# ---- SMARTLoss: what eval_fn is given at last ------------------------------------------------------------------------


def seen_by(net: nn.Module, embed: Tensor, name: str, last: Callable[..., Tensor], **changes: float) -> tuple[Any, Any]:
    """The noise of the last pass, and the regularizer."""
    seen = []

    def eval_fn(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return net(x)

    loss = SMARTLoss(eval_fn, kl_loss, last, **{**getattr(recipes, name), **changes})(embed, net(embed))
    return seen[-1] - embed.detach(), loss


def inf(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def smart_paper(g: Tensor, noise: Tensor, embed: Tensor) -> Tensor:
    """Jiang et al., 2020, Algorithm 1: a step of length eta along g / |g|, projected onto the ball."""
    return (1e-5 * noise + 1e-3 * g / inf(g)).clamp(-1e-5, 1e-5)


def sift(g: Tensor, noise: Tensor, embed: Tensor) -> Tensor:
    """DeBERTa's SiFT: normalized embeddings, noise + eta g / (|g| + eps)."""
    unit = embed.square().mean(-1, keepdim=True).sqrt()
    return 1e-2 * unit * noise + 1e-4 * unit * g / (inf(g) + 1e-6 * unit)


def alum(g: Tensor, noise: Tensor, embed: Tensor) -> Tensor:
    """Liu et al., 2020, and its code: normalized after the step."""
    moved = 1e-5 * noise + 1e-3 * g
    return moved / (inf(moved) + 1e-5)


def vat(g: Tensor, noise: Tensor, embed: Tensor) -> Tensor:
    """Miyato et al., 2017, equation 8: eps g / |g| of a sentence as one vector, here from small random noise."""
    moved = 1e-3 * noise + 5 * g / g.flatten(1).norm(dim=1)[:, None, None]
    return moved * (5 / moved.flatten(1).norm(dim=1)[:, None, None]).clamp(max=1.0)


@pytest.mark.parametrize(("name", "rule"), [("SMART_PAPER", smart_paper), ("SIFT", sift), ("ALUM", alum), ("VAT", vat)])
def test_ascents(name: str, rule: Callable[..., Tensor]) -> None:
    net, (embed, _) = model(), data()
    noise, clean = drawn("normal", embed), net(embed).detach()
    unit = embed.square().mean(-1, keepdim=True).sqrt() if name == "SIFT" else 1.0
    start = embed + recipes.__dict__[name]["noise_var"] * unit * noise
    g = gradient(lambda x: kl(clean, net(x)) / B, start)
    found, loss = seen_by(net, embed, name, sym_kl_loss)
    want = rule(g, noise, embed)
    close(found, want)
    close(loss, kl(clean, net(embed + want)) + kl(net(embed + want), clean))


@pytest.mark.parametrize(("name", "kind"), [("R3F", "normal"), ("R3F_UNIFORM", "uniform")])
def test_r3f(name: str, kind: str) -> None:
    """Aghajanyan et al., 2021: z ~ N(0, sigma^2) or U(-sigma, sigma), the symmetric KL of f(x + z) and f(x)."""
    net, (embed, _) = model(), data()
    z = 1e-5 * drawn(kind, embed) / (3**0.5 if kind == "uniform" else 1.0)
    found, _ = seen_by(net, embed, name, sym_kl_loss)
    assert kind == "normal" or 0.9e-5 < float(z.abs().max()) <= 1e-5
    close(found, z)
    with torch.no_grad():  # of larger noise, since differences of logarithms cancel in float64, too
        z = 1e3 * 1e-5 * drawn(kind, embed) / (3**0.5 if kind == "uniform" else 1.0)
        _, loss = seen_by(net, embed, name, sym_kl_loss, noise_var=1e3 * recipes.__dict__[name]["noise_var"])
        p, q = net(embed + z), net(embed)
        close(loss, kl(p, q) + kl(q, p))


def test_r_drop() -> None:
    """Liang et al., 2021, equation 2: (KL(p1 || p2) + KL(p2 || p1)) / 2 of two dropout masks, gradients to both."""
    net, (embed, _) = nn.Sequential(model(), nn.Dropout(0.3)), data()
    clean = net(embed)
    state = torch.get_rng_state()
    _ = torch.empty_like(embed).normal_()  # of which none is added
    second = net(embed)
    want = (kl(clean, second) + kl(second, clean)) / 2 / B
    want_grads = torch.autograd.grad(want, list(net.parameters()), retain_graph=True)
    torch.set_rng_state(state)
    loss = SMARTLoss(net, kl_loss, recipes.half_sym_kl, **recipes.R_DROP)(embed, clean)
    close(loss, want)
    for got, grad in zip(torch.autograd.grad(loss, list(net.parameters())), want_grads, strict=True):
        assert (got - grad).norm() <= 1e-5 * max(float(each.norm()) for each in want_grads)


# ---- perturbation ----------------------------------------------------------------------------------------------------


def test_neftune() -> None:
    """Jain et al., 2024, Algorithm 1: X + alpha / sqrt(L d) U(-1, 1)."""
    net, (embed, _) = model(), data()
    want = embed + 5 / (S * D) ** 0.5 * drawn("uniform", embed) / 3**0.5
    found = perturbation(net, embed, noise_var=uniform_within(5, embed), **recipes.NEFTUNE)
    close(found.perturbed - embed, want - embed)
    assert 0.9 < float(found.noise.abs().max()) / (5 / (S * D) ** 0.5) <= 1.0


def test_trades() -> None:
    """Zhang et al., 2019, Algorithm 1: x <- clamp(clip(x + eta sign(g), X +- eps), 0, 1), also the first point."""
    net, (embed, _) = model(), data()
    clean = net(embed).detach()
    x = (embed + 1e-3 * drawn("normal", embed)).clamp(0, 1)
    for _ in range(10):
        x = x + 0.003 * gradient(lambda each: kl(clean, net(each)), x).sign()
        x = torch.minimum(torch.maximum(x, embed - 0.031), embed + 0.031).clamp(0, 1)
    found = perturbation(lambda each: kl_loss(net(each), clean), embed, **recipes.TRADES)
    close(found.perturbed - embed, x - embed)
    assert (found.losses[-1] > found.losses[0]).all()


def test_freelb() -> None:
    """Zhu et al., 2020, Algorithm 1: the mean over the points of an ascent of the gradients of parameters."""
    net, (embed, labels) = model(), data()

    def loss_of(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x).flatten(0, 1), labels.flatten())

    def length(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)[:, None, None]

    delta = 0.32 / (S * D) ** 0.5 * drawn("uniform", embed) / 3**0.5
    total = [torch.zeros_like(each) for each in net.parameters()]
    for t in range(3):
        grads = torch.autograd.grad(loss_of(embed + delta) / 3, list(net.parameters()))
        total = [a + b for a, b in zip(total, grads, strict=True)]
        g = gradient(loss_of, embed + delta)
        if t < 2:
            delta = delta + 0.2 * g / length(g)
            delta = delta * (0.7 / length(delta)).clamp(max=1.0)
    found = perturbation(loss_of, embed, noise_var=uniform_within(0.32, embed), **recipes.FREELB)
    (loss_of(found.perturbed) / 3).backward()
    close(found.noise, delta)
    for each, want in zip(net.parameters(), total, strict=True):
        close(each.grad, want)


def test_lat() -> None:
    """Sheshadri et al., 2024: AdamW descends the loss of the target on delta, |delta| <= eps for each token."""
    net, (embed, target) = model(), data()
    prompt = torch.arange(S) < 3

    def loss_of(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x).flatten(0, 1), target.flatten())

    settings = {**recipes.LAT, "epsilon": 0.1}
    delta = torch.zeros_like(embed, requires_grad=True)
    adam = torch.optim.AdamW([delta], lr=1e-2)
    for _ in range(16):
        delta.grad = torch.where(prompt[:, None], gradient(loss_of, embed + delta.detach()), 0.0)
        adam.step()
        delta.data.mul_((0.1 / delta.data.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0))
    found = perturbation(loss_of, embed, mask=prompt.expand(B, S), **settings)
    close(found.noise, delta.detach())
    assert found.losses[-1] < found.losses[0]
    assert float(found.noise.norm(dim=-1).max()) == pytest.approx(0.1)


def test_cat() -> None:
    """Xhonneux et al., 2024: delta <- delta - alpha sign(g) toward the target, on the prompt, in the ball."""
    net, (embed, target) = model(), data()
    prompt = torch.arange(S) < 3

    def loss_of(x: Tensor) -> Tensor:
        return F.cross_entropy(net(x).flatten(0, 1), target.flatten())

    unit = embed.square().mean(-1, keepdim=True).sqrt() * prompt[:, None]
    delta = torch.zeros_like(embed)
    for _ in range(10):
        delta = delta - 0.01 * unit * gradient(loss_of, embed + delta).sign()
        delta = torch.minimum(torch.maximum(delta, -0.05 * unit), 0.05 * unit)
    found = perturbation(loss_of, embed, mask=prompt.expand(B, S), **recipes.CAT)
    close(found.noise, delta)
    assert (found.noise.norm(dim=-1) <= 0.05 * embed.norm(dim=-1) * (1 + 1e-12)).all()  # inside of the paper's ball
    assert found.losses[-1] < found.losses[0]
