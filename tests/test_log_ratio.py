"""The divergence part of the backend contract in PyTorch operations, against float64 oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smart_fast.backends import log_ratio
from smart_fast.backends.base import DIVERGENCES, STATISTICS, DivergenceSpec
from smart_fast.losses.divergences import divergence
from tests import oracle

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}

every_kind = pytest.mark.parametrize("kind", DIVERGENCES)


def pair(
    apart: float, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (3, 4, 50)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (t + apart * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype), t.to(dtype)


def check(value: Tensor, reference: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    error = oracle.relative_error(value, reference, scale)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("output", ["terms", "rows", "sum"])
@pytest.mark.parametrize("apart", [1e-6, 1e-3, 0.3, 1.0, 30.0])
@every_kind
def test_float64_agreement(
    kind: str, apart: float, output: str, relative: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_ratio, "_BLOCK", 150)  # three rows at a time
    x, t = pair(apart, dtype)
    alpha, scale, weight = 1.0 if kind == "kl" else 0.7, 0.5, 1.3
    first = (x.double() - t.double()).to(dtype) if relative else x
    x = t.double() + first.double() if relative else x
    mask = torch.rand((3, 4), generator=torch.Generator().manual_seed(1)) < 0.7
    rows = mask.unsqueeze(-1)
    spec = DivergenceSpec(kind, output, alpha, weight, scale, relative)

    loss, stats = log_ratio.divergence_forward(first, t, spec, mask, True, True)
    assert stats is not None
    assert stats.shape == (12, STATISTICS)
    g = torch.rand(loss.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = log_ratio.divergence_backward(g, first, t, stats, spec, mask, True, True)

    scaled = x.double() * scale, t.double() * scale
    if output == "terms":
        want = torch.where(rows, oracle.divergence_terms(kind, *scaled, alpha), 0.0)
        gradients = oracle.divergence_grads(kind, *scaled, alpha, g)
        scales = oracle.gradient_scales(kind, *scaled, alpha, g)
    else:
        want = weight * torch.where(mask, oracle.divergence_rows(kind, *scaled, alpha), 0.0)
        want = want.sum() if output == "sum" else want
        unit = torch.ones(1, dtype=torch.float64)
        gradients = oracle.divergence_grads(kind, *scaled, alpha, unit)
        scales = oracle.gradient_scales(kind, *scaled, alpha, unit)
        upstream = weight * g.double().expand(3, 4).unsqueeze(-1)
        gradients, scales = (tuple(upstream * each for each in sides) for sides in (gradients, scales))
    check(loss, want, dtype)
    for value, reference, size in zip(found, gradients, scales, strict=True):
        assert value is not None
        assert value.dtype == dtype
        check(value, torch.where(rows, scale * reference, 0.0), dtype, torch.where(rows, scale * size, 0.0))


@pytest.mark.parametrize("apart", [1e-3, 5.0])
@every_kind
def test_slices_make_a_whole(kind: str, apart: float) -> None:
    x, t = pair(apart)
    x[0, :, :20] = t[0, :, :20] = -float("inf")  # the first slice of these rows is empty
    spec = DivergenceSpec(kind, "rows", 0.7)
    loss, stats = log_ratio.divergence_forward(x, t, spec, None, True, True)
    assert stats is not None
    slices = slice(0, 20), slice(20, 21), slice(21, 50)
    parts = [(x[..., each], t[..., each]) for each in slices]
    merged = log_ratio.merge(torch.stack([log_ratio.divergence_parts(*part, spec, None) for part in parts]), 1.0)
    torch.testing.assert_close(merged[:, :4], stats[:, :4], rtol=1e-12, atol=1e-13)
    whole, sliced = (each[:, 4] + each[:, 5] for each in (stats, merged))  # each chooses a shift of its own
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-13)
    finished = [log_ratio.divergence_finish(*part, merged, spec, None) for part in parts]
    assert all(each.shape == (12, 2) for each in finished)
    total = torch.stack(finished).sum(0)
    torch.testing.assert_close(divergence(kind).rows(total, 0.7), loss.view(-1), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(total, stats[:, 6:], rtol=1e-12, atol=1e-15)
    assert total[:, 1].any() == (kind == "jsd")
    ones = torch.ones(3, 4, dtype=torch.float64)
    gradients = log_ratio.divergence_backward(ones, x, t, stats, spec, None, True, True)
    for each, part in zip(slices, parts, strict=True):
        for value, reference in zip(
            log_ratio.divergence_backward(ones, *part, stats, spec, None, True, True), gradients, strict=True
        ):
            assert value is not None
            assert reference is not None
            torch.testing.assert_close(value, reference[..., each], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("output", ["terms", "rows"])
@pytest.mark.parametrize("relative", [False, True])
@every_kind
def test_extremes(kind: str, relative: bool, output: str) -> None:
    spec = DivergenceSpec(kind, output, divergence(kind).alpha, from_difference=relative)

    def run(x: list[float], t: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        first, second = torch.tensor([x]), torch.tensor([t])
        if relative:
            first = torch.where(second.isinf(), 7.0, first - second)  # whatever it holds
        loss, stats = log_ratio.divergence_forward(first, second, spec, None, True, True)
        assert stats is not None
        dx, dt = log_ratio.divergence_backward(torch.ones_like(loss), first, second, stats, spec, None, True, True)
        assert dx is not None
        assert dt is not None
        return loss, dx, dt

    none = -float("inf")
    for each in run([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]):
        assert not each.any() or (output == "terms" and kind == "kl")
    for each in run([1.0], [5.0]):
        assert not each.any()
    for masked, short in zip(run([1.0, none, 3.0], [2.0, none, -1.0]), run([1.0, 3.0], [2.0, -1.0]), strict=True):
        assert masked.isfinite().all()
        torch.testing.assert_close(masked.sum(), short.sum(), rtol=1e-5, atol=1e-6)
    assert all(each.isfinite().all() for each in run([300.0, -300.0, 0.0], [-300.0, 300.0, 0.0]))
    assert all(each.isnan().all() for each in run([none, none], [none, none]))
