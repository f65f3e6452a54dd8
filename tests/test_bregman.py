"""`BregmanProximal`: the teacher is the average it says, restrains the student only, and resumes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smart_fast import BregmanProximal, SMARTLoss, kl_loss, paper_beta, sym_kl_loss


def model(classes=4):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, classes))


def train(net, proximal, steps, start=0):
    """SGD on data of their own for each step; the losses."""
    losses = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        x, labels = torch.randn(8, 6).to(next(net.parameters())), torch.randint(4, (8,))
        logits = net(x)
        loss = F.cross_entropy(logits, labels) + proximal(logits, x)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
        proximal.update()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("beta", [0.9, 0.0, 1.0, paper_beta(20)])
def test_teacher_is_the_closed_form(beta):
    net = model().double()
    proximal = BregmanProximal(net, beta=beta)
    expected = [each.detach().clone() for each in proximal.teacher.parameters()]
    for step in range(5):
        train(net, proximal, 1, step)
        now = beta(step) if callable(beta) else beta
        expected = [now * e + (1 - now) * p.detach() for e, p in zip(expected, net.parameters(), strict=True)]
        for ours, exact in zip(proximal.teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert proximal.steps == 5


def test_fp32_average_to_1e_7():
    net = model()
    proximal, exact = BregmanProximal(net, beta=0.99), [each.detach().double() for each in net.parameters()]
    proximal.teacher  # noqa: B018
    for step in range(30):
        train(net, proximal, 1, step)
        exact = [0.99 * e + 0.01 * p.detach().double() for e, p in zip(exact, net.parameters(), strict=True)]
    for ours, e in zip(proximal.teacher.parameters(), exact, strict=True):
        assert (ours - e).abs().max() < 1e-7 * max(1.0, float(e.abs().max()))


def test_schedule_of_the_paper():
    beta = paper_beta(100)
    assert [beta(step) for step in (0, 9, 10, 99)] == [0.99, 0.99, 0.999, 0.999]


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_gradient_by_hand(backend):
    """Both divergences, to the student alone, without dropout in the teacher."""
    net, x = model(), torch.randn(5, 6)
    proximal = BregmanProximal(net, mu=0.7, backend=backend)
    with torch.no_grad():
        for parameter in proximal.teacher.parameters():
            parameter += 0.1
    net.eval()
    logits = net(x)
    loss = proximal(logits, x)
    gradients = torch.autograd.grad(loss, list(net.parameters()))

    exact = copy.deepcopy(net).double()
    p = exact(x.double()).log_softmax(-1)
    q = copy.deepcopy(proximal.teacher).double()(x.double()).log_softmax(-1).detach()
    expected = 0.7 * ((p.exp() - q.exp()) * (p - q)).sum() / 5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(exact.parameters())), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-7)


def test_teacher_has_no_graph_and_is_nobodys_parameter():
    net, x = model(), torch.randn(5, 6)
    proximal = BregmanProximal(net)
    logits = net(x)
    proximal(logits, x).backward()
    proximal.train()
    assert not proximal.teacher.training
    assert not any(module.training for module in proximal.teacher.modules())
    assert not list(proximal.parameters())
    assert all(not each.requires_grad and each.grad is None for each in proximal.teacher.parameters())
    assert all(each.grad is not None for each in net.parameters())


@pytest.mark.parametrize("other", ["state_dict", "deepcopy", "pickle"])
def test_resumes_bit_for_bit(other):
    torch.manual_seed(0)
    net = model()
    proximal = BregmanProximal(net, beta=paper_beta(30))
    train(net, proximal, 6)
    if other == "state_dict":
        again = model()
        resumed = BregmanProximal(again, beta=paper_beta(30))
        again.load_state_dict(net.state_dict())
        resumed.load_state_dict(proximal.state_dict())
    elif other == "deepcopy":
        again, resumed = copy.deepcopy((net, proximal))
    else:
        again, resumed = pickle.loads(pickle.dumps((net, proximal)))
    assert resumed.model is again
    assert resumed.steps == 6
    assert torch.equal(train(net, proximal, 5, 6), train(again, resumed, 5, 6))
    for ours, theirs in zip(resumed.teacher.parameters(), proximal.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_several_outputs_regression_and_objects():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    net, x = model(2), torch.randn(5, 6)
    with torch.no_grad():
        expected = net.eval()(x)
    pair = BregmanProximal(net, loss_fn=[F.mse_loss, F.mse_loss], output_fn=lambda y: [y[:, :1], y[:, 1:]])
    assert pair(net(x) + 1.0, x).item() == pytest.approx(2.0, abs=1e-5)
    assert BregmanProximal(net, loss_fn=F.mse_loss)(Output(expected + 1.0), x).item() == pytest.approx(1.0, abs=1e-5)


def test_together_with_smart():
    net, x = model(), torch.randn(5, 6, requires_grad=True)
    smart, proximal = SMARTLoss(net, kl_loss, sym_kl_loss), BregmanProximal(net)
    logits = net(x)
    (smart(x, logits) + proximal(logits, x)).backward()
    assert list(SMARTLoss(net, kl_loss).state_dict()) == list(smart.state_dict())
    assert all(each.grad.isfinite().all() for each in net.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda net: BregmanProximal(net, beta=1.5), ValueError, r"beta must be in \[0, 1\], got 1.5"),
        (lambda net: BregmanProximal(net, beta="1"), TypeError, "beta"),
        (lambda net: BregmanProximal(net, mu=-1.0), ValueError, "mu must not be negative, got -1.0"),
        (lambda net: BregmanProximal(net.forward), TypeError, "model must be a Module"),
        (lambda net: BregmanProximal(net, reduction="none"), ValueError, "reduction"),
        (lambda net: BregmanProximal(net, backend="cuda"), ValueError, "backend"),
        (lambda net: BregmanProximal(net)(torch.zeros(5, 4)), TypeError, "the teacher needs inputs"),
        (lambda net: BregmanProximal(net)(torch.zeros(4, 4), torch.zeros(5, 6)), ValueError, "the teacher's shape"),
        (lambda net: BregmanProximal(net, beta=lambda step: 2.0).update(), ValueError, "beta must be in"),
        (lambda net: paper_beta(0), ValueError, "total_steps must be at least 1"),
    ],
)
def test_errors_are_clear(make, error, message):
    with pytest.raises(error, match=message):
        make(model())


def test_a_model_that_has_changed():
    net = model()
    proximal = BregmanProximal(net)
    proximal.update()
    net.append(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="must keep the teacher's parameters"):
        proximal.update()
