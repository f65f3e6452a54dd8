"""The generalized Jensen-Shannon divergence in PyTorch, against float64: values, gradients, edges, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import smart_fast
from smart_fast import jsd_loss, kl_loss, linear_jsd_loss
from tests import oracle

BETAS = (0.1, 0.5, 0.9)
REDUCTIONS = ("none", "sum", "mean", "batchmean")

every_beta = pytest.mark.parametrize("beta", BETAS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

pytestmark = pytest.mark.usefixtures("pytorch_by_default")


def pair(apart: float, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (6, 50)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = t + apart * torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), t.to(dtype).requires_grad_()


def expected(
    x: Tensor, t: Tensor, reduction: str, beta: float, upstream: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of logits ``[rows, V]`` in float64."""
    x, t = x.detach().double(), t.detach().double()
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    count = {"batchmean": x.shape[0], "mean": max(1, int(keep.sum())) * x.shape[-1]}.get(reduction, 1)
    terms = torch.where(keep.unsqueeze(-1), oracle.divergence_terms("jsd", x, t, beta), 0.0)
    grads = oracle.divergence_grads("jsd", x, t, beta, (upstream.double() / count).expand(x.shape))
    dx, dt = (torch.where(keep.unsqueeze(-1), each, 0.0) for each in grads)
    return terms if reduction == "none" else terms.sum() / count, dx, dt


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for name, value, reference in zip(("loss", "gradient to input", "gradient to target"), got, want, strict=True):
        error = oracle.relative_error(value, reference)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 0.5, 3.0, 20.0])
@every_reduction
@every_beta
def test_float64_agreement(beta: float, reduction: str, apart: float, dtype: torch.dtype, tolerance: float) -> None:
    x, t = pair(apart, dtype)
    loss = jsd_loss(x, t, reduction, beta)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    got = loss, *torch.autograd.grad(loss, (x, t), upstream)
    assert all(each.dtype == dtype for each in got)
    assert (loss.detach() >= 0).all()
    # Where nearly all of p is one class, what its gradient consists of cancels.
    check(got, expected(x, t, reduction, beta, upstream), tolerance if apart < 10 else 5 * tolerance)


