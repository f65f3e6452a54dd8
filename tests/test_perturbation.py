"""`smart_fast.perturbation`: the loop of SMARTLoss on any loss, its options, and the gradients that it accumulates."""

from __future__ import annotations

import inspect
import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smart_fast
from smart_fast import SMARTLoss, inf_norm, kl_loss, l2_norm, perturbation, sentence_norm
from smart_fast.ascent.climb import climb
from tests.helpers import Counting, exhaustively

SETTINGS = {"step_size": 0.1, "epsilon": 0.3, "noise_var": 0.05}


def model(width: int = 8, classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, classes))


def task(net: nn.Module, device: torch.device | str = "cpu") -> tuple[Tensor, Counting]:
    embed, labels = torch.randn(3, 4, 8, device=device), torch.randint(5, (3, 4), device=device)
    return embed, Counting(lambda x: F.cross_entropy(net(x).flatten(0, 1), labels.flatten()))


def test_one_screen() -> None:
    """The loop whole, the function but for its docstring."""
    assert len(inspect.getsource(climb).splitlines()) <= 60
    source = inspect.getsource(perturbation)
    assert len(source.splitlines()) - len(perturbation.__doc__.splitlines()) <= 60


@pytest.mark.parametrize("update", ["paper", *exhaustively("sign", "sift", "smart-pytorch")])
@pytest.mark.parametrize("noise", ["normal", *exhaustively("uniform")])
def test_smart_loss_is_this(update: str, noise: str, backend: ModuleType, device: torch.device) -> None:
    """Bit for bit: what SMARTLoss gives its model at last is what this finds for its divergence."""
    net = model().to(device)
    embed, mask = torch.randn(3, 4, 8, device=device), torch.rand(3, 4, device=device) < 0.7
    seen = []

    def eval_fn(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return net(x)

    clean = net(embed).detach()
    for num_steps, norm in ((0, inf_norm), (2, sentence_norm(l2_norm))):
        common = {"num_steps": num_steps, "update": update, "noise": noise, "scale": "relative", **SETTINGS}
        torch.manual_seed(5)
        SMARTLoss(eval_fn, kl_loss, norm_fn=norm, backend=backend.name, **common)(embed, clean, mask=mask)
        torch.manual_seed(5)
        found = perturbation(
            lambda x: kl_loss(net(x), clean), embed, norm=norm, mask=mask, backend=backend.name, **common
        )
        assert torch.equal(found.perturbed, seen[-1])
        assert len(found.losses) == num_steps
        assert not found.noise[~mask].any()
        torch.testing.assert_close(embed + found.noise, found.perturbed)


def test_climbs_and_descends() -> None:
    net = model()
    embed, loss_of = task(net)
    up = perturbation(loss_of, embed, num_steps=4, **SETTINGS)
    down = perturbation(loss_of, embed, num_steps=4, targeted=True, **SETTINGS)
    assert loss_of.calls == 8
    up_losses, down_losses = ([float(each) for each in found.losses] for found in (up, down))
    assert up_losses == sorted(up_losses)
    assert down_losses == sorted(down_losses, reverse=True)
    assert all(each.grad is None for each in net.parameters())
    last = loss_of.seen[3][0].requires_grad_()  # where the last step of the first climb started
    (want,) = torch.autograd.grad(loss_of.function(last), last)
    torch.testing.assert_close(up.gradients, want)


def test_gradients_pass_on_to_the_embedding() -> None:
    net = model()
    embed, loss_of = task(net)
    embed.requires_grad_()
    found = perturbation(loss_of, embed, **SETTINGS)
    assert not found.noise.requires_grad
    (got,) = torch.autograd.grad(loss_of(found.perturbed), embed)
    last = found.perturbed.detach().requires_grad_()
    (want,) = torch.autograd.grad(loss_of(last), last)
    torch.testing.assert_close(got, want)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.manual_seed(0)
            first = perturbation(loss_of, embed, **SETTINGS)
        assert not first.perturbed.requires_grad
        assert first.losses[0].isfinite()


def test_several_embeddings() -> None:
    net, one, two = model(), torch.randn(3, 4, 8), torch.randn(2, 8)
    found = perturbation(lambda a, b: net(a).sum() + net(b).square().sum(), (one, two), num_steps=2, **SETTINGS)
    assert [each.shape for each in found.perturbed] == [one.shape, two.shape]
    assert [each.shape for each in found.noise] == [each.shape for each in found.gradients] == [one.shape, two.shape]


@pytest.mark.parametrize("update", ["sign", "paper"])
def test_bounds(update: str, backend: ModuleType, device: torch.device) -> None:
    """Clamped after every step, and the next one starts from there; masked rows are as they were."""
    net = model().to(device)
    _, loss_of = task(net, device)
    image = torch.rand(3, 4, 8, device=device)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[0, 1] = False
    image[0, 1] = 7.0
    numbers = {"step_size": 0.3, "epsilon": 0.4, "noise_var": 0.2, "scale": "absolute"}
    found = perturbation(loss_of, image, num_steps=3, update=update, mask=mask, bounds=(0.0, 1.0), **numbers)
    for each in (*[seen[0] for seen in loss_of.seen], found.perturbed):
        assert torch.equal(each[0, 1], image[0, 1])
        assert 0.0 <= float(each[mask].min()) <= float(each[mask].max()) <= 1.0
    assert (found.perturbed[mask] == 1.0).any()
    assert (found.perturbed[mask] == 0.0).any()
    torch.testing.assert_close(image + found.noise, found.perturbed)
    assert float(found.noise.abs().max()) <= 0.4 * (1 + 1e-6)
    assert found.losses[-1] > found.losses[0]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, *exhaustively(torch.optim.Adam)])
