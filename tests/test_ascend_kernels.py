"""The ascent kernels, and the whole of SMARTLoss on them, against float64."""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

import smart_fast
from smart_fast import SMARTLoss, autograd, inf_norm, kl_loss, l1_norm, l2_norm, sentence_norm, sym_kl_loss
from smart_fast.backends import base, pytorch
from smart_fast.backends.base import Step
from smart_fast.noise import draw_seed
from tests import oracle
from tests.helpers import exhaustively

NORMS = {"inf": inf_norm, "l2": l2_norm, "l1": l1_norm}
UPDATES = ("smart-pytorch", "sift", "paper")  # "sign", which asks for no norm, has tests of its own
EVERY_UPDATE = [*UPDATES, *exhaustively("sign")]
BALLS = ("paper", "sign")
SCOPES = ("row", "group")
#: Radii that are neither reached by nothing nor by everything that these tests project.
RADII = {"inf": 0.02, "l2": 0.2, "l1": 0.4}

# A fallback to PyTorch would make these tests compare PyTorch with itself.
pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")


def norm_of(kind: str, scope: str) -> smart_fast.norms.Norm:
    return NORMS[kind] if scope == "row" else sentence_norm(NORMS[kind])


def step_of(kind: str, scope: str, update: str, **changes: float) -> Step:
    numbers = {"noise_var": 1e-2, "step_size": 0.5, "epsilon": RADII[kind] if update in BALLS else 1e-6} | changes
    return Step(norm_of(kind, scope), numbers["noise_var"], numbers["step_size"], numbers["epsilon"], update)


