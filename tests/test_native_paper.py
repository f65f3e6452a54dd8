"""update="paper", and steps in units of each row, by the compiled operators: against float64, however they are run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smart_fast import SMARTLoss, inf_norm, kl_loss, l1_norm, l2_norm, sentence_norm, sym_kl_loss
from smart_fast import build as native_build
from smart_fast.backends import build_native
from smart_fast.backends.base import Step
from tests import oracle
from tests.helpers import exhaustively

NORMS = {"inf": inf_norm, "l2": l2_norm, "l1": l1_norm}
UPDATES = ["paper", "smart-pytorch", "sift"]
SCOPES = ["row", "group"]
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WIDTHS = [1, 3, 768, 1000, 5000]

pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")


@pytest.fixture(scope="module")
def built():
    if native_build.load() is None and (reason := native_build.missing()):
        pytest.skip(reason)
    return build_native()


@pytest.fixture(params=["auto", *exhaustively("avx2", "portable", "2-threads")])
def native(request, built):
    """The backend by every instruction set and by several threads, with outputs that start as NaN."""
    threads = request.param == "2-threads"
    if not built.extension.use_instruction_set("auto" if threads else request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    torch.set_num_threads(2 if threads else 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills uninitialized memory, and so do we
    yield built
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    built.extension.use_instruction_set("auto")


# ---- float64 ---------------------------------------------------------------------------------------------------------


def threshold(sizes: Tensor, radius: Tensor) -> Tensor:
    """By how much the entries of each row must shrink to sum to ``radius``: by bisection."""
    low, high = torch.zeros_like(radius), sizes.amax(-1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = (sizes - middle).clamp(min=0).sum(-1, keepdim=True) > radius
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def projected(x: Tensor, kind: str, scope: str, radius: Tensor) -> Tensor:
    """Onto the ball of ``radius``, a number for each row or sentence."""
    if kind == "inf":
        return x.maximum(-radius).minimum(radius)
    if kind == "l1":
        flat, radius = (x, radius) if scope == "row" else (x.flatten(1), radius.flatten(1))
        inside = flat.abs().sum(-1, keepdim=True) <= radius
        shrunk = flat.sign() * (flat.abs() - threshold(flat.abs(), radius)).clamp(min=0)
        return torch.where(inside, flat, shrunk).view(x.shape)
    norm = oracle.norm_rows(kind, scope, x)
    return torch.where(norm > radius, x * (radius / norm), x)


def expected(noise: Tensor, grad: Tensor, step: Step, kind: str, scope: str, mask: Tensor | None = None,
             unit: Tensor | None = None) -> Tensor:  # fmt: skip
    """The next noise, float64, as `Step` says."""
    noise, grad = noise.double(), grad.double()
    unit = torch.ones(*grad.shape[:-1], 1, dtype=torch.float64) if unit is None else unit.double()
    real = torch.ones(grad.shape[:-1], dtype=torch.bool) if mask is None else mask
    real = real.unsqueeze(-1)
    noise = torch.where(real, noise, 0.0)
    grad = torch.where(real & grad.isfinite().all(-1, keepdim=True), grad, 0.0)
    if step.update == "smart-pytorch":
        moved = noise + step.step_size * unit * grad
        moved = moved / (oracle.norm_rows(kind, scope, moved) + step.epsilon * unit)
        moved = torch.where(moved.isnan(), noise, moved)
    else:
        norm = oracle.norm_rows(kind, scope, grad) + (step.epsilon * unit if step.update == "sift" else 0.0)
        moved = noise + step.step_size * unit * torch.where(norm > 0, grad / norm, 0.0)
    if step.update == "paper":
        radius = torch.full(
            unit.shape if scope == "row" else (len(grad), *[1] * (grad.dim() - 1)), step.epsilon
        ).double()
        safe = torch.where(unit > 0, unit, 1.0)
        moved = torch.where(unit > 0, projected(moved / safe, kind, scope, radius) * unit, 0.0)
    return torch.where(real, moved, 0.0)


def step_of(kind: str, scope: str, update: str, step_size: float = 1e-3, epsilon: float = 1e-6) -> Step:
    norm = NORMS[kind] if scope == "row" else sentence_norm(NORMS[kind])
    return Step(norm, 1e-3, step_size, epsilon, update)


def check(native, embed: Tensor, grad: Tensor, step: Step, kind: str, scope: str, mask: Tensor | None = None,
          unit: Tensor | None = None, tolerance: float = 2e-6) -> None:  # fmt: skip
    """Two steps, from the seed and then from the noise that the first one kept; each from the noise it was given."""
    if (step.update, kind, scope) == ("paper", "l1", "group"):
        tolerance = 1e-5  # PyTorch's projection, which adds up in fp32
    seed = torch.tensor([11])
    noise = native.perturb(torch.zeros(embed.shape), seed, step.noise_var, mask, False, unit)[0]
    state = seed
    for _ in range(2):
        perturbed, state = native.ascend(embed, grad, state, step, mask, True, unit)
        noise = expected(noise, grad, step, kind, scope, mask, unit)
        assert oracle.relative_error(state, noise) < tolerance
        assert oracle.relative_error(perturbed, embed.double() + noise) < ULP[embed.dtype]
        assert perturbed.dtype == embed.dtype
        noise = state


def radius_of(kind: str, elements: int) -> float:
    """Half of the norm that noise and step have together, roughly."""
    return {"inf": 1e-3, "l2": 0.5e-3 * math.sqrt(elements), "l1": 0.3e-3 * elements}[kind]


def units(shape: tuple[int, ...] | torch.Size) -> dict[str, Tensor | None]:
    some = torch.rand(*shape[:-1], 1) + 0.5
    zeros = some.clone()
    zeros.view(-1)[::3] = 0.0
    return {"none": None, "given": some, "zeros": zeros}


# ---- perturb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("width", [*WIDTHS, 32, 4096])
def test_noise_in_units(width, dtype, native):
    for shape in ((7, width), (2, 3, width)):
        embed, seed, unit = torch.randn(shape).to(dtype), torch.tensor([5]), units(shape)["zeros"]
        normal = native.perturb(torch.zeros(shape), seed, 1.0, None, False)[0]
        for mask in (None, torch.rand(shape[:-1]) < 0.6):
            noise = 0.5 * unit.double() * normal.double()
            noise = noise if mask is None else torch.where(mask.unsqueeze(-1), noise, 0.0)
            for view in (embed, embed.transpose(0, 1).contiguous().transpose(0, 1)):
                out, kept = native.perturb(view, seed, 0.5, mask, True, unit)
                assert oracle.relative_error(kept, noise) < 2e-7
                assert oracle.relative_error(out, embed.double() + noise) < ULP[dtype]
                assert torch.equal(out, native.perturb(view, seed, 0.5, mask, False, unit)[0])


def test_units_of_one_change_nothing(native):
    embed, seed, ones = torch.randn(9, 768), torch.tensor([5]), torch.ones(9, 1)
    pairs = [(native.perturb(embed, seed, 0.1, None, True), native.perturb(embed, seed, 0.1, None, True, ones))]
    for update in UPDATES:
        given = embed, embed, seed, step_of("l2", "row", update, epsilon=1e-2), None, True
        pairs.append((native.ascend(*given), native.ascend(*given, ones)))
    for without, with_ones in pairs:
        assert all(torch.equal(one, two) for one, two in zip(without, with_ones, strict=True))


# ---- ascend ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [1, 1000, *exhaustively(3, 768, 5000)])
def test_paper(width, kind, scope, native):
    """Balls that hold a part of the noise, all of it, or next to nothing."""
    for dtype in ULP:
        embed, grad = (torch.randn(2, 3, width).to(dtype) for _ in range(2))
        radius = radius_of(kind, width if scope == "row" else 3 * width)
        for unit in units(embed.shape).values():
            for mask in (None, torch.tensor([[True, False, True], [False, True, True]])):
                check(native, embed, grad, step_of(kind, scope, "paper", 2e-3, radius), kind, scope, mask, unit)
        for factor in (1e-2, 1e2):
            check(native, embed, grad, step_of(kind, scope, "paper", 2e-3, factor * radius), kind, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
def test_long_rows(kind, scope, native):
    """Beyond what kernels keep of a row."""
    embed, grad = torch.randn(2, 2, 9001), torch.randn(2, 2, 9001)
    for factor in (1e-2, 1.0):
        step = step_of(kind, scope, "paper", 2e-3, factor * radius_of(kind, 9001))
        check(native, embed, grad, step, kind, scope, None, units(embed.shape)["zeros"])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("update", ["smart-pytorch", "sift"])
@pytest.mark.parametrize("kind", NORMS)
def test_other_updates_in_units(kind, update, scope, native):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for width in WIDTHS:
        embed, grad = torch.randn(2, 3, width), torch.randn(2, 3, width)
        for unit in units(embed.shape).values():
            for each in (None, mask):
                check(native, embed, grad, step_of(kind, scope, update, 0.5, 1e-2), kind, scope, each, unit)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e-15, 1e15, 1e30, 1e33])
def test_gradients_of_any_size(size, kind, scope, native):
    for width in (1, 40, 3000):
        embed, grad = torch.randn(2, 3, width), size * torch.randn(2, 3, width).clamp(-3, 3)
        assert grad.isfinite().all()
        radius = radius_of(kind, width if scope == "row" else 3 * width)
        check(native, embed, grad, step_of(kind, scope, "paper", 2e-3, radius), kind, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
def test_rows_without_a_direction(kind, scope, native):
    """A gradient of zeros, or one that is not finite: no step, but the ball holds."""
    for width in (1, 10, 1000):
        embed, grad = torch.randn(3, 3, width), torch.randn(3, 3, width)
        grad[0] = 0.0
        for index, value in enumerate((math.nan, math.inf, -math.inf)):
            grad[1 + index % 2, index, width - 1] = value
        radius = radius_of(kind, width if scope == "row" else 3 * width)
        for unit in units(embed.shape).values():
            check(native, embed, grad, step_of(kind, scope, "paper", 2e-3, radius), kind, scope, None, unit)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
def test_balls_of_nothing(kind, scope, native):
    embed, grad = torch.randn(2, 3, 50), torch.randn(2, 3, 50)
    step = step_of(kind, scope, "paper", 1e-3, 0.0)
    perturbed, kept = native.ascend(embed, grad, torch.tensor([1]), step, None, True)
    assert torch.equal(perturbed, embed)
    assert not kept.any()


@pytest.mark.parametrize("kind", NORMS)
def test_ties(kind, native):
    """Entries of one size, and a lone one."""
    embed = torch.zeros(3, 33)
    noise, grad = torch.full((3, 33), 1e-3), torch.zeros(3, 33)
    noise[1, 16:], noise[2] = -2e-3, 0.0
    grad[2, 7] = -5.0
    for epsilon in (1e-5, 1e-3, 2e-2):
        step = step_of(kind, "row", "paper", 1e-3, epsilon)
        perturbed, _ = native.ascend(embed, grad, noise, step, None, False)
        assert oracle.relative_error(perturbed, expected(noise, grad, step, kind, "row")) < 2e-6


@pytest.mark.parametrize("update", UPDATES)
def test_views_and_mixed_dtypes(update, native):
    base = torch.randn(4, 6, 5, 16)
    for view in (base.permute(2, 0, 1, 3), base[:, ::2, 1:, 4:12], base[..., ::2], base[:1].expand(3, 6, 5, 16)):
        grad, unit = torch.randn(view.shape), torch.rand(*view.shape[:-1], 1)
        for left, right in ((view, grad), (grad, view), (view.bfloat16(), grad)):
            for kind, scope in (("inf", "row"), ("l1", "row"), ("l2", "group")):
                step = step_of(kind, scope, update, 2e-3, radius_of(kind, view.shape[-1]))
                check(native, left, right, step, kind, scope, None, unit)


@pytest.mark.parametrize("update", UPDATES)
def test_norms_of_the_user(update, native):
    """A norm of PyTorch's that no kernel knows; its balls are those of scaled noise."""
    norms = {"l2": lambda x: x.norm(dim=-1, keepdim=True), "inf": lambda x: x.abs().amax(-1, keepdim=True)}
    mask = torch.tensor([[True, True, False], [True, True, True]])
    embed, grad = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    grad[1, 1, 1] = math.nan
    for unit in units(embed.shape).values():
        step = Step(norms["l2"], 1e-3, 2e-3, 2e-3, update)
        check(native, embed, grad, step, "l2", "row", mask, unit, 3e-6)
        if update != "paper":
            check(native, embed, grad, Step(norms["inf"], 1e-3, 2e-3, 2e-3, update), "inf", "row", mask, unit, 3e-6)


