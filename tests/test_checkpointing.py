"""`checkpointed`: the same results, and one graph at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smart_fast import SMARTLoss, checkpointed, kl_loss, sym_kl_loss
from tests.helpers import same_bits

smart_pytorch = pytest.importorskip("smart_pytorch")


class Net(nn.Module):
    """Attention and wide layers, with dropout and BatchNorm."""

    def __init__(self, layers=4, width=64):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True) for _ in range(layers)
        )
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, embed, scale=1.0):
        for layer in self.layers:
            embed = layer(embed)
        return {"logits": self.head(self.norm(embed.mean(1))) * scale}


def step(net, embed, labels, clean, smart):
    state = clean(embed)["logits"]
    loss = F.cross_entropy(state, labels)
    if smart is not None:
        loss = loss + smart(embed, state)
    gradients = torch.autograd.grad(loss, [embed, *net.parameters()])
    return loss.detach(), gradients


def regularizer(net, kind=SMARTLoss):
    return kind(lambda x: net(x)["logits"], kl_loss, sym_kl_loss)


@pytest.fixture
def task():
    torch.manual_seed(0)
    return Net(), torch.randn(8, 32, 64, requires_grad=True), torch.randint(3, (8,))


def test_same_gradients_and_statistics(task):
    net, embed, labels = task
    other, found = copy.deepcopy(net), []
    for each, clean in ((net, net), (other, checkpointed(other))):
        for _ in range(2):  # the first call of SMARTLoss looks for reentrant checkpoints
            torch.manual_seed(1)
            result = step(each, embed, labels, clean, regularizer(each))
        found.append(result)
    assert same_bits(found[0][0], found[1][0])
    for plain, ours in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert int(other.norm.num_batches_tracked) == int(net.norm.num_batches_tracked)
    assert torch.equal(other.norm.running_mean, net.norm.running_mean)


def test_one_graph_at_a_time(task, capsys):
    """The peak of counted allocations, in units of plain fine-tuning's."""
    from bench.measure import peak_memory

    net, embed, labels = task
    theirs = smart_pytorch.SMARTLoss(lambda x: net(x)["logits"], smart_pytorch.kl_loss, smart_pytorch.sym_kl_loss)
    runs = {
        "plain": (net, None),
        "smart-pytorch": (net, theirs),
        "smart-fast": (net, regularizer(net)),
        "checkpointed": (checkpointed(net), regularizer(net)),
    }
    peaks = {}
    for name, (clean, smart) in runs.items():
        step(net, embed, labels, clean, smart)
        peaks[name] = peak_memory(
            lambda clean=clean, smart=smart: step(net, embed, labels, clean, smart), (), torch.device("cpu")
        )
    relative = {name: peak / peaks["plain"] for name, peak in peaks.items()}
    with capsys.disabled():
        print("\npeak memory of a step:", *(f"{name} {value:.2f}" for name, value in relative.items()))
    assert relative["smart-pytorch"] >= 1.8
    assert relative["checkpointed"] <= 1.35


def test_a_module_stays_one(task):
    net, embed, _ = task
    wrapped = checkpointed(net)
    assert list(wrapped.state_dict()) == list(net.state_dict())
    wrapped.load_state_dict(net.state_dict())
    outer = nn.ModuleDict({"clean": wrapped})
    assert list(outer.state_dict()) == [f"clean.{name}" for name in net.state_dict()]
    outer.load_state_dict(outer.state_dict())
    assert {id(each) for each in wrapped.parameters()} == {id(each) for each in net.parameters()}
    assert wrapped.norm is net.norm
    wrapped.eval()
    assert not net.training
    torch.testing.assert_close(wrapped(embed, scale=2.0)["logits"], 2 * net(embed)["logits"])
    copy.deepcopy(wrapped)(embed)


def test_functions_and_autocast(task):
    net, embed, _ = task
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = checkpointed(lambda x, scale: net(x, scale=scale)["logits"])(embed, scale=2.0)
        expected = net(embed, 2.0)["logits"]
    assert same_bits(found, expected)
    left, right = (torch.autograd.grad(each.float().square().sum(), embed)[0] for each in (found, expected))
    torch.testing.assert_close(left, right)


def test_as_eval_fn_of_smart(task):
    net, embed, _ = task
    net.eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)["logits"]

    plain, wrapped = Logits(), checkpointed(Logits())
    found = []
    for eval_fn in (plain, wrapped):
        torch.manual_seed(2)
        loss = SMARTLoss(eval_fn, kl_loss, sym_kl_loss)(embed, eval_fn(embed))
        found.append(torch.autograd.grad(loss, embed)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_errors_are_clear():
    with pytest.raises(TypeError, match="eval_fn must be callable, got int"):
        checkpointed(3)