def units(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of rows of large and small embeddings, and of one that is zero."""
    unit = torch.exp(2 * torch.randn(*shape[:-1], 1, device=device))
    unit.view(-1)[-1] = 0.0
    return unit


def run(
    backend: ModuleType,
    embed: Tensor,
    grad: Tensor,
    step: Step,
    kind: str,
    scope: str,
    mask: Tensor | None = None,
    unit: Tensor | None = None,
    seed: int = 11,
) -> None:
    """Two steps, from the seed and then from the kept noise, each against the oracle."""
    seeds = torch.tensor([seed], device=embed.device)
    noise = step.noise_var * torch.from_numpy(oracle.philox_normal(seed, embed.numel())).view(embed.shape)
    clean, given, host_mask, host_unit = (
        None if each is None else each.detach().cpu() for each in (embed, grad, mask, unit)
    )
    noise = noise if host_unit is None else noise * host_unit.double()
    state: Tensor | None = seeds
    for _ in range(2):
        assert state is not None
        perturbed, state = backend.ascend(embed, grad, state, step, mask, True, unit)
        noise = oracle.ascend(
            noise, given, step.update, kind, scope, step.step_size, step.epsilon, host_mask, host_unit
        )
        assert state is not None
        assert oracle.relative_error(state, noise) < getattr(backend, "tolerance", 3e-6)
        assert perturbed.dtype == embed.dtype
        ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[embed.dtype]
        assert oracle.relative_error(perturbed, clean.double() + noise) < ulp


@pytest.mark.parametrize("relative", [False, *exhaustively(True)])
@pytest.mark.parametrize("masked", [True, *exhaustively(False)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("update", EVERY_UPDATE)
@pytest.mark.parametrize("kind", NORMS)
def test_updates(
    kind: str, update: str, scope: str, masked: bool, relative: bool, backend: ModuleType, device: torch.device,
    poison: None,
) -> None:  # fmt: skip
    for shape in ((2, 3, 20), (3, 7), (2, 2, 2, 5), (2, 3, 1)):
        embed, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
        mask = torch.rand(shape[:-1], device=device) < 0.7 if masked else None
        unit = units(shape, device) if relative else None
        if mask is not None:
            mask.view(-1)[0] = True
            embed, grad = (torch.where(mask.unsqueeze(-1), each, math.nan) for each in (embed, grad))
            embed = embed.nan_to_num(0.0)
            unit = None if unit is None else torch.where(mask.unsqueeze(-1), unit, math.nan)
        run(backend, embed, grad, step_of(kind, scope, update), kind, scope, mask, unit)


def test_every_update_is_tested() -> None:
    assert {*UPDATES, "sign"} == set(base.UPDATES)


@pytest.mark.parametrize("width", [7, *exhaustively(1, 768, 9001)])
@pytest.mark.parametrize("relative", [True, *exhaustively(False)])
def test_signs(relative: bool, width: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    """Two steps against the oracle, whatever the norm: rows that are masked, not finite, zero in part, of any width."""
    norms = inf_norm, sentence_norm(l2_norm), lambda x: x.norm()
    for shape, norm in zip(((2, 3, 20), (3, 8), (2, 2, width)), norms, strict=True):
        embed, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
        mask = torch.ones(shape[:-1], dtype=torch.bool, device=device)
        mask.view(-1)[1] = False
        grad[..., 0] = 0.0
        grad.view(-1, shape[-1])[2, -1] = math.inf
        unit = units(shape, device) if relative else None
        for rows in (None, mask):
            step = Step(norm, 1e-2, 7e-3, 1.2e-2, "sign")
            run(backend, embed, grad, step, "inf", "row", rows, unit)


@pytest.mark.parametrize("relative", [False, True])
def test_signs_reach_the_corners(relative: bool, backend: ModuleType, device: torch.device, poison: None) -> None:
    """Exactly: a step longer than the ball is wide leaves every entry at its edge, bit for bit as in PyTorch."""
    embed, grad = torch.zeros(4, 24, device=device), torch.randn(4, 24, device=device)
    unit = units(embed.shape, device) if relative else None
    step = Step(inf_norm, 1e-2, 0.5, 0.1, "sign")
    seed = torch.tensor([3], device=device)
    perturbed, noise = backend.ascend(embed, grad, seed, step, None, True, unit)
    corner = torch.tensor(0.1, device=device) * (1.0 if unit is None else unit) * grad.sign()
    assert torch.equal(noise, corner)
    assert torch.equal(perturbed, corner)
    start = torch.zeros(4, 24, device=device)
    assert torch.equal(pytorch.ascend(embed, grad, start, step, None, unit)[1], corner)


@pytest.mark.parametrize("update", ["paper", *exhaustively("smart-pytorch", "sift", "sign")])
def test_steps_from_uniform_noise(update: str, backend: ModuleType, device: torch.device, poison: None) -> None:
    """What the first step makes again from the seed is what `perturb` added, for token norms and measured ones."""
    embed, grad = torch.randn(2, 3, 20, device=device), torch.randn(2, 3, 20, device=device)
    seed = torch.tensor([2**40 + 5], device=device)
    noise = 1e-2 * torch.from_numpy(oracle.philox_uniform(2**40 + 5, embed.numel())).view(embed.shape)
    perturbed, _ = backend.perturb(embed, seed, 1e-2, None, True, None, "uniform")
    assert oracle.relative_error(perturbed, embed.cpu().double() + noise) < 2e-6
    for kind, scope in (("l2", "row"), ("l2", "group"), ("l1", "group")):
        numbers = step_of(kind, scope, update)
        step = Step(norm_of(kind, scope), 1e-2, numbers.step_size, numbers.epsilon, update, (), "uniform")
        _, moved = backend.ascend(embed, grad, seed, step, None, True, None)
        want = oracle.ascend(noise, grad.cpu(), update, kind, scope, step.step_size, step.epsilon, None)
        assert oracle.relative_error(moved, want) < 3e-6


@pytest.mark.parametrize("relative", [False, *exhaustively(True)])
@pytest.mark.parametrize("width", [768, *exhaustively(1, 3, 1000, 5000, 9001)])
@pytest.mark.parametrize("kind", NORMS)
def test_projections(
    kind: str, width: int, relative: bool, backend: ModuleType, device: torch.device, poison: None
) -> None:
    """paper, whose point may be inside of the ball, outside, or far away, in one block of a row or in several."""
    embed, grad = torch.randn(3, width, device=device), torch.randn(3, width, device=device)
    unit = units(embed.shape, device) if relative else None
    size = float(oracle.norm_rows(kind, "row", torch.randn(width)))
    for radius, scope in ((2.0, "row"), (0.6, "row"), (0.1, "row"), (0.5, "group")):
        step = step_of(kind, scope, "paper", epsilon=1e-2 * size * radius, step_size=1e-2 * size)
        run(backend, embed, grad, step, kind, scope, unit=unit)


@pytest.mark.parametrize("scope", ["row", *exhaustively("group")])
@pytest.mark.parametrize("kind", ["l2", *exhaustively("inf", "l1")])
def test_gradients_of_any_magnitude(
    kind: str, scope: str, backend: ModuleType, device: torch.device, poison: None
) -> None:
    """paper divides by their norm: squares overflow or vanish, directions do not."""
    for width in (24, 9000) if kind == "l2" else (24,):
        embed, grad = torch.randn(3, width, device=device), torch.randn(3, width, device=device)
        for sizes in ((1e-30, 1e30, 0.0), (1e-35, 1.0, 1e35)):
            scaled = grad.clamp(-3, 3) * torch.tensor(sizes, device=device)[:, None]
            run(backend, embed, scaled, step_of(kind, scope, "paper"), kind, scope)
    for size in (1e-43, 1e38):  # whose norms are not known to all digits
        step = step_of(kind, scope, "paper")
        _, noise = backend.ascend(embed, scaled.sign() * size, torch.tensor([3], device=device), step, None, True, None)
        assert (oracle.norm_rows(kind, scope, noise.cpu()) <= 1.001 * step.epsilon).all()


@pytest.mark.parametrize("width", [9001, *exhaustively(768, 8192)])
@pytest.mark.parametrize("scope", ["row", *exhaustively("group")])
def test_wide_rows(width: int, scope: str, backend: ModuleType, device: torch.device, poison: None) -> None:
    for update in UPDATES:
        embed, grad = torch.randn(2, 2, width, device=device), torch.randn(2, 2, width, device=device)
        unit = torch.rand(2, 2, 1, device=device) if update == "sift" else None
        run(backend, embed, grad, step_of("l2", scope, update), "l2", scope, unit=unit)


def test_one_dimension(backend: ModuleType, device: torch.device, poison: None) -> None:
    run(
        backend,
        torch.randn(50, device=device),
        torch.randn(50, device=device),
        step_of("inf", "row", "sift"),
        "inf",
        "row",
    )
    with pytest.raises(ValueError, match="sentence_norm"):
        SMARTLoss(lambda e: e, kl_loss, norm_fn=sentence_norm(inf_norm))(
            torch.randn(5, device=device), torch.randn(5, device=device)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, *exhaustively(torch.float16)])
def test_half_precision(dtype: torch.dtype, backend: ModuleType, device: torch.device, poison: None) -> None:
    embed, grad = (torch.randn(2, 3, 40, device=device).to(dtype) for _ in range(2))
    for kind, update in itertools.product(NORMS, UPDATES):
        run(backend, embed, grad, step_of(kind, "row", update), kind, "row")
    run(backend, embed, grad, step_of("l1", "row", "paper"), "l1", "row", unit=units(embed.shape, device))


@pytest.mark.exhaustive
def test_strides(backend: ModuleType, device: torch.device, poison: None) -> None:
    base = torch.randn(4, 6, 5, 16, device=device)
    for view in (base.permute(2, 0, 1, 3), base[:, ::2, 1:, 4:12], base[..., ::2], base[:1].expand(3, 6, 5, 16)):
        grad = torch.randn(view.shape, device=device)
        for left, right in ((view, grad), (grad, view)):
            run(backend, left, right, step_of("inf", "row", "smart-pytorch"), "inf", "row")
            run(backend, left, right, step_of("l2", "group", "sift"), "l2", "group")
        run(backend, view, grad, step_of("l1", "row", "paper"), "l1", "row", unit=units(view.shape, device))


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["row", *exhaustively("group")])
@pytest.mark.parametrize("update", ["paper", *exhaustively("smart-pytorch", "sift")])
def test_non_finite_gradients_do_not_poison(
    update: str, scope: str, backend: ModuleType, device: torch.device, poison: None
) -> None:
    for width in (10, 9000):
        embed, grad = torch.randn(2, 3, width, device=device), torch.randn(2, 3, width, device=device)
        for index, value in enumerate((math.nan, math.inf, -math.inf)):
            grad[index % 2, index, 3] = value
        grad[1, 2] = 0.0
        for kind in ("inf", "l1"):
            run(backend, embed, grad, step_of(kind, scope, update), kind, scope)


def test_zero_denominator_keeps_the_noise(backend: ModuleType, device: torch.device, poison: None) -> None:
    embed, zero = torch.randn(3, 8, device=device), torch.zeros(3, 8, device=device)
    seed = torch.tensor([1], device=device)
    for update, kind in itertools.product(UPDATES, NORMS):
        step = step_of(kind, "row", update, noise_var=0.0, epsilon=0.0)
        perturbed, _ = backend.ascend(embed, zero, seed, step, None, False, None)
        assert torch.equal(perturbed, embed)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("update", EVERY_UPDATE)
def test_opaque_norms(update: str, relative: bool, backend: ModuleType, device: torch.device, poison: None) -> None:
    """Any callable: per token, per tensor, or per element."""
    embed, grad = torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device)
    grad[1, 1, 1] = math.nan
    mask = torch.tensor([[True, True, False], [True, True, True]], device=device)
    unit = 0.5 + torch.rand(2, 3, 1, device=device) if relative else None
    norms = {
        "token": lambda x: x.abs().amax(-1, keepdim=True),
        "tensor": lambda x: x.norm(),
        "sentence": lambda x: x.abs().amax((1, 2), keepdim=True),
        "element": lambda x: x.abs() + x.norm(),
        "number": lambda x: torch.tensor(2.0) if x.dtype == torch.float64 else 2.0,
    }
    if update == "paper":
        del norms["number"]  # which is no norm, as its direction shows
    scale = 1.0 if unit is None else unit.cpu().double()
    epsilon = 0.3 if update in BALLS else 1e-6
    for norm_fn in norms.values():
        step = Step(norm_fn, 1e-2, 0.5, epsilon, update)
        seed = torch.tensor([4], device=device)
        got, kept = backend.ascend(embed, grad, seed, step, mask, True, unit)
        noise = 1e-2 * scale * torch.from_numpy(oracle.philox_normal(4, embed.numel())).view(embed.shape)
        keep = mask.cpu().unsqueeze(-1)
        noise = torch.where(keep, noise, 0.0)
        clean = torch.where(keep & grad.cpu().isfinite().all(-1, keepdim=True), grad.cpu().double(), 0.0)
        if update == "sign":
            bound = torch.as_tensor(0.3 * scale)
            want = (noise + 0.5 * scale * clean.sign()).clamp(-bound, bound)
        elif update == "sift":
            want = noise + 0.5 * scale * clean / (norm_fn(clean) + epsilon * scale)
        elif update == "smart-pytorch":
            moved = noise + 0.5 * scale * clean
            want = moved / (norm_fn(moved) + epsilon * scale)
        else:
            moved = noise / scale + 0.5 * (clean / norm_fn(clean)).nan_to_num(0.0)
            want = scale * moved * (epsilon / norm_fn(moved)).clamp(max=1.0)
        want = torch.where(keep, want, 0.0)
        assert oracle.relative_error(kept, want) < 3e-6
        assert oracle.relative_error(got, embed.cpu().double() + want) < 1e-6


def test_long_groups(monkeypatch: pytest.MonkeyPatch, backend: ModuleType, device: torch.device, poison: None) -> None:
    if backend.name == "triton":
        monkeypatch.setattr("smart_fast.backends.triton_launch.MAX_GROUP", 4)
    for kind, update in itertools.product(NORMS, UPDATES):
        embed, grad = torch.randn(2, 7, 5, device=device), torch.randn(2, 7, 5, device=device)
        run(backend, embed, grad, step_of(kind, "group", update), kind, "group")


def smart_oracle(
    model: torch.nn.Module,
    embed: Tensor,
    state: Tensor,
    noise: Tensor,
    num_steps: int,
    update: str,
    kind: str,
    scope: str,
    epsilon: float,
    unit: Tensor | None,
) -> Tensor:
    """SMART in float64, from a given initial noise."""
    for _ in range(num_steps):
        perturbed = (embed.detach() + noise).requires_grad_()
        loss = kl_loss(model(perturbed), state.detach(), backend="torch")
        (grad,) = torch.autograd.grad(loss, perturbed)
        noise = oracle.ascend(noise, grad, update, kind, scope, 1e-1, epsilon, None, unit)
    return sym_kl_loss(model(embed + noise), state, backend="torch")


def rms(embed: Tensor) -> Tensor:
    return embed.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("update", EVERY_UPDATE)
@pytest.mark.parametrize("num_steps", [0, 2, *exhaustively(1, 3)])
def test_smart_loss(
    num_steps: int, update: str, scope: str, scale: str, backend: ModuleType, device: torch.device
) -> None:
    """The whole regularizer, gradients of parameters, embedding and state included."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).to(device)
    embed = torch.randn(2, 3, 12, device=device, requires_grad=True)
    epsilon = 0.08 if update in BALLS else 1e-6
    settings = {"num_steps": num_steps, "step_size": 1e-1, "epsilon": epsilon, "noise_var": 1e-1}
    smart = SMARTLoss(model, kl_loss, sym_kl_loss, norm_of("l2", scope), **settings, update=update, scale=scale)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, (1,), device=device))
    torch.manual_seed(1)
    loss = smart(embed, model(embed))
    got = torch.autograd.grad(loss, [embed, *model.parameters()])

    exact = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).double()
    exact.load_state_dict(model.state_dict())
    clean = embed.detach().cpu().double().requires_grad_()
    unit = rms(clean).detach() if scale == "relative" else None
    noise = 1e-1 * torch.from_numpy(oracle.philox_normal(seed, embed.numel())).view(embed.shape)
    noise = noise if unit is None else noise * unit
    reference = smart_oracle(exact, clean, exact(clean), noise, num_steps, update, "l2", scope, epsilon, unit)
    want = torch.autograd.grad(reference, [clean, *exact.parameters()])
    assert oracle.relative_error(loss, reference) < 1e-5
    largest = max(float(each.norm()) for each in want)  # a bias of both sides cancels to nothing
    for value, exactly in zip(got, want, strict=True):
        assert (value.cpu().double() - exactly).norm() < 1e-4 * largest