@pytest.mark.parametrize(("left", "right"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
@every_reduction
@every_beta
def test_sides_of_different_dtypes(beta: float, reduction: str, left: str, right: str) -> None:
    """One model in half precision: never negative, although rounding is all that tells the sides apart."""
    x, _ = pair(0.0, getattr(torch, left), (64, 200))
    _, t = pair(0.0, getattr(torch, right), (64, 200))
    loss = jsd_loss(x, t, reduction, beta)
    promoted = torch.promote_types(x.dtype, t.dtype)
    assert loss.dtype == (promoted if reduction == "none" else torch.float32)
    assert (loss >= 0).all()
    assert loss.sum() > 0
    upstream = torch.ones_like(loss)
    dx, dt = torch.autograd.grad(loss, (x, t), upstream)
    assert (dx.dtype, dt.dtype) == (x.dtype, t.dtype)
    for value, reference in zip((loss, dx, dt), expected(x, t, reduction, beta, upstream), strict=True):
        rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[value.dtype]
        small = 6e-8 * reference.numel() ** 0.5 / float(reference.norm()) if value.dtype == torch.float16 else 0.0
        assert oracle.relative_error(value, reference) <= rounding + small


@pytest.mark.parametrize("apart", [0.2, 4.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@every_beta
def test_gradcheck(beta: float, reduction: str, apart: float) -> None:
    """Both sides, through the mixture; and once more."""
    x, t = pair(apart, shape=(2, 3))
    mask = torch.tensor([True, False]) if reduction == "mean" else None

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return jsd_loss(x, t, reduction, beta, mask=mask, temperature=1.7, backend="torch")

    assert torch.autograd.gradcheck(loss, (x, t))
    assert torch.autograd.gradgradcheck(loss, (x, t))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@every_reduction
def test_mask(reduction: str, garbage: float) -> None:
    x, t = pair(1.0, torch.float32)
    mask = torch.tensor([True, True, False, True, False, True])
    dirty = [torch.where(mask.unsqueeze(-1), each.detach(), garbage).requires_grad_() for each in (x, t)]
    loss = jsd_loss(*dirty, reduction, 0.3, mask=mask)
    upstream = torch.rand_like(loss)
    got = loss, *torch.autograd.grad(loss, dirty, upstream)
    check(got, expected(x, t, reduction, 0.3, upstream, mask), 2e-6)
    nothing = jsd_loss(*dirty, reduction, 0.3, mask=torch.zeros_like(mask))
    assert not any(each.any() for each in (nothing, *torch.autograd.grad(nothing, dirty, upstream)))


@every_reduction
@every_beta
def test_temperature(beta: float, reduction: str) -> None:
    x, t = pair(1.0, torch.float32)
    loss = jsd_loss(x, t, reduction, beta, temperature=2.5)
    upstream = torch.rand_like(loss)
    got = loss, *torch.autograd.grad(loss, (x, t), upstream)
    value, dx, dt = expected(x.double() / 2.5, t.double() / 2.5, reduction, beta, upstream)
    check(got, (2.5**2 * value, 2.5 * dx, 2.5 * dt), 2e-6)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 1, 3, 7)], ids=lambda shape: f"{len(shape)}-D")
@every_reduction
def test_dimensions(reduction: str, shape: tuple[int, ...]) -> None:
    x, t = pair(1.0, shape=shape)
    terms = oracle.divergence_terms("jsd", x.detach(), t.detach(), 0.4)
    count = {"batchmean": shape[0], "mean": terms.numel()}.get(reduction, 1)
    want = terms if reduction == "none" else terms.sum() / count
    torch.testing.assert_close(jsd_loss(x, t, reduction, 0.4), want, rtol=1e-12, atol=1e-15)


def test_leading_dimensions_broadcast_in_pytorch() -> None:
    x, t = pair(1.0)
    value = jsd_loss(x, t[0], "none", 0.4, backend="torch")
    assert torch.equal(value, jsd_loss(x, t[:1].expand(6, 50), "none", 0.4, backend="torch"))


@every_beta
def test_it_is_symmetric_under_a_swap_of_sides_and_weights(beta: float) -> None:
    x, t = pair(2.0)
    torch.testing.assert_close(jsd_loss(x, t, beta=beta), jsd_loss(t, x, beta=1 - beta), rtol=1e-12, atol=0)


def test_defaults() -> None:
    x, t = pair(2.0)
    assert torch.equal(jsd_loss(x, t), jsd_loss(x, t, "batchmean", 0.5))


def test_limits_are_the_two_kl_divergences() -> None:
    x, t = pair(1.0)
    beta = 1e-7
    torch.testing.assert_close(jsd_loss(x, t, beta=beta) / beta, kl_loss(x, t), rtol=1e-5, atol=0)
    torch.testing.assert_close(jsd_loss(x, t, beta=1 - beta) / beta, kl_loss(t, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_reduction
@every_beta
def test_equal_sides_and_one_class_are_exactly_zero(beta: float, reduction: str, dtype: torch.dtype) -> None:
    _, t = pair(0.0, dtype)
    lone = torch.tensor([[1.0], [-30.0]], dtype=dtype), torch.tensor([[5.0], [7.0]], dtype=dtype)
    for given in ((t.detach().clone(), t.detach().clone()), lone):
        for each in given:
            each.requires_grad_()
        loss = jsd_loss(*given, reduction, beta)
        found = loss, *torch.autograd.grad(loss, given, torch.rand_like(loss))
        assert not any(each.any() for each in found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("apart", [1e-3, 2.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@every_beta
def test_classes_that_both_leave_out(
    beta: float, reduction: str, apart: float, dtype: torch.dtype, tolerance: float
) -> None:
    x, t = pair(apart, dtype)
    out = torch.arange(50) % 3 == 0
    given = [each.detach().masked_fill(out, -math.inf).requires_grad_() for each in (x, t)]
    loss = jsd_loss(*given, reduction, beta)
    grads = torch.autograd.grad(loss, given, torch.ones_like(loss))
    assert all(not each[:, out].any() for each in ((loss, *grads) if reduction == "none" else grads))
    got = [each[:, ~out] if each.dim() else each for each in (loss, *grads)]
    ones = torch.ones(())
    check(tuple(got), expected(x[:, ~out], t[:, ~out], reduction, beta, ones), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@every_beta
def test_classes_that_one_side_leaves_out(beta: float, reduction: str, dtype: torch.dtype) -> None:
    """The divergence is bounded: finite values, and gradients of the limit."""
    x, t = pair(1.0, dtype, (2, 9))
    left, right = x.detach().clone(), t.detach().clone()
    left[0, 3], right[1, 4] = -math.inf, -math.inf
    left.requires_grad_()
    right.requires_grad_()
    loss = jsd_loss(left, right, reduction, beta)
    got = loss, *torch.autograd.grad(loss, (left, right), torch.ones_like(loss))
    assert all(each.isfinite().all() for each in got)
    far = [torch.where(each.detach().isinf(), -400.0, each.detach()) for each in (left, right)]
    check(got, expected(*far, reduction, beta, torch.ones(())), 1e-12 if dtype == torch.float64 else 2e-6)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    disjoint = jsd_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]]), "sum", beta)
    assert disjoint.item() == pytest.approx(bound, rel=1e-6)


def test_rows_that_are_dead_are_nan() -> None:
    dead = torch.full((1, 4), -math.inf)
    assert jsd_loss(dead, torch.zeros(1, 4)).isnan()
    assert jsd_loss(dead, dead).isnan()


def test_extremes_are_finite() -> None:
    x = torch.tensor([[65504.0, 65472.0, -65504.0], [300.0, -300.0, 0.0]], requires_grad=True)
    t = torch.tensor([[-65504.0, 65504.0, 65504.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    loss = jsd_loss(x, t, "sum")
    assert loss.item() == pytest.approx(2 * math.log(2.0), rel=1e-6)
    assert all(each.isfinite().all() for each in torch.autograd.grad(loss, (x, t)))


def test_gradients_go_through_the_mixture() -> None:
    """Unlike js_loss, which holds it constant: the gradient is that of the value."""
    x, t = pair(1.0, shape=(3, 5))
    p, q = x.softmax(-1), t.softmax(-1)
    m = 0.3 * q + 0.7 * p
    want = (0.3 * q * (q / m).log() + 0.7 * p * (p / m).log()).sum()
    found = jsd_loss(x, t, "sum", 0.3)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, (x, t)), torch.autograd.grad(want, (x, t)))


def test_one_side_alone() -> None:
    x, t = pair(1.0)
    both = torch.autograd.grad(jsd_loss(x, t), (x, t))
    assert torch.equal(torch.autograd.grad(jsd_loss(x, t.detach()), x)[0], both[0])
    assert torch.equal(torch.autograd.grad(jsd_loss(x.detach(), t), t)[0], both[1])


def test_no_rows() -> None:
    x, t = torch.randn(0, 5, requires_grad=True), torch.randn(0, 5, requires_grad=True)
    loss = jsd_loss(x, t)
    assert loss == 0
    assert all(each.shape == (0, 5) for each in torch.autograd.grad(loss, (x, t)))


def test_in_the_regularizer() -> None:
    net = torch.nn.Linear(6, 4, dtype=torch.float64)
    embed = torch.randn(3, 6, dtype=torch.float64)
    smart = smart_fast.SMARTLoss(net, jsd_loss, step_size=1.0, noise_var=0.1, backend="torch")
    loss = smart(embed, net(embed))
    loss.backward()
    assert loss > 0
    assert net.weight.grad is not None
    assert net.weight.grad.any()


LIMITS = r"beta must be greater than 0 and less than 1.*kl_loss\(input, target\) for 0.*kl_loss\(target, input\) for 1"


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        *((value, ValueError, LIMITS) for value in (0, 0.0, 1, 1.0, -1, 2, math.nan, math.inf)),
        (torch.tensor(0.5), TypeError, "beta must be a real number, got Tensor"),
        (True, TypeError, "beta must be a real number, got bool"),
        ("0.5", TypeError, "beta must be a real number, got str"),
        (None, TypeError, "beta must be a real number, got NoneType"),
    ],
)
def test_beta(beta: object, error: type[Exception], message: str) -> None:
    x, t = (each.detach().float() for each in pair(1.0))
    with pytest.raises(error, match=message):
        jsd_loss(x, t, beta=beta)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        linear_jsd_loss(x, t, torch.ones(3, 50), beta=beta)  # type: ignore[arg-type]
    module = smart_fast.LinearDivergence(torch.ones(3, 50), kind="jsd", beta=beta)
    with pytest.raises(error, match=message):
        module(x, t)
