"""Rows whose logits differ by a constant, which softmax does not see, and by little beside: against float64, and
against smart-pytorch's own gradients."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from smart_fast import jsd_loss
from smart_fast.backends import log_ratio
from smart_fast.backends.base import DIVERGENCES, DivergenceSpec
from smart_fast.losses.divergences import divergence
from tests import oracle
from tests.conftest import KERNELS, marks, serving
from tests.helpers import exhaustively

if TYPE_CHECKING:
    from smart_fast.backends.base import Backend

Result = tuple[Tensor, Tensor, Tensor]
Served = tuple["Backend", torch.device]

ALPHA = {"kl": 1.0, "sym_kl": 0.7, "js": 1.3, "jsd": 0.3}
#: Of a row each.
SHIFTS = (0.0, 0.5, -0.7, 3.0, 64.0, -64.0)
SPREAD = 1e-3
WIDTHS = [3, 1000, *exhaustively(2, 65, 1025, 5000, 30522)]

# What is tested: the contract in PyTorch, the CUDA kernels emulated, and every backend of the fixture `kernels`.
BACKENDS = ["torch", "emulated", *(pytest.param(each, marks=marks(each)) for each in KERNELS)]


@pytest.fixture(params=BACKENDS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with contextlib.ExitStack() as stack:
        if request.param == "torch":
            yield log_ratio, torch.device("cpu")  # type: ignore[misc]
        elif request.param == "emulated":
            yield request.getfixturevalue("emulated"), torch.device("cpu")
        else:
            yield stack.enter_context(serving(request, request.param))


def shifted(width: int, spread: float = SPREAD, shifts: tuple[float, ...] = SHIFTS) -> tuple[Tensor, Tensor]:
    """Rows ``[2, 3, width]``, each with a shift of its own."""
    t = torch.randn(len(shifts), width)
    x = t + torch.tensor(shifts).unsqueeze(-1) + spread * torch.randn(len(shifts), width)
    return x.view(2, -1, width), t.view(2, -1, width)


def compute(served: Served, spec: DivergenceSpec, x: Tensor, t: Tensor) -> Result:
    """Losses, and their gradients to both sides."""
    backend, device = served
    x, t = x.to(device), t.to(device)
    loss, stats = backend.divergence_forward(x, t, spec, None, True, True)
    assert stats is not None
    dx, dt = backend.divergence_backward(torch.ones_like(loss), x, t, stats, spec, None, True, True)
    assert dx is not None
    assert dt is not None
    return loss.cpu(), dx.cpu(), dt.cpu()


def exact(spec: DivergenceSpec, x: Tensor, t: Tensor) -> Result:
    x = x.double() + t.double() if spec.from_difference else x
    scaled = x.double() * spec.scale, t.double() * spec.scale
    of = oracle.divergence_terms if spec.output == "terms" else oracle.divergence_rows
    loss = of(spec.kind, *scaled, spec.alpha)
    gradients = oracle.divergence_grads(spec.kind, *scaled, spec.alpha, torch.full((1,), spec.scale))
    return loss, *gradients


def errors(got: Tensor, want: Tensor) -> Tensor:
    """Of each row, relative to its largest number."""
    return (got.double() - want).abs().amax(-1) / want.abs().amax(-1).clamp_min(1e-300)


def check(got: Result, want: Result, of_losses: float, of_gradients: float, case: object = None) -> None:
    loss, *gradients = zip(got, want, strict=True)
    value, reference = loss
    assert ((value.double() - reference).abs() <= of_losses * reference.abs()).all(), case
    for side in gradients:
        assert errors(*side).max() <= of_gradients, (case, errors(*side).max())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_constant_costs_no_digits(kind: str, width: int, served: Served) -> None:
    x, t = shifted(width)
    for alpha in (1.0, ALPHA[kind]) if kind in ("sym_kl", "js") else (ALPHA[kind],):
        spec = DivergenceSpec(kind, "rows", alpha)
        check(compute(served, spec, x, t), exact(spec, x, t), 1e-5, 1e-4, spec)


@pytest.mark.parametrize("width", [3, *exhaustively(1000, 9000)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_temperatures_and_differences(kind: str, width: int, served: Served) -> None:
    x, t = shifted(width)
    for scale, relative in ((0.5, False), (2.0, True), (1.0, True), (1 / 3, False)):
        spec = DivergenceSpec(kind, "rows", ALPHA[kind], scale=scale, from_difference=relative)
        given = x - t if relative else x
        check(compute(served, spec, given, t), exact(spec, given, t), 1e-5, 1e-4, spec)


@pytest.mark.parametrize("width", [6, *exhaustively(1000, 9000)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_masked_classes(kind: str, width: int, served: Served) -> None:
    """Whatever they hold, shifted rows are what they would be without them; the first of a row among them."""
    x, t = shifted(width)
    out = torch.arange(width) % 5 < 2
    spec = DivergenceSpec(kind, "rows", ALPHA[kind])
    loss, *gradients = compute(served, spec, *(each.masked_fill(out, -math.inf) for each in (x, t)))
    assert not any(each[..., out].any() for each in gradients)
    dx, dt = (each[..., ~out] for each in gradients)
    check((loss, dx, dt), exact(spec, x[..., ~out], t[..., ~out]), 1e-5, 1e-4)


@pytest.mark.parametrize("width", [3, *exhaustively(1000)])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_terms(kind: str, width: int, served: Served) -> None:
    x, t = shifted(width)
    spec = DivergenceSpec(kind, "terms", ALPHA[kind])
    loss, *gradients = compute(served, spec, x, t)
    terms, *wanted = exact(spec, x, t)
    assert errors(loss, terms).max() < 1e-4
    for got, want in zip(gradients, wanted, strict=True):  # in PyTorch these are differences of probabilities
        assert errors(got, want).max() < 1e-3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_without_a_shift(kind: str, served: Served) -> None:
    for apart, width in itertools.product((1e-6, 1e-4, 1e-2, 0.3), (3, 1000)):
        x, t = shifted(width, apart, (0.0,) * 4)
        spec = DivergenceSpec(kind, "rows", ALPHA[kind])
        for got, want in zip(compute(served, spec, x, t), exact(spec, x, t), strict=True):
            error = oracle.relative_error(got, want)
            assert error <= 2e-6, f"{apart}, {width}: relative error {error:.1e}"


@pytest.mark.parametrize("shift", [0.0, 64.0, 0.1])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_exactly_zero(kind: str, shift: float, served: Served) -> None:
    """Equal sides, equal sides but for a constant that is added without rounding, and one class."""
    spec = DivergenceSpec(kind, "rows", ALPHA[kind])
    t = torch.randn(4, 40) if shift == 0.0 else torch.randint(-8, 8, (4, 40)).float()
    for x, y in ((t + (0.0 if shift == 0.1 else shift), t), (t[:, :1] + shift, t[:, :1])):
        assert not any(each.any() for each in compute(served, spec, x, y))


@pytest.mark.parametrize("apart", [SPREAD, 0.2, *exhaustively(3.0)])
@pytest.mark.parametrize("scale", [1.0, *exhaustively(0.5)])
@pytest.mark.parametrize("kind", ["jsd", *exhaustively("kl", "sym_kl", "js")])
def test_slices_that_choose_shifts_of_their_own(kind: str, scale: float, apart: float, served: Served) -> None:
    backend, device = served
    x, t = shifted(300, apart)
    x[..., 100:150] = t[..., 100:150] = -math.inf  # a slice without finite logits
    x[..., 150:200] += 0.3  # and one whose shift is another
    spec = DivergenceSpec(kind, "rows", ALPHA[kind], scale=scale)
    slices = [slice(0, 100), slice(100, 150), slice(150, 200), slice(200, 203), slice(203, 300)]
    sides = [(x[..., each].to(device), t[..., each].to(device)) for each in slices]
    stats = log_ratio.merge(torch.stack([backend.divergence_parts(*side, spec, None) for side in sides]), scale)
    sums = torch.stack([backend.divergence_finish(*side, stats, spec, None) for side in sides]).sum(0)
    stats[:, log_ratio.SUMS] = sums
    losses = divergence(kind).rows(sums, spec.alpha).view(2, 3)
    pieces = [
        backend.divergence_backward(torch.ones_like(losses), *side, stats, spec, None, True, True) for side in sides
    ]
    gradients = (torch.cat(each, -1).cpu() for each in zip(*pieces, strict=True))
    real = torch.tensor([True]).repeat(300)
    real[100:150] = False
    dx, dt = (each[..., real] for each in gradients)
    check((losses.cpu(), dx, dt), exact(spec, x[..., real], t[..., real]), 1e-5, 1e-4)


@pytest.mark.parametrize("width", [3, 1000])
def test_jsd_in_pytorch(width: int) -> None:
    """Its formulas in differentiable operations."""
    sides = [each.requires_grad_() for each in shifted(width)]
    terms = jsd_loss(*sides, "none", 0.3, backend="torch")
    gradients = torch.autograd.grad(terms.sum(), sides)
    spec = DivergenceSpec("jsd", "rows", 0.3)
    check((terms.sum(-1).detach(), *gradients), exact(spec, *(each.detach() for each in sides)), 1e-5, 1e-4)


# ---- never much worse than smart-pytorch -----------------------------------------------------------------------------

SCALES = (0.1, 1.0, 10.0, 30.0, 100.0)
VOCABULARIES = (2, 3, 10, 100, 1000, 5000)
DIFFERENCES = ("independent", "outlier", "scaled", "shifted", "reversed")
FAMILIES = list(itertools.product(DIFFERENCES, SCALES, VOCABULARIES))
#: A few of every kind of difference, every size and every width among them.
FEW = [each for index, each in enumerate(FAMILIES) if index % 11 == 0]
#: Rounding that nobody avoids: of probabilities, which are at most one, and of a divergence where a gradient is its
#: difference from log-ratios of that size.
FLOOR = 4 * 2.0**-24


def family(difference: str, size: float, width: int) -> tuple[Tensor, Tensor]:
    t = size * torch.randn(8, width)
    noise = size * torch.randn(8, width)
    if difference == "independent":
        return noise, t
    if difference == "outlier":
        x = t + 1e-3 * noise
        x[:, 0] += 0.9 * size
        return x, t
    if difference == "scaled":
        return 1.05 * t, t
    if difference == "shifted":
        return t + 64.0 * torch.randn(8, 1) + 1e-2 * noise, t
    return -t, t


def of_smart_pytorch(spec: DivergenceSpec, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    sides = [each.detach().clone().requires_grad_() for each in (x, t)]
    dx, dt = torch.autograd.grad(divergence(spec.kind).reference(*sides, "sum", spec.alpha), sides)
    return dx, dt


@pytest.mark.parametrize(
    ("difference", "size", "width"), [*FEW, *exhaustively(*(each for each in FAMILIES if each not in FEW))]
)
def test_no_gradient_is_three_times_worse(difference: str, size: float, width: int, served: Served) -> None:
    x, t = family(difference, size, width)
    if getattr(served[0], "name", "") == "triton" and served[1].type == "cpu":  # interpreted, which takes seconds
        if width > 100 and FAMILIES.index((difference, size, width)) % 33 != 0:
            pytest.skip("interpreted kernels see a few of the wide rows")
        x, t = x[:2], t[:2]
    for kind in DIVERGENCES:
        spec = DivergenceSpec(kind, "rows", ALPHA[kind])
        _, *got = compute(served, spec, x, t)
        losses, *want = exact(spec, x, t)
        floor = FLOOR * max(1.0, float(losses.max()))
        for side, ours, theirs, reference in zip("xt", got, of_smart_pytorch(spec, x, t), want, strict=True):
            found, known = ((each.double() - reference).abs().max() for each in (ours, theirs))
            allowed = 3.0 * float(known.nan_to_num(math.inf)) + floor  # theirs may be NaN
            assert found <= allowed, f"{kind}, gradient to {side}: {found:.1e} > {allowed:.1e}"