def check_perturbed(name: str, kind: str, scope: str, update: str, scale: str, device: torch.device) -> None:
    """What eval_fn is given in the last pass, after K = 0 … 3 steps along gradients that rounding cannot change."""
    embed, weight = torch.randn(2, 3, 20, device=device), torch.randn(2, 3, 20, device=device)
    embed *= torch.tensor([0.1, 1.0, 10.0], device=device)[:, None]
    embed[1, 2] = 0.0
    clean, unit = embed.cpu().double(), rms(embed.cpu().double()) if scale == "relative" else None
    epsilon = {"inf": 0.3, "l2": 1.0, "l1": 4.0}[kind] if update in BALLS else 1e-6
    noise = torch.zeros(())
    for num_steps in range(4):
        seen: list[Tensor] = []

        def eval_fn(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.detach().cpu().double())
            return x * weight

        smart = SMARTLoss(
            eval_fn, lambda p, s: p.sum(), None, norm_of(kind, scope), num_steps, 0.5, epsilon, 0.2, backend=name,
            update=update, scale=scale,
        )  # fmt: skip
        torch.manual_seed(1)
        smart(embed, embed)
        assert len(seen) == num_steps + 1
        if num_steps == 0:
            noise = seen[0] - clean
        else:
            noise = oracle.ascend(noise, weight.cpu(), update, kind, scope, 0.5, epsilon, None, unit)
        assert oracle.relative_error(seen[-1], clean + noise) < 2e-6
        assert seen[-1].isfinite().all()
        if scale == "relative":
            assert not seen[-1][1, 2].any()
            ratio = (seen[0] - clean).norm(dim=-1) / clean.norm(dim=-1).clamp(min=1e-9)
            assert ((ratio > 0.08) | (clean.norm(dim=-1) == 0)).all()
            assert (ratio < 0.4).all()


