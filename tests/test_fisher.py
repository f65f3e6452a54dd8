"""``ascent="fisher"``: the vector-Jacobian product, through the public API, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from smart_fast import SMARTLoss, inf_norm, kl_loss, sym_kl_loss
from smart_fast.ascent import fisher
from smart_fast.ascent.base import Passes

PAPER = {"update": "paper", "noise_var": 1e-3, "step_size": 0.1, "epsilon": 0.05}


def through(eval_fn, embeds):
    """The direction at ``embeds``, from a clean pass made here."""
    passes = Passes(eval_fn, None, embeds, eval_fn(*embeds))
    return fisher.Fisher(eval_fn).gradients(passes, embeds)


def model(classes=5):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, classes))


def perturbed_embedding(smart_of, net, embed):
    """What the final pass is given, and the loss."""
    seen = []

    def eval_fn(x):
        seen.append(x.detach())
        return net(x)

    loss = smart_of(eval_fn)(embed, net(embed))
    return seen[-1], loss


def test_direction_does_not_cancel():
    logits = torch.tensor([[30.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    exact = logits.double().softmax(-1)
    exact[torch.arange(3), logits.argmax(-1)] -= 1
    torch.testing.assert_close(fisher.direction(logits).double(), exact, rtol=1e-6, atol=1e-15)
    assert fisher.direction(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_step_along_the_product(backend):
    """One step from almost no noise, of norm 0.05 in every token: the sign of the product."""
    net, embed = model(), torch.randn(3, 4, 6, requires_grad=True)
    settings = {**PAPER, "noise_var": 1e-8, "epsilon": 1.0, "step_size": 0.05}
    moved, loss = perturbed_embedding(
        lambda f: SMARTLoss(f, kl_loss, sym_kl_loss, ascent="fisher", backend=backend, **settings), net, embed
    )
    exact, x = copy.deepcopy(net).double(), embed.detach().double().requires_grad_()
    q = exact(x).softmax(-1).detach()
    vector = q - nn.functional.one_hot(q.argmax(-1), q.shape[-1])
    (product,) = torch.autograd.grad(exact(x), x, vector)
    expected = x.detach() + 0.05 * product / product.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(moved.double(), expected, rtol=0, atol=1e-6)

    loss.backward()
    assert embed.grad.abs().sum() > 0


def test_several_states_and_embeddings():
    first, second = model(), model(3)
    embeds = tuple(torch.randn(4, 6, requires_grad=True) for _ in range(2))

    def eval_fn(a, b):
        return {"a": first(a) + first(b), "b": second(b)}

    smart = SMARTLoss(eval_fn, {"a": kl_loss, "b": kl_loss}, ascent="fisher", **PAPER)
    found = through(eval_fn, embeds)
    alone = through(lambda b: second(b), embeds[1:])
    both = through(lambda a, b: first(a) + first(b), embeds)
    torch.testing.assert_close(found[0], both[0])
    torch.testing.assert_close(found[1], both[1] + alone[0])
    smart(embeds, eval_fn(*embeds)).backward()
    assert all(each.grad.isfinite().all() for each in embeds)


def test_evaluation_makes_a_graph_of_its_own():
    net, embed = model(), torch.randn(4, 6)
    smart = SMARTLoss(net, kl_loss, ascent="fisher", **PAPER)
    with torch.no_grad():
        loss = smart(embed, net(embed))
    assert loss > 0
    assert not loss.requires_grad


def test_no_gradients_of_parameters_are_left():
    net, embed = model(), torch.randn(4, 6, requires_grad=True)
    SMARTLoss(net, kl_loss, ascent="fisher", **PAPER)(embed, net(embed))
    assert embed.grad is None
    assert all(each.grad is None for each in net.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_clean_graph_is_kept(checkpointed):
    net, embed = model(), torch.randn(4, 6, requires_grad=True)
    state = checkpoint(net, embed, use_reentrant=False) if checkpointed else net(embed)
    loss = state.square().sum() + SMARTLoss(net, kl_loss, sym_kl_loss, ascent="fisher", **PAPER)(embed, state)
    loss.backward()
    assert embed.grad.isfinite().all()


@pytest.mark.exhaustive
def test_compiled_step():
    net, embed = model(), torch.randn(4, 6, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, ascent="fisher", backend="torch", **PAPER)

    def step(embed):
        return smart(embed, net(embed))

    def gradients(function):
        torch.manual_seed(1)
        return torch.autograd.grad(function(embed), [embed, *net.parameters()])

    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):
        for ours, eager in zip(
            gradients(torch.compile(step, fullgraph=True)), gradients(step), strict=True
        ):  # fmt: skip
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_fp16_gradients_do_not_underflow():
    """A product of 1e-9, which float16 does not hold, gives the direction that float32 gives."""

    class Faint(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(6, 5).to(dtype))

        def forward(self, x):
            return (x * 1e-3) @ (self.weight * 1e-3)

    embed = torch.randn(3, 6)
    found = []
    for dtype in (torch.float32, torch.float16):
        net, x = Faint(dtype), embed.to(dtype).requires_grad_()
        found.append(through(net, [x])[0].float())
    assert found[1].abs().max() > 0
    cosine = nn.functional.cosine_similarity(*found, dim=-1)
    assert (cosine > 0.99).all()
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.05, atol=0)


def test_a_step_costs_seven_ninths():
    """Plain fine-tuning costs 3 F, the default 8 F, with the product instead of perturbed passes 7 F."""
    weights = [(torch.randn(64, 64) / 8).requires_grad_() for _ in range(12)]

    def net(x):
        for weight in weights:
            x = F.linear(x, weight)
        return x

    def flops(**settings):
        embed = torch.randn(8, 64, requires_grad=True) * 1.0  # no leaf: hooks of the counter
        with FlopCounterMode(display=False) as counter:
            state = net(embed)
            loss = state.square().sum()
            if settings:
                loss = loss + SMARTLoss(net, kl_loss, sym_kl_loss, **settings)(embed, state)
            loss.backward()
        return counter.get_total_flops()

    plain = flops()
    assert flops(ascent="perturbed") == pytest.approx(8 / 3 * plain, rel=0.01)
    assert flops(ascent="fisher") == pytest.approx(7 / 3 * plain, rel=0.01)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("frozen", ValueError, "embed does not require grad"),
        ("detached", ValueError, "state has no graph"),
        ("of another", ValueError, "state does not depend on it"),
        ("one class", ValueError, "two classes or more"),
        ("no tensor", TypeError, "state must be a tensor"),
    ],
)
def test_errors_are_clear(case, error, message):
    net, embed = model(1 if case == "one class" else 5), torch.randn(4, 6, requires_grad=case != "frozen")
    state = net(embed.detach().clone() if case == "of another" else embed)
    state = {"detached": state.detach(), "no tensor": [object()]}.get(case, state)
    loss_fn = [kl_loss] if case == "no tensor" else kl_loss
    with pytest.raises(error, match=message):
        SMARTLoss(net, loss_fn, ascent="fisher", **PAPER)(embed, state)


def test_one_step_only():
    with pytest.raises(ValueError, match="num_steps must be 0 or 1, got 2"):
        SMARTLoss(model(), kl_loss, ascent="fisher", num_steps=2)
    smart = SMARTLoss(model(), kl_loss, None, inf_norm, 0, ascent="fisher")
    assert smart(torch.randn(2, 6), torch.randn(2, 5)) >= 0  # without a step nothing is differentiated