def test_optimizers(optimizer: type[torch.optim.Optimizer]) -> None:
    net = model()
    embed, loss_of = task(net)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = False
    settings = {**SETTINGS, "norm": l2_norm, "scale": "absolute", "step_size": 0.0, "noise_var": 0.0}
    found = perturbation(
        loss_of, embed, num_steps=3, mask=mask, optimizer=lambda noise: optimizer(noise, lr=0.05), **settings
    )
    noise = torch.zeros_like(embed, requires_grad=True)
    by_hand = optimizer([noise], lr=0.05)
    for _ in range(3):
        at = (embed + noise.detach()).requires_grad_()
        noise.grad = -torch.autograd.grad(loss_of.function(at), at)[0] * mask.unsqueeze(-1)
        by_hand.step()
        noise.data.mul_((0.3 / noise.data.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1.0))
    torch.testing.assert_close(found.noise, noise.detach())
    with pytest.raises(ValueError, match="optimizer needs an update with a ball, 'paper' or 'sign', got 'sift'"):
        perturbation(loss_of, embed, update="sift", optimizer=lambda n: optimizer(n, lr=0.05), **settings)


# ---- gradients of parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, *exhaustively(0, 1, 3)])
def test_accumulated_gradients(num_steps: int) -> None:
    """Those of K + 1 separate passes, at one forward and one backward pass a point: of weights, of weights that are
    there twice, and of the table of embeddings, whose own graph runs once."""
    words, net, ids = nn.Embedding(20, 8), model(), torch.randint(20, (3, 4))
    parametrize.register_parametrization(net[0], "weight", nn.Softplus())
    labels = torch.randint(5, (3, 4))
    backward = []

    def loss_of(x: Tensor) -> Tensor:
        x.register_hook(lambda _: backward.append(None))
        logits = net(x) + (x @ words.weight.T)[..., :5]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    counted = Counting(loss_of)
    parameters = [*words.parameters(), *net.parameters()]
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 2:] = False
    embed = words(ids)
    runs = Counting(lambda grad: None)
    embed.grad_fn.register_hook(lambda *_: runs(None))
    found = perturbation(counted, embed, num_steps=num_steps, mask=mask, accumulate=True, **SETTINGS)
    (counted(found.perturbed) / (num_steps + 1)).backward()
    assert counted.calls == len(backward) == num_steps + 1
    assert runs.calls == 1
    got = [each.grad.clone() for each in parameters]

    for each in parameters:
        each.grad = None
    for (point,) in counted.seen:
        noise = (point - embed).detach()
        moved = torch.where(mask.unsqueeze(-1), words(ids) + noise, words(ids).detach())
        (loss_of(moved) / (num_steps + 1)).backward()
    for each, mine in zip(parameters, got, strict=True):
        assert (mine - each.grad).norm() <= 1e-6 * each.grad.norm()