@pytest.mark.parametrize("scale", ["relative", *exhaustively("absolute")])
@pytest.mark.parametrize("scope", ["group", *exhaustively("row")])
@pytest.mark.parametrize("update", EVERY_UPDATE)
@pytest.mark.parametrize("kind", NORMS)
def test_perturbed_embeddings(
    kind: str, update: str, scope: str, scale: str, backend: ModuleType, device: torch.device
) -> None:
    check_perturbed(backend.name, kind, scope, update, scale, device)


@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("update", EVERY_UPDATE)
@pytest.mark.parametrize("kind", NORMS)
def test_perturbed_embeddings_of_pytorch(kind: str, update: str, scope: str, scale: str) -> None:
    check_perturbed("torch", kind, scope, update, scale, torch.device("cpu"))


class PyTorch:
    """`pytorch` as a fused backend."""

    name = "torch"
    tolerance = 1e-5  # of its fp32 sums

    @staticmethod
    def ascend(
        embed: Tensor, grad: Tensor, noise: Tensor, step: Step, mask: Tensor | None, keep: bool, unit: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if noise.dtype == torch.int64:
            normal = torch.from_numpy(oracle.philox_normal(int(noise), embed.numel())).view(embed.shape).float()
            _, noise = pytorch.perturb(embed, normal, step.noise_var, mask, unit)
        return pytorch.ascend(embed, grad, noise, step, mask, unit)


@pytest.mark.exhaustive
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("update", EVERY_UPDATE)
def test_pytorch(update: str, relative: bool) -> None:
    """What is written for the kernels, of what they are compared with elsewhere."""
    common = {"backend": PyTorch, "device": torch.device("cpu"), "poison": None}
    test_opaque_norms(update, relative, **common)
    for scope, kind in itertools.product(SCOPES, NORMS):
        for masked in (False, True):
            test_updates(kind, update, scope, masked, relative, **common)
        if update == "paper":
            test_gradients_of_any_magnitude(kind, scope, **common)
            for width in (1, 768, 9001):
                test_projections(kind, width, relative, **common)
        test_non_finite_gradients_do_not_poison(update, scope, **common)
    if update == "paper":
        for dtype in (torch.bfloat16, torch.float16):
            embed, grad = (torch.randn(2, 3, 40).to(dtype) for _ in range(2))
            run(PyTorch, embed, grad, step_of("l1", "row", update), "l1", "row")


def test_smart_loss_mask(backend: ModuleType, device: torch.device) -> None:
    model = torch.nn.Linear(8, 4).to(device)
    embed = torch.randn(2, 5, 8, device=device, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]], device=device)
    seen = []

    def eval_fn(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x.mean(1))

    smart = SMARTLoss(eval_fn, kl_loss, sym_kl_loss, sentence_norm(inf_norm), num_steps=2)
    smart(embed, model(embed.mean(1)).detach(), mask=mask).backward()
    for perturbed in seen:
        assert torch.equal(perturbed[~mask], embed[~mask])
        assert not torch.equal(perturbed[mask], embed[mask])
    assert not embed.grad[~mask].any()
    assert embed.grad[mask].any()


