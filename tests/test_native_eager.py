"""What eager mode calls of the native backend: operators and the engine without what Python adds to them."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from smart_fast import SMARTLoss, js_loss, kl_loss, sym_kl_loss
from smart_fast.backends.base import DivergenceSpec

LOSSES = {"kl": kl_loss, "sym_kl": sym_kl_loss, "js": js_loss}


class Odd(torch.Tensor):
    """A subclass without rules of its own."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("kind", LOSSES)
def test_short_way_is_the_long_way(native, kind, reduction, dtype):
    torch.manual_seed(0)
    x, t = (torch.randn(3, 4, 10).to(dtype).requires_grad_() for _ in range(2))
    count = {"sum": 1, "mean": x.numel(), "batchmean": 3}[reduction]
    short = native.plain_divergence(x, t, kind, reduction, 1.0)
    long = native.divergence(x, t, DivergenceSpec(kind, "sum", 1.0, 1.0 / count), None)
    assert torch.equal(short, long)
    for ours, theirs in zip(torch.autograd.grad(short, (x, t)), torch.autograd.grad(long, (x, t)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "given",
    [
        (torch.zeros(2, 3).as_subclass(Odd), torch.zeros(2, 3), "kl", "sum", 1.0),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), "kl", "sum", 1.0),
        (torch.zeros(2, 3), torch.zeros(1, 3), "kl", "sum", 1.0),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), "kl", "sum", 1.0),
        (torch.zeros(0, 3), torch.zeros(0, 3), "kl", "sum", 1.0),
        (torch.zeros(()), torch.zeros(()), "kl", "sum", 1.0),
        (torch.zeros(2, 3), [0.0], "kl", "sum", 1.0),
        (torch.zeros(2, 3), torch.zeros(2, 3), "kl", "none", 1.0),
        (torch.zeros(2, 3), torch.zeros(2, 3), "kl", "sum", math.inf),
    ],
)
def test_short_way_leaves_the_rest_to_python(native, given):
    assert native.plain_divergence(*given) is None


def test_gradients_to_tensors_as_they_were(native):
    x = torch.randn(3, requires_grad=True) * 1.0
    unused = torch.randn(3, requires_grad=True) * 1.0
    edges = [native.extension.edge(each) for each in (x, unused)]
    before = x.detach().clone()
    x.mul_(2.0)
    found = native.extension.gradients(x.square().sum(), edges)
    assert torch.equal(found[0], 8 * before)
    assert found[1] is None


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise LookupError("refused")


def test_errors_of_a_backward_pass_keep_their_type(native):
    smart = SMARTLoss(Refuses.apply, kl_loss, backend="native")
    with pytest.raises(LookupError, match="refused"):
        smart(torch.randn(2, 3), torch.randn(2, 3))


def test_python_in_the_backward_pass(native):
    """Checkpoints and hooks take Python's lock, which the engine must not hold."""
    weight, seen = torch.randn(3, 3, requires_grad=True), []

    def eval_fn(x):
        x.register_hook(seen.append)
        return checkpoint(lambda y: (y @ weight).tanh(), x, use_reentrant=False)

    smart = SMARTLoss(eval_fn, kl_loss, backend="native")
    results = []
    thread = threading.Thread(target=lambda: results.append(smart(torch.randn(2, 3), torch.randn(2, 3))))
    thread.start()
    thread.join(60)
    assert results
    assert len(seen) == 1
    assert weight.grad is None


def test_saved_tensors_are_torchs(native):
    """Hooks on saved tensors see what a loss keeps, changed logits are noticed, and a graph is used once."""
    x, t = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kl_loss(x, t, backend="native")
    assert packed == [x.shape, t.shape]
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

    loss = kl_loss(x, t, backend="native")
    t.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_nodes_have_names(native):
    embed = torch.randn(2, 3, requires_grad=True)
    loss = SMARTLoss(lambda x: x, kl_loss, backend="native")(embed, torch.randn(2, 3))
    assert loss.grad_fn.name() == "SmartFastDivergence"
    assert loss.grad_fn.next_functions[0][0].name() == "SmartFastShift"


@pytest.mark.parametrize("loss", [kl_loss, sym_kl_loss, js_loss], ids=lambda loss: loss.__name__)
def test_default_losses_are_what_they_are_behind_a_function(native, loss):
    """`SMARTLoss` calls the operator for losses that it knows; of a function around one it knows nothing."""
    net = torch.nn.Linear(6, 5)
    embed = torch.randn(7, 6, requires_grad=True)

    def found(loss_fn):
        torch.manual_seed(1)
        value = SMARTLoss(net, loss_fn, backend="native")(embed, net(embed))
        return value, *torch.autograd.grad(value, [embed, *net.parameters()])

    for ours, around in zip(found(loss), found(lambda input, target: loss(input, target)), strict=True):
        assert torch.equal(ours, around)
