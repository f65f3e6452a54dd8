"""The divergence operations of a backend, called directly: forms of the loss, widths, scaled and relative logits, rows
in slices. Against float64; what the losses of `smart_fast.loss` use of them is in test_divergence_kernels.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from smart_fast.backends.base import DIVERGENCES, PARTS, DivergenceSpec
from tests import oracle
from tests.helpers import exhaustively

KINDS = DIVERGENCES
OUTPUTS = ("terms", "rows", "sum")
WIDTHS = (1, 2, 7, 1000)
WIDER = (32000, 50257, 128256, 151936, 262144)

Result = tuple[Tensor, Tensor, Tensor]
Scales = tuple[Tensor | None, Tensor | None, Tensor | None]
NAMES = ("loss", "gradient to input", "gradient to target")


@pytest.fixture(params=["whole rows", "shared rows"])
def path(request: pytest.FixtureRequest, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's two ways through a row, wherever its width or the number of rows would have chosen the other."""
    if backend.name != "triton":
        if request.param != "whole rows":
            pytest.skip("a choice of the Triton backend")
        yield
        return
    from smart_fast.kernels import launch

    def shared(rows: int, width: int, processors: int) -> launch.Tile:
        return launch.Tile(2, max(4, launch.next_power_of_two(width) // 8), 2, 1)

    def whole(rows: int, width: int, processors: int) -> launch.Tile:
        return launch.row_tile(width)

    monkeypatch.setattr(launch, "split_tile", whole if request.param == "whole rows" else shared)
    yield


def pair(shape: tuple[int, ...], apart: float, device: torch.device, relative: bool = False) -> tuple[Tensor, Tensor]:
    """(input, target) as a spec takes them; ``apart`` is the size of the logits' difference."""
    t = torch.randn(shape)
    d = apart * torch.randn(shape)
    return (d if relative else t + d).to(device), t.to(device)


def upstream(output: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand({"terms": shape, "rows": shape[:-1], "sum": ()}[output]).add(0.5).to(device)


def compute(
    backend: ModuleType, spec: DivergenceSpec, input: Tensor, target: Tensor, grad: Tensor, mask: Tensor | None = None
) -> Result:
    loss, stats = backend.divergence_forward(input, target, spec, mask, True, True)
    d_input, d_target = backend.divergence_backward(grad, input, target, stats, spec, mask, True, True)
    return loss, d_input, d_target


def expected(spec: DivergenceSpec, input: Tensor, target: Tensor, grad: Tensor, mask: Tensor | None = None) -> Result:
    alpha = 1.0 if spec.kind == "kl" else spec.alpha
    t = target.cpu().double()
    x = input.cpu().double() + (t if spec.from_difference else 0.0)
    x, t, g = x * spec.scale, t * spec.scale, grad.cpu().double() * spec.scale
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
    if spec.output == "terms":
        loss = torch.where(keep.unsqueeze(-1), oracle.divergence_terms(spec.kind, x, t, alpha), 0.0)
    else:
        loss = spec.weight * torch.where(keep, oracle.divergence_rows(spec.kind, x, t, alpha), 0.0)
        g = spec.weight * (g.unsqueeze(-1) if spec.output == "rows" else g)
    if spec.output == "sum":
        loss = loss.sum()
    gradients = oracle.divergence_grads(spec.kind, x, t, alpha, g)
    return loss, *(torch.where(keep.unsqueeze(-1), each, 0.0) for each in gradients)


def check(got: Result, want: Result, tolerance: float, scales: Scales = (None, None, None)) -> None:
    for name, value, reference, scale in zip(NAMES, got, want, scales, strict=True):
        assert value.shape == reference.shape
        error = oracle.relative_error(value, reference, scale)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize("width", [*WIDTHS, *exhaustively(*WIDER)])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind: str, width: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    # Every form where that is quick, else each form with one divergence at least.
    wide = width > 1000
    outputs = (OUTPUTS[(KINDS.index(kind) + (WIDTHS + WIDER).index(width)) % 3],) if wide else OUTPUTS
    for output in outputs:
        shape = (1 + width % 2 if wide else max(3, 64 // width), width)
        x, t = pair(shape, 0.3, device)
        spec = DivergenceSpec(kind, output, 0.7, 0.4)
        g = upstream(output, shape, device)
        got = compute(backend, spec, x, t, g)
        if width == 1:
            assert not any(each.any() for each in got)
        else:
            check(got, expected(spec, x, t, g), 2e-6)


@pytest.mark.parametrize("apart", [20.0, *exhaustively(1e-5, 1.0)])
@pytest.mark.parametrize("width", [33, *exhaustively(9000)])
@pytest.mark.parametrize("kind", ["sym_kl", *exhaustively("kl", "js", "jsd")])
def test_both_paths_are_exact(
    kind: str, width: int, apart: float, backend: ModuleType, device: torch.device, path: None, poison: None
) -> None:
    x, t = pair((3, width), apart, device)
    for output in OUTPUTS:
        spec = DivergenceSpec(kind, output, 0.6, 2.0)
        g = torch.ones((), device=device) if output == "sum" else torch.ones((), device=device).expand(3)
        g = torch.ones((3, 1), device=device).expand(3, width) if output == "terms" else g
        weight = torch.tensor(1.0 if output == "terms" else spec.weight)
        scales = oracle.gradient_scales(kind, x.cpu(), t.cpu(), spec.alpha, weight)
        check(compute(backend, spec, x, t, g), expected(spec, x, t, g), 2e-6, (None, *scales))


@pytest.mark.parametrize(("scale", "relative"), [(0.5, True), *exhaustively((0.5, False), (1.0, True))])
@pytest.mark.parametrize("kind", ["jsd", *exhaustively("kl", "sym_kl", "js")])
@pytest.mark.parametrize("output", ["rows", *exhaustively(*(each for each in OUTPUTS if each != "rows"))])
def test_scaled_and_relative(
    output: str,
    kind: str,
    scale: float,
    relative: bool,
    backend: ModuleType,
    device: torch.device,
    path: None,
    poison: None,
) -> None:
    shape = (2, 3, 70)
    mask = torch.tensor([[True, True, False], [False, False, True]], device=device)
    spec = DivergenceSpec(kind, output, 0.7, 0.3, scale, relative)
    any_g = upstream(output, shape, device)
    # Gradients of a constant upstream gradient are of the size of x - t.
    constant = torch.full((), 1.5, device=device).expand(any_g.shape)
    for apart, g, garbage in ((1e-5, constant, math.nan), (0.5, any_g, math.inf)):
        x, t = pair(shape, apart, device, relative)
        dirty = [torch.where(mask.unsqueeze(-1), each, garbage) for each in (x, t)]
        check(compute(backend, spec, *dirty, g, mask), expected(spec, x, t, g, mask), 2e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_relative_bfloat16(kind: str, backend: ModuleType, device: torch.device, path: None, poison: None) -> None:
    """The difference of two projections of bf16 keeps what the projections themselves round away."""
    d, t = pair((4, 500), 1e-4, device, relative=True)
    d, t = d.bfloat16(), (4 * t).bfloat16()
    one = torch.ones((), device=device)
    spec = DivergenceSpec(kind, "rows", 0.6, from_difference=True)
    want = expected(spec, d, t, one.expand(4))
    got = compute(backend, spec, d, t, one.expand(4))
    assert got[1].dtype == got[2].dtype == torch.bfloat16
    assert oracle.relative_error(got[0], want[0]) < 2e-6
    assert oracle.relative_error(got[1], want[1]) < 2**-7
    assert oracle.relative_error(got[2], want[2]) < 2**-7
    drowned, _ = backend.divergence_forward((t + d), t, spec._replace(from_difference=False), None, False, False)
    assert oracle.relative_error(drowned, want[0]) > 0.5
    loss, _ = backend.divergence_forward(d, t.float(), spec._replace(output="terms"), None, False, False)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("relative", [True, *exhaustively(False)])
@pytest.mark.parametrize("kind", ["sym_kl", *exhaustively("kl", "js", "jsd")])
def test_classes_that_are_masked(
    kind: str, relative: bool, backend: ModuleType, device: torch.device, path: None, poison: None
) -> None:
    """Minus infinity in the target (and in the input, unless that is relative): as if the class were not there."""
    x, t = pair((3, 40), 0.5, device, relative)
    some = torch.arange(40, device=device) < 17  # whole slices of the row
    for output, garbage in itertools.product(OUTPUTS, (math.nan, math.inf) if relative else (-math.inf,)):
        spec = DivergenceSpec(kind, output, 0.5, scale=2.0, from_difference=relative)
        g = upstream(output, (3, 40), device)
        got = compute(backend, spec, x.masked_fill(some, garbage), t.masked_fill(some, -math.inf), g)
        want = expected(spec, x[:, ~some], t[:, ~some], g[:, ~some] if output == "terms" else g)
        kept = got if output == "terms" else got[1:]
        assert not any(each[:, some].any() for each in kept)
        check(tuple(each[:, ~some] if each.shape == x.shape else each for each in got), want, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows(kind: str, backend: ModuleType, device: torch.device, path: None, poison: None) -> None:
    x, t = pair((4, 50), 0.5, device)
    x[0] = t[0]
    x[1, 40] = -math.inf  # target puts mass where the input has none
    x[2] = t[2] = -math.inf  # as softmax of such a row
    loss, _ = backend.divergence_forward(x, t, DivergenceSpec(kind, "rows", 0.6), None, True, True)
    assert loss[0] == 0
    assert loss[1].isfinite() if kind == "jsd" else loss[1] == math.inf
    assert loss[2].isnan()
    assert loss[3].isfinite()


@pytest.mark.parametrize("width", [5, *exhaustively(2100)])
@pytest.mark.parametrize("kind", KINDS)
def test_row_gradients(kind: str, width: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    """Of any strides, to logits of any strides."""
    shape = (2, 3, 2, width)
    x, t = pair(shape, 0.5, device)
    views = {
        "contiguous": torch.rand(2, 3, 2),
        "and so for other logits": torch.rand(2, 3, 2),
        "transposed": torch.rand(2, 3, 2).permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "sliced": torch.rand(2, 6, 5)[:, ::2, 1:3],
        "one for all": torch.rand(()).expand(2, 3, 2),
        "one a batch": torch.rand(2, 1, 1).expand(2, 3, 2),
        "half": torch.rand(2, 3, 2).bfloat16(),
    }
    spec = DivergenceSpec(kind, "rows", 0.7, 0.1)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    for g, left in zip(views.values(), itertools.cycle((x, swapped))):
        g = g.to(device)
        check(compute(backend, spec, left, t, g), expected(spec, left, t, g), 2e-6)


@pytest.mark.exhaustive
def test_loss_alone(backend: ModuleType, device: torch.device, path: None, poison: None) -> None:
    x, t = pair((3, 90), 0.5, device)
    for output in OUTPUTS:
        spec = DivergenceSpec("js", output, 0.7)
        loss, stats = backend.divergence_forward(x, t, spec, None, False, False)
        assert stats is None
        torch.testing.assert_close(loss, backend.divergence_forward(x, t, spec, None, True, False)[0])


def test_one_dimension(backend: ModuleType, device: torch.device, path: None, poison: None) -> None:
    x, t = pair((90,), 0.5, device)
    for output in OUTPUTS:
        spec = DivergenceSpec("sym_kl", output, 0.7)
        g = upstream(output, (90,), device)
        check(compute(backend, spec, x, t, g), expected(spec, x, t, g), 2e-6)


def merge(parts: list[Tensor], scale: float) -> Tensor:
    """Row statistics from the partial ones of slices of the vocabulary, in float64 from the contract's definitions."""
    max_x, sum_x, max_t, sum_t, max_d, shift, expm1 = torch.stack(parts).double().unbind(-1)
    top_x, top_t = max_x.amax(0), max_t.amax(0)
    total_x, total_t = (sum_x * (max_x - top_x).exp()).sum(0), (sum_t * (max_t - top_t).exp()).sum(0)
    common = shift[0]  # of any slice with a finite logit
    s = torch.where(max_t > -math.inf, (shift - common) * scale, 0.0)
    expm1 = s.exp() * expm1 + s.expm1() * sum_t
    near = (max_d + s.abs()).amax(0) <= 1
    known = ((expm1 * (max_t - top_t).exp()).sum(0) / total_t).log1p()
    ratio = torch.where(near, known, top_x - top_t + (total_x / total_t).log())
    unknown = torch.full_like(ratio, math.nan)
    columns = [top_t, 1 / total_t, top_x, 1 / total_x, torch.where(near, common, 0.0), ratio, unknown, unknown]
    return torch.stack(columns, -1).float()


@pytest.mark.parametrize("apart", [0.2, *exhaustively(1e-5, 3.0)])
@pytest.mark.parametrize("relative", [False, *exhaustively(True)])
@pytest.mark.parametrize("kind", ["jsd", *exhaustively("kl", "sym_kl", "js")])
def test_slices_of_the_vocabulary(
    kind: str, relative: bool, apart: float, backend: ModuleType, device: torch.device, path: None, poison: None
) -> None:
    """Measure every slice, merge, finish every slice: the row; and gradients of a slice."""
    shape = (2, 3, 300)
    x, t = pair(shape, apart, device, relative)
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)
    x, t = torch.where(mask.unsqueeze(-1), x, math.nan), torch.where(mask.unsqueeze(-1), t, math.nan)
    t[..., 100:200][mask] = -math.inf  # a slice without finite logits
    if not relative:
        x[..., 100:200][mask] = -math.inf
    spec = DivergenceSpec(kind, "rows", 0.7, 0.4, 2.0, relative)
    g = upstream("rows", shape, device)
    real = torch.ones(300, dtype=torch.bool)
    real[100:200] = False
    want = expected(spec, x[..., real], t[..., real], g, mask)

    slices = [slice(0, 100), slice(100, 200), slice(200, 203), slice(203, 300)]
    parts = [backend.divergence_parts(x[..., each], t[..., each], spec, mask) for each in slices]
    flat = mask.flatten()
    assert all(part.shape == (6, PARTS) and part[~flat].isfinite().all() for part in parts)
    assert (parts[1][flat][:, [0, 2]] == -math.inf).all()
    assert not parts[1][flat][:, [1, 3, 4, 5, 6]].any()
    stats = merge(parts, spec.scale)
    sums = [backend.divergence_finish(x[..., each], t[..., each], stats, spec, mask) for each in slices]
    assert all(each.shape == (6, 2) for each in sums)
    assert not sums[1].any()
    first, second = sum(sums).unbind(-1)
    if kind == "jsd":
        assert (second[flat] > 0).all()
    else:
        assert not second.any()
    if kind in ("kl", "jsd"):  # gradients take the divergences of the whole row
        stats[:, 6:] = torch.stack([first, second], -1)
    loss = spec.weight * (spec.alpha * first + (1 - spec.alpha) * second if kind == "jsd" else first).view(2, 3)
    pieces = [
        backend.divergence_backward(g, x[..., each], t[..., each], stats, spec, mask, True, True) for each in slices
    ]
    d_input, d_target = (torch.cat(side, -1) for side in zip(*pieces, strict=True))
    assert not d_input[..., 100:200].any()
    assert not d_target[..., 100:200].any()
    check((loss, d_input[..., real], d_target[..., real]), want, 2e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [3, *exhaustively(2, 9000)])
def test_nothing_is_read_of_masked_rows(
    width: int, backend: ModuleType, device: torch.device, path: None, poison: None
) -> None:
    x, t = (torch.full((70 if width < 10 else 3, width), math.nan, device=device) for _ in range(2))
    mask = torch.zeros(x.shape[:1], dtype=torch.bool, device=device)
    for kind, output in zip(DIVERGENCES, itertools.cycle(OUTPUTS), strict=False):
        g = torch.full_like(upstream(output, x.shape, device), math.nan if output == "rows" else 1.0)
        spec = DivergenceSpec(kind, output)
        assert not any(each.any() for each in compute(backend, spec, x, t, g, mask))