def test_a_norm_of_another_shape_is_named(device: torch.device) -> None:
    smart = SMARTLoss(lambda e: e, kl_loss, norm_fn=lambda x: torch.ones(7, 1, device=device))
    with pytest.raises(ValueError, match="norm_fn"):
        smart(torch.randn(3, 4, device=device), torch.randn(3, 4, device=device))


def test_seeds_come_from_torchs_generator(backend: ModuleType, device: torch.device) -> None:
    """A draw is that of torch.randint, whoever draws it: the same noise by every backend after torch.manual_seed."""
    if device.type != "cpu":
        pytest.skip("on a GPU native seeds come from the state of the generator, not from a launch")
    embed = torch.randn(4, 12)
    for generator in (None, torch.Generator().manual_seed(7)):
        drawn = torch.Generator().manual_seed(7) if generator else None
        torch.manual_seed(7)
        perturbed, _ = autograd.perturb(backend, embed, 0.1, generator, None, True, None)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        seed = draw_seed(embed.device, drawn)
        assert torch.equal(perturbed, backend.perturb(embed, seed, 0.1, None, False, None)[0])
        assert torch.equal(state, torch.get_rng_state())


def test_perturbed_embeddings_pass_gradients_on(backend: ModuleType, device: torch.device) -> None:
    """To real rows of the embedding, from both operations, without a graph where none is wanted."""
    embed = torch.randn(3, 5, device=device, requires_grad=True)
    mask = torch.tensor([True, False, True], device=device)
    upstream = torch.randn(3, 5, device=device)
    step = Step(inf_norm, 0.1, 1e-3, 1e-6, "smart-pytorch")
    perturbed, noise = autograd.perturb(backend, embed, 0.1, None, mask, True, None)
    moved, _ = autograd.ascend(backend, embed, torch.randn_like(upstream), noise, step, mask, False, None)
    for result in (perturbed, moved):
        (gradient,) = torch.autograd.grad(result, embed, upstream)
        assert torch.equal(gradient, torch.where(mask.unsqueeze(-1), upstream, 0.0))
    with torch.no_grad():
        assert not autograd.perturb(backend, embed, 0.1, None, mask, True, None)[0].requires_grad
    assert not autograd.perturb(backend, embed.detach(), 0.1, None, mask, True, None)[0].requires_grad
