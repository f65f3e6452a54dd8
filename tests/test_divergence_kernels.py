"""The divergence kernels against float64: values, gradients, shapes, strides, dtypes, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import smart_fast
from smart_fast.backends import default_backend
from tests import oracle
from tests.helpers import FEW_KINDS, exhaustively

LOSSES = {
    "kl": smart_fast.kl_loss,
    "sym_kl": smart_fast.sym_kl_loss,
    "js": smart_fast.js_loss,
    "jsd": smart_fast.jsd_loss,
}
KINDS = sorted(LOSSES)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
NAMES = ("loss", "gradient to input", "gradient to target")

# A fallback to PyTorch would make these tests compare PyTorch with itself.
pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")


def parameter(kind: str, alpha: float) -> dict[str, float]:
    """What a loss takes for an ``alpha`` from 0 to 3. The beta of jsd lies between 0 and 1."""
    return {"kl": {}, "jsd": {"beta": 0.1 + 0.25 * alpha}}.get(kind, {"alpha": alpha})


def loss_and_grads(
    kind: str, x: Tensor, t: Tensor, reduction: str = "sum", alpha: float = 1.0, upstream: Tensor | None = None,
    **options: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss of the kernels, and its gradients to both sides under ``upstream`` (default: ones)."""
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    loss = LOSSES[kind](x, t, reduction=reduction, **parameter(kind, alpha), **options)
    dx, dt = torch.autograd.grad(loss, (x, t), torch.ones_like(loss) if upstream is None else upstream)
    assert dx.dtype == x.dtype
    assert dt.dtype == t.dtype
    return loss, dx, dt