def test_accumulating_needs_gradients() -> None:
    net = model()
    embed, loss_of = task(net)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are disabled"):
        perturbation(loss_of, embed, accumulate=True, **SETTINGS)


# ---- precision, compilers, errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: ModuleType, device: torch.device) -> None:
    """The direction of fp32, also where the gradients of the loss are too small for float16."""
    net = model().to(device)
    embed = torch.randn(3, 4, 8, device=device)
    half = model().to(device)
    half.load_state_dict(net.state_dict())
    half.to(dtype)
    settings = {**SETTINGS, "noise_var": 0.0}
    for scale in (1.0, 1e-6):
        found = perturbation(lambda x, by=scale: half(x).float().square().mean() * by, embed.to(dtype), **settings)
        want = perturbation(lambda x: net(x).square().mean(), embed, **settings)
        assert found.noise.dtype == torch.float32
        assert found.perturbed.dtype == dtype
        if scale == 1.0:
            assert float(F.cosine_similarity(found.noise.flatten(), want.noise.flatten(), dim=0)) > 0.98
        assert found.noise.any()


@pytest.mark.exhaustive
def test_compiles() -> None:
    net = model()
    embed, labels = torch.randn(3, 4, 8), torch.randint(5, (3, 4))

    def find(x: Tensor) -> Tensor:
        loss_of = lambda e: F.cross_entropy(net(e).flatten(0, 1), labels.flatten())  # noqa: E731
        return perturbation(loss_of, x, num_steps=2, backend="torch", **{**SETTINGS, "noise_var": 0.0}).perturbed

    torch.testing.assert_close(torch.compile(find, backend="aot_eager")(embed), find(embed))


def test_empty() -> None:
    found = perturbation(lambda x: x.sum(), torch.zeros(0, 4), **SETTINGS)
    assert found.perturbed.shape == found.noise.shape == (0, 4)


WRONG = {
    "loss_of must be callable": {"loss_of": 3},
    "loss_of must return a tensor": {"loss_of": lambda x: 3.0},
    "loss_of must return a scalar": {"loss_of": lambda x: x},
    "the loss has no graph": {"loss_of": lambda x: x.detach().sum()},
    "norm must be callable": {"norm": 3},
    "update must be one of .*'sign'": {"update": "other"},
    "noise must be one of .*'uniform'": {"noise": "other"},
    "epsilon, the radius of a ball, must not be negative": {"update": "sign", "epsilon": -1.0},
    "bounds must be a pair": {"bounds": (0.0,)},
    r"bounds must be a pair \(low, high\) or None": {"bounds": 1.0},
    r"bounds\[1\] must be finite": {"bounds": (0.0, math.inf)},
    "bounds must not have a low above its high": {"bounds": (1.0, 0.0)},
    r"bounds\[0\] must broadcast to embed, \(3, 4\), got shape \(3,\)": {"bounds": (torch.zeros(3), torch.ones(4))},
    "optimizer must be callable": {"optimizer": 3},
    "optimizer must make a torch.optim.Optimizer": {"optimizer": lambda noise: None},
    "targeted must be a bool": {"targeted": 1},
    "accumulate must be a bool": {"accumulate": 1},
    "num_steps must not be negative": {"num_steps": -1},
    "mask must have dtype torch.bool": {"mask": torch.ones(3)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors(message: str) -> None:
    settings = {"loss_of": lambda x: x.sum(), **SETTINGS, **WRONG[message]}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        perturbation(settings.pop("loss_of"), torch.randn(3, 4), **settings)


def test_smart_loss_takes_uniform_noise() -> None:
    seen = []
    settings = {"num_steps": 0, "noise_var": 0.1, "noise": "uniform", "backend": "torch"}
    smart = SMARTLoss(lambda x: seen.append(x.detach()) or x, kl_loss, **settings)
    embed = torch.zeros(50, 8)
    smart(embed, embed)
    assert 0.16 < float(seen[0].abs().max()) <= 0.1 * math.sqrt(3)
    smart.noise = "other"
    with pytest.raises(ValueError, match=r"noise must be one of \['normal', 'uniform'\], got 'other'"):
        smart(embed, embed)
    assert smart_fast.perturbation is perturbation