def test_results_do_not_depend_on_threads(built):
    embed, grad, unit = torch.randn(3, 100, 300), torch.randn(3, 100, 300), torch.rand(3, 100, 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = [*built.perturb(embed, torch.tensor([9]), 0.1, None, True, unit)]
        for kind in NORMS:
            step = step_of(kind, "group", "paper", 1e-3, radius_of(kind, 30000))
            results += built.ascend(embed, grad, results[1], step, None, True, unit)
        found.append(results)
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_units_are_checked(built):
    embed, seed = torch.randn(4, 8), torch.tensor([1])
    for unit, error in ((torch.ones(3, 1), ValueError), (torch.ones(4, 2)[:, :1], ValueError),
                        (torch.ones(4, 1, dtype=torch.float64), TypeError)):  # fmt: skip
        with pytest.raises(error, match="units"):
            built.perturb(embed, seed, 1.0, None, True, unit)
        for scope in SCOPES:
            with pytest.raises(error, match="units"):
                built.ascend(embed, embed, seed, step_of("l2", scope, "paper"), None, True, unit)


# ---- the regularizer -------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    layers = torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
    return torch.nn.Sequential(*layers).to(dtype)


def rms(embed: Tensor) -> Tensor:
    return embed.detach().square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_smart_loss(num_steps, update, scale, kind, scope, built):
    """From the first noise to the gradients of parameters and embedding, against a loop in float64."""
    torch.manual_seed(0)
    model, exact = network(), network(torch.float64)
    exact.load_state_dict(model.state_dict())
    embed = torch.randn(2, 3, 12, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    step = Step(NORMS[kind] if scope == "row" else sentence_norm(NORMS[kind]), 0.1, 0.2, 0.3, update)
    numbers = num_steps, step.step_size, step.epsilon, step.noise_var
    smart = SMARTLoss(model, kl_loss, sym_kl_loss, step.norm_fn, *numbers, backend="native", update=update, scale=scale)
    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(1)
    loss = smart(embed, model(embed), mask=mask)
    got = torch.autograd.grad(loss, [embed, *model.parameters()])

    clean = embed.detach().double().requires_grad_()
    unit = rms(clean) if scale == "relative" else torch.ones(2, 3, 1, dtype=torch.float64)
    noise = 0.1 * unit * torch.from_numpy(oracle.philox_normal(int(seed), 72)).view(2, 3, 12)
    real = mask.unsqueeze(-1)
    noise = torch.where(real, noise, 0.0)
    state = exact(clean)
    for _ in range(num_steps):
        moved = (clean.detach() + noise).requires_grad_()
        (grad,) = torch.autograd.grad(kl_loss(exact(moved), state.detach(), backend="torch"), moved)
        noise = expected(noise, grad, step, kind, scope, mask, unit)
    perturbed = torch.where(real, clean + noise, clean.detach())
    reference = sym_kl_loss(exact(perturbed), state, backend="torch")
    want = torch.autograd.grad(reference, [clean, *exact.parameters()])
    assert oracle.relative_error(loss, reference) < 1e-5
    largest = max(float(each.norm()) for each in want)  # a bias of both sides cancels to nothing
    for value, exactly in zip(got, want, strict=True):
        assert (value.double() - exactly).norm() < 1e-4 * largest


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm_fn", [inf_norm, l2_norm, l1_norm, sentence_norm(l2_norm), sentence_norm(l1_norm)])
def test_compiled(norm_fn, built):
    """One graph, the noise and the loss of eager mode."""
    torch._dynamo.reset()
    model, embed = network(), torch.randn(2, 3, 12)
    smart = SMARTLoss(
        model, kl_loss, sym_kl_loss, norm_fn, 2, 0.2, 0.3, 0.1, backend="native", update="paper", scale="relative"
    )

    def regularized(embed: Tensor) -> Tensor:
        return smart(embed, model(embed))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch.manual_seed(1)
        compiled = torch.compile(regularized, fullgraph=True, backend="aot_eager")(embed)
        torch.manual_seed(1)
        assert oracle.relative_error(compiled, regularized(embed)) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_operators_keep_their_promises(scope, built):
    """Fakes, schemas and what autograd needs of an operator."""
    embed, grad, unit = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(2, 3, 1)
    operators = torch.ops.smart_fast
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.native_perturb, (embed, torch.tensor([1]), 0.1, None, True, unit), test_utils=tests)
    norm = torch.rand(6) + 0.1 if scope == "group" else None
    common = 0.1, 0.2, "paper"
    torch.library.opcheck(
        operators.native_ascend_norm, (grad, embed, norm, None, unit, "l2", *common), test_utils=tests
    )
    torch.library.opcheck(
        operators.native_ascend, (embed, grad, embed, norm, norm, None, unit, "l2", scope, *common, 0.3, True),
        test_utils=tests,
    )  # fmt: skip