def expected(
    kind: str, x: Tensor, t: Tensor, reduction: str, alpha: float, upstream: Tensor | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64."""
    alpha = next(iter(parameter(kind, alpha).values()), 1.0)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu()
    x, t, rows = x.detach().cpu(), t.detach().cpu(), keep.unsqueeze(-1)
    weight = {"none": 1.0, "sum": 1.0, "batchmean": 1 / x.size(0), "mean": 1 / max(1, int(keep.sum()) * x.size(-1))}
    g = torch.ones(1, dtype=torch.float64) if upstream is None else upstream.cpu().double()
    if reduction == "none":
        loss = oracle.divergence_terms(kind, x, t, alpha)
        loss = torch.where(rows, loss, 0.0)
    else:
        loss = torch.where(keep, oracle.divergence_rows(kind, x, t, alpha), 0.0).sum() * weight[reduction]
    dx, dt = oracle.divergence_grads(kind, x, t, alpha, g * weight[reduction])
    return loss, torch.where(rows, dx, 0.0), torch.where(rows, dt, 0.0)


def check(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float,
    scales: tuple[Tensor | None, ...] = (None, None, None),
) -> None:  # fmt: skip
    count = len(got)
    for name, value, reference, scale in zip(NAMES[:count], got, want, scales[:count], strict=True):
        error = oracle.relative_error(value, reference, scale)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def pair(shape: tuple[int, ...], apart: float, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator)
    x = t + apart * torch.randn(shape, generator=generator)
    return x.to(device, dtype), t.to(device, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [3, 1000, *exhaustively(2, 17, 8193)])
def test_float64_agreement(kind: str, width: int, reduction: str, device: torch.device, poison: None) -> None:
    # Relative to the length of a gradient of at least 64 numbers: single ones may cancel.
    x, t = pair((max(3, 64 // width), width), 1.0, device)
    g = torch.rand_like(x) if reduction == "none" else torch.tensor(1.7, device=device)
    got = loss_and_grads(kind, x, t, reduction, 0.7, g)
    check(got, expected(kind, x, t, reduction, 0.7, g), 2e-6)


@pytest.mark.parametrize("apart", [1e-3, *exhaustively(1e-5, 1.0)])
@pytest.mark.parametrize("width", [30522, *exhaustively(128256)])
@pytest.mark.parametrize("kind", ["sym_kl", *exhaustively("kl", "js", "jsd")])
def test_vocabulary(kind: str, width: int, apart: float, device: torch.device, poison: None) -> None:
    x, t = pair((2, width), apart, device)
    got = loss_and_grads(kind, x, t, "batchmean")
    assert got[0] > 0
    check(got, expected(kind, x, t, "batchmean", 1.0, None), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *exhaustively(torch.float32)])
@pytest.mark.parametrize("width", [259, 2045, *exhaustively(8191, 8197)])
@pytest.mark.parametrize(("apart", "masked"), [(1e-2, False), (3.0, True), *exhaustively((1e-2, True), (3.0, False))])
def test_rows_that_begin_within_16_bytes(
    masked: bool, apart: float, width: int, dtype: torch.dtype, device: torch.device, poison: None
) -> None:
    """Loads and stores of 16 bytes hold parts of two rows: neither takes what belongs to the other."""
    x, t = pair((8, width), apart, device, dtype)
    x[3], t[5] = x[3] + 40, t[5] - 40  # what would show next door
    mask = torch.arange(8, device=device) % 3 != 1
    options = {"mask": mask} if masked else {}
    g = torch.tensor(1.7, device=device)
    for kind in ("sym_kl", "jsd"):
        got = loss_and_grads(kind, x, t, "mean", 0.7, g, **options)
        want = expected(kind, x, t, "mean", 0.7, g, options.get("mask"))
        ulp = 2**-7 if dtype is torch.bfloat16 else 0.0
        check(got[:1], want[:1], 2e-6)
        for value, reference in zip(got[1:], want[1:], strict=True):
            rows = (value.cpu().double() - reference).abs().amax(-1)
            assert (rows <= (2e-6 + ulp) * reference.abs().amax(-1)).all()


@pytest.mark.parametrize("kind", ["sym_kl", *exhaustively("kl", "js", "jsd")])
def test_a_first_block_that_is_unlike_the_row(kind: str, device: torch.device, poison: None) -> None:
    """What is taken from the first columns, a reference for exponentials and a typical difference, is no guide here."""
    x, t = pair((3, 9000), 1e-2, device)
    t[0, 8500:] += 80  # exponentials relative to the first columns overflow
    x[0, 8500:] += 80
    x[1, 4500:] += 0.3  # differences are typical of half of the row
    got = loss_and_grads(kind, x, t, "sum", 0.7)
    check(got, expected(kind, x, t, "sum", 0.7, None), 3e-6)
    x[2, :8500] = t[2, :8500] = -math.inf  # and exponentials relative to nothing vanish
    t[2, 8500:] -= 80
    x[2, 8500:] = t[2, 8500:] + 1e-5 * torch.randn(500, device=device)
    got = loss_and_grads(kind, x[2:], t[2:], "sum", 0.7)
    check(got[:1], expected(kind, x[2:, 8500:], t[2:, 8500:], "sum", 0.7, None)[:1], 3e-6)
    x, t = pair((3, 9000), 1e-2, device)
    x[2, 8999] += 200  # the row is far, which the first columns do not show
    got = loss_and_grads(kind, x, t, "sum", 0.7)
    check(got[:1], expected(kind, x, t, "sum", 0.7, None)[:1], 3e-6)
    assert all(each.isfinite().all() for each in got[1:])


@pytest.mark.parametrize("width", [1, *exhaustively(262144)])
@pytest.mark.parametrize("kind", KINDS)
def test_narrowest_and_widest(kind: str, width: int, device: torch.device, poison: None) -> None:
    x, t = pair((1, width), 1.0, device)
    loss, dx, dt = loss_and_grads(kind, x, t)
    if width == 1:
        assert loss == 0
        assert not dx.any()
        assert not dt.any()
    else:
        check((loss, dx, dt), expected(kind, x, t, "sum", 1.0, None), 2e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("apart", [1e-6, 1e-2, *exhaustively(1e-5, 1e-4)])
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_nearly_equal(kind: str, apart: float, reduction: str, device: torch.device, poison: None) -> None:
    x, t = pair((4, 1000), apart, device)
    got = loss_and_grads(kind, x, t, reduction, 0.5)
    check(got, expected(kind, x, t, reduction, 0.5, None), 2e-6)
    if reduction == "sum":
        assert got[0] > 0


@pytest.mark.parametrize("width", [3, 5000, *exhaustively(50, 1000)])
@pytest.mark.parametrize("kind", ["js", *exhaustively("kl", "sym_kl", "jsd")])
def test_where_one_reading_is_enough_and_where_not(
    kind: str, width: int, device: torch.device, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, of flat and of peaked rows, from differences whose moments tell them to those that take a second walk;
    and where the first block is a bad guide to the mean difference. (Gradients come from the same walk either way.)
    """
    if default_backend() == "triton" and device.type == "cpu":
        from smart_fast.kernels import launch

        # Rows of several blocks that one program reads, though they are not wide.
        def tile(width: int) -> launch.Tile:
            return launch.Tile(1, 1024, -(-width // 1024), 4) if width > 1024 else launch.row_tile(width)

        monkeypatch.setitem(launch.DEFAULTS, "divergence_forward", tile)
    for size in (3e-3, 2e-2, 6e-2, 0.12):
        x, t = pair((3, width), size, device)
        t[1] *= 6
        x[1] = t[1] + size * torch.randn(width, device=device)
        x[2, width // 2 :] += size / 4
        got = loss_and_grads(kind, x, t, "sum", 0.7)
        check(got[:1], expected(kind, x, t, "sum", 0.7, None)[:1], 2e-6)
    _, t = pair((1, width), 1e-3, device)
    t = t / 8
    x = t + 1e-3 * torch.randn(1, width, device=device)
    x[:, width - width * 2 // 5 :] += 0.09  # near, but for moments about the first block the mean is too far off
    got = loss_and_grads(kind, x, t, "sum", 0.7)
    check(got[:1], expected(kind, x, t, "sum", 0.7, None)[:1], 2e-6)


def test_reference_cancels_where_we_do_not(device: torch.device) -> None:
    """What the formulas are for: smart-pytorch's sum in fp32 is off by more than its own value."""
    x, t = pair((8, 1000), 1e-5, device)
    exact = oracle.divergence_rows("kl", x.cpu(), t.cpu(), 1.0).sum()
    theirs = smart_fast.kl_loss(x, t, reduction="sum", backend="torch")
    ours = smart_fast.kl_loss(x, t, reduction="sum")
    assert oracle.relative_error(theirs, exact) > 1.0
    assert oracle.relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize("kind", ["jsd", *exhaustively("kl", "sym_kl", "js")])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (2, 3, 5), (2, 3, 2, 5), (2, 1, 3, 2, 5)])
def test_dimensions(kind: str, shape: tuple[int, ...], device: torch.device, poison: None) -> None:
    x, t = pair(shape, 0.5, device)
    for reduction in REDUCTIONS:
        check(loss_and_grads(kind, x, t, reduction), expected(kind, x, t, reduction, 1.0, None), 2e-6)


VIEWS = {
    "transposed": lambda base: base[:, :, :3, :].transpose(0, 1),
    "permuted": lambda base: base.permute(2, 1, 0, 3),
    "sliced": lambda base: base[:, 1:, ::2, 2:9],
    "expanded": lambda base: base[:1].expand(4, -1, -1, -1),
    "last dimension strided": lambda base: base[..., ::2],
    "last dimension first": lambda base: base.transpose(0, 3),
    "reversed five dimensions": lambda base: base.unflatten(3, (2, 8)).permute(3, 2, 1, 0, 4),
}

FEW_VIEWS = ["permuted", "expanded", "last dimension strided"]


@pytest.mark.parametrize("reduction", ["none", *exhaustively("sum")])
@pytest.mark.parametrize("view", [*FEW_VIEWS, *exhaustively(*(each for each in VIEWS if each not in FEW_VIEWS))])
def test_strides(view: str, reduction: str, device: torch.device, poison: None) -> None:
    x, _ = pair((4, 5, 6, 16), 0.0, device)
    _, t = pair((4, 5, 6, 16), 0.0, device, seed=1)
    x, t = VIEWS[view](x), VIEWS[view](t).contiguous()
    g = torch.rand(x.shape, device=device).transpose(0, 1).contiguous().transpose(0, 1) if reduction == "none" else None
    for left, right in ((x, t), (t, x), (x, VIEWS[view](torch.rand(4, 5, 6, 16, device=device)))):
        got = loss_and_grads("sym_kl", left, right, reduction, 0.3, g)
        check(got, expected("sym_kl", left, right, reduction, 0.3, g), 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients(kind: str, device: torch.device, poison: None) -> None:
    """Any strides, stride 0 included, and constants that must cancel."""
    x, t = pair((3, 4, 50), 1e-4, device)
    row = torch.rand(3, 4, 1, device=device)
    one = torch.ones((), device=device)
    for g in (row.expand(3, 4, 50), one.expand(3, 4, 50), torch.rand(50, 4, 3, device=device).permute(2, 1, 0)):
        got = loss_and_grads(kind, x, t, "none", 1.0, g)
        # A constant upstream gives gradients of the size of x - t; any other of the size of p.
        check(got, expected(kind, x, t, "none", 1.0, g), 5e-6)


@pytest.mark.parametrize("reduction", ["mean", *exhaustively("none", "sum", "batchmean")])
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_mask(kind: str, reduction: str, device: torch.device, poison: None) -> None:
    """Masked rows count for nothing, whatever they hold."""
    x, t = pair((4, 6, 33), 1.0, device)
    mask = torch.rand(4, 6, device=device) < 0.6
    g = torch.rand_like(x) if reduction == "none" else torch.tensor(0.3, device=device)
    want = expected(kind, x, t, reduction, 0.4, g, mask)
    for garbage in (math.nan, math.inf, 1e30):
        dirty = torch.where(mask.unsqueeze(-1), x, garbage)
        check(loss_and_grads(kind, dirty, t, reduction, 0.4, g, mask=mask), want, 2e-6)
    strided = torch.stack([mask, ~mask], -1)[..., 0]
    check(loss_and_grads(kind, x, t, reduction, 0.4, g, mask=strided), want, 2e-6)
    nothing = loss_and_grads(kind, x, t, reduction, 0.4, g, mask=torch.zeros_like(mask))
    assert all(not each.any() for each in nothing)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtypes", ["bf16 bf16", "fp16 fp16", "bf16 fp32", "fp32 fp16"])
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_half_precision(kind: str, dtypes: str, reduction: str, device: torch.device, poison: None) -> None:
    """Arithmetic is fp32: the only error is the rounding of what is written."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    left, right = (names[name] for name in dtypes.split())
    x, t = pair((3, 100), 1.0, device)
    x, t = x.to(left), t.to(right)
    loss, dx, dt = loss_and_grads(kind, x, t, reduction)
    want = expected(kind, x, t, reduction, 1.0, None)
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}
    assert loss.dtype == (torch.float32 if reduction == "sum" else torch.promote_types(left, right))
    for value, reference in zip((loss, dx, dt), want, strict=True):
        assert oracle.relative_error(value, reference) <= ulp[value.dtype]


@pytest.mark.parametrize("apart", [20.0, 200.0])
@pytest.mark.parametrize("kind", KINDS)
def test_far_apart(kind: str, apart: float, device: torch.device, poison: None) -> None:
    """Probabilities underflow in fp32 (the reference's kl gradient to the target is then NaN)."""
    x, t = pair((4, 50), apart, device)
    got = loss_and_grads(kind, x, t)
    want = expected(kind, x, t, "sum", 1.0, None)
    if kind == "jsd":
        # Of one class alone, v + KL(p || m) is a difference of equal numbers below log(1 / beta), as fp32 has them.
        check(got[:1], want[:1], 2e-6)
        assert all((value.cpu() - exact).abs().max() < 2e-7 for value, exact in zip(got[1:], want[1:], strict=True))
        return
    # A KL of several hundred next to a log-ratio of the same size: fp32 keeps five digits of their difference.
    check(got, want, 2e-6 if apart < 100 else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_are_exactly_zero(kind: str, device: torch.device, poison: None) -> None:
    _, t = pair((5, 300), 0.0, device)
    for reduction in ("sum", "none"):
        assert all(not each.any() for each in loss_and_grads(kind, t.clone(), t, reduction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_masked_classes(kind: str, reduction: str, device: torch.device, poison: None) -> None:
    """-inf on both sides: as if the class were not there."""
    x, t = pair((3, 40), 0.5, device)
    some = torch.arange(40, device=device) % 3 == 0
    got = loss_and_grads(kind, x.masked_fill(some, -math.inf), t.masked_fill(some, -math.inf), reduction)
    want = expected(kind, x[:, ~some], t[:, ~some], reduction, 1.0, None)
    kept = got if reduction == "none" else got[1:]
    assert all(not each[:, some].any() for each in kept)
    check(tuple(each[:, ~some] if each.dim() else each for each in got), want, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_divergence_and_dead_rows(kind: str, device: torch.device) -> None:
    x, t = pair((3, 10), 0.5, device)
    one_sided = x.clone()
    one_sided[1, 4] = -math.inf
    loss = loss_and_grads(kind, one_sided, t)[0]
    assert loss.isfinite() if kind == "jsd" else loss == math.inf  # target puts mass where the input has none
    dead = x.clone()
    dead[1] = -math.inf
    assert loss_and_grads(kind, dead, t)[0].isnan()  # as softmax of such a row
    assert loss_and_grads(kind, dead, dead)[0].isnan()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_jsd_of_what_one_side_rules_out(reduction: str, device: torch.device, poison: None) -> None:
    """Classes of probability zero on either side: the loss and its gradients are finite and exact."""
    x, t = pair((3, 40), 0.5, device)
    x[0, 3:7] = -math.inf
    t[1, 5:30] = -math.inf
    x[2, :20], t[2, 20:] = -math.inf, -math.inf  # nothing in common: the entropy of a coin that is beta
    got = loss_and_grads("jsd", x, t, reduction, 0.8)
    assert all(each.isfinite().all() for each in got)
    check(got, expected("jsd", x, t, reduction, 0.8, None), 2e-6)
    if reduction == "sum":
        loss = loss_and_grads("jsd", x[2:], t[2:], reduction, 0.8)[0]
        assert oracle.relative_error(loss, torch.tensor(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)))) < 1e-6


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("apart", [1e-5, 0.3, 30.0])
def test_jsd_of_any_beta(beta: float, apart: float, device: torch.device, poison: None) -> None:
    x, t = (each.requires_grad_() for each in pair((3, 60), apart, device))
    for reduction in ("sum", "none"):
        loss = smart_fast.jsd_loss(x, t, reduction=reduction, beta=beta)
        assert (loss >= 0).all()
        gradients = torch.autograd.grad(loss, (x, t), torch.ones_like(loss))
        if reduction == "sum":
            reference = oracle.divergence_rows("jsd", x.cpu(), t.cpu(), beta).sum()
        else:
            reference = oracle.divergence_terms("jsd", x.cpu(), t.cpu(), beta)
        exact = oracle.divergence_grads("jsd", x.detach().cpu(), t.detach().cpu(), beta, torch.ones(1))
        scales = oracle.gradient_scales("jsd", x.detach().cpu(), t.detach().cpu(), beta, torch.ones(()))
        check((loss, *gradients), (reference, *exact), 1e-5, (None, *scales))


@pytest.mark.parametrize("kind", KINDS)
def test_fp16_extremes(kind: str, device: torch.device, poison: None) -> None:
    x = torch.tensor([[65504.0, 65472.0, -65504.0], [65504.0, 65504.0, 65504.0]], dtype=torch.float16, device=device)
    t = torch.tensor([[65504.0, 65504.0, -65504.0], [-65504.0, -65504.0, -65504.0]], dtype=torch.float16, device=device)
    got = loss_and_grads(kind, x, t)
    assert all(each.isfinite().all() for each in got)
    assert oracle.relative_error(got[0], expected(kind, x, t, "sum", 1.0, None)[0]) < 2e-6


def test_inputs_are_not_written(device: torch.device) -> None:
    x, t = pair((3, 100), 1.0, device)
    before = x.clone(), t.clone()
    loss_and_grads("sym_kl", x, t)
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


@pytest.mark.parametrize("want", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sided_gradients(
    kind: str, reduction: str, want: tuple[bool, bool], device: torch.device, poison: None
) -> None:
    x, t = pair((3, 20), 1.0, device)
    both = loss_and_grads(kind, x, t, reduction)[1:]
    x, t = x.requires_grad_(want[0]), t.requires_grad_(want[1])
    loss = LOSSES[kind](x, t, reduction=reduction, **parameter(kind, 1.0))
    loss.backward(torch.ones_like(loss))
    for tensor, gradient in zip((x, t), both, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        assert tensor.grad is None or torch.equal(tensor.grad, gradient)


@pytest.mark.exhaustive
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    reduction=st.sampled_from(REDUCTIONS),
    leading=st.lists(st.integers(1, 4), max_size=3),
    width=st.integers(1, 70),
    log_apart=st.floats(-6, 1.5),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    alpha=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_value(
    kind: str, reduction: str, leading: list[int], width: int, log_apart: float, magnitude: float, alpha: float,
    seed: int, device: torch.device,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, width)
    t = (magnitude * torch.randn(shape, generator=generator)).to(device)
    x = t + (10**log_apart * torch.randn(shape, generator=generator)).to(device)
    got = loss_and_grads(kind, x, t, reduction, alpha)
    want = expected(kind, x, t, reduction, alpha, None)
    if reduction != "none":
        assert got[0] >= 0
        assert oracle.relative_error(got[0], want[0]) < 2e-5 or want[0] < 1e-13 * magnitude**2
    # A log-ratio is as exact as the logits' difference, however small it comes out.
    noise = 5e-7 * float((x - t).abs().max())
    for value, reference in zip(got[1:], want[1:], strict=True):
        assert (value.cpu().double() - reference).abs().max() <= 1e-5 * reference.abs().max() + noise


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_an_error(kind: str, device: torch.device) -> None:
    """Not silently zero."""
    x, t = (each.requires_grad_() for each in pair((3, 5), 1.0, device))
    (gradient,) = torch.autograd.grad(LOSSES[kind](x, t), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice|does not require grad"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("width", [20, *exhaustively(3000)])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(kind: str, side: int, width: int, device: torch.device, poison: None) -> None:
    """One among logits that are nearly equal makes its row NaN, loss and gradients, and no other row."""
    x, t = pair((3, width), 1e-3, device)
    (x, t)[side][1, width - 3] = math.nan
    loss, dx, dt = loss_and_grads(kind, x, t)
    assert loss.isnan()
    for gradient in (dx, dt):
        assert gradient[[0, 2]].isfinite().all()
        assert gradient[1].isnan().any()
