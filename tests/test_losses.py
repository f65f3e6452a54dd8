"""The losses on the PyTorch path: masks, reductions, the two losses of mt-dnn, gradients, empty batches."""

import pytest
import torch

from smart_fast import hellinger_loss, js_loss, kl_loss, stable_sym_kl_loss, sym_kl_loss
from tests.helpers import same_bits

# torch's, about the meaning of reduction="mean".
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

LOSSES = [kl_loss, sym_kl_loss, js_loss, hellinger_loss, stable_sym_kl_loss]
REDUCTIONS = ["none", "sum", "mean", "batchmean"]
SHAPES = [(7,), (4, 7), (2, 3, 7), (2, 1, 3, 7)]

every_loss = pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: loss_fn.__name__)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-D")


def logits(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def some_rows(shape):
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(3)) < 0.5
    if mask.dim() > 0:
        mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def probabilities(x):
    weights = (x - x.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def log_odds(p, epsilon):
    return -(1 / (p + epsilon) - 1 + epsilon).log()


def divide(terms, reduction):
    return {
        "none": terms,
        "sum": terms.sum(),
        "mean": terms.sum() / terms.numel(),
        "batchmean": terms.sum() / terms.shape[0],
    }[reduction]


@every_shape
@every_reduction
def test_hellinger_is_the_squared_distance_of_square_roots(reduction, shape):
    x, t = logits(shape, 0), logits(shape, 1)
    terms = 0.7 * (probabilities(x).sqrt() - probabilities(t).sqrt()) ** 2
    torch.testing.assert_close(hellinger_loss(x, t, reduction, 0.7), divide(terms, reduction))
    assert same_bits(hellinger_loss(x, t), hellinger_loss(x, t, "mean", 1.0))


@every_shape
@every_reduction
def test_stable_sym_kl_weighs_differences_by_constant_log_odds(reduction, shape):
    x, t = logits(shape, 0), logits(shape, 1)
    for epsilon in (1e-6, 1e-3):
        p, q = probabilities(x), probabilities(t)
        odds = log_odds(p, epsilon).detach() - log_odds(q, epsilon).detach()
        expected = divide(0.7 * 2 * (p - q) * odds, reduction)
        found = stable_sym_kl_loss(x, t, reduction, 0.7, epsilon=epsilon)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), (x, t)), torch.autograd.grad(expected.sum(), (x, t))
        )
    assert same_bits(stable_sym_kl_loss(x, t), stable_sym_kl_loss(x, t, "batchmean", 1.0, epsilon=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss_fn", [hellinger_loss, stable_sym_kl_loss])
def test_losses_of_mt_dnn_compute_in_float32(loss_fn, dtype):
    x, t = logits((5, 9), 0, dtype), logits((5, 9), 1, dtype)
    loss = loss_fn(x, t)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == t.grad.dtype == dtype
    torch.testing.assert_close(loss, loss_fn(x.double(), t.double()).float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_fn", [hellinger_loss, stable_sym_kl_loss])
def test_losses_of_mt_dnn_stay_finite_at_the_edges(loss_fn):
    x = torch.tensor([[0.0, 200.0, -200.0], [0.0, -torch.inf, 1.0], [65504.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[200.0, 0.0, -200.0], [1.0, -torch.inf, 0.0], [0.0, 65504.0, 0.0]], requires_grad=True)
    loss = loss_fn(x, t)
    loss.backward()
    assert all(each.isfinite().all() for each in (loss, x.grad, t.grad))
    assert loss > 0
    assert loss_fn(x, x) == 0


def test_hellinger_trains_both_sides():
    x, t = logits((4, 5), 0), logits((4, 5), 1)
    assert torch.autograd.gradcheck(hellinger_loss, (x, t))
    assert torch.autograd.gradgradcheck(hellinger_loss, (x, t))


@every_shape
@every_reduction
@every_loss
def test_gradients_of_masked_losses(loss_fn, reduction, shape):
    """Against finite differences, with whatever the loss holds constant held constant."""
    x, t, mask = logits(shape, 0), logits(shape, 1), some_rows(shape)
    if loss_fn in (kl_loss, hellinger_loss):
        assert torch.autograd.gradcheck(lambda x, t: loss_fn(x, t, reduction, mask=mask), (x, t))
    elif loss_fn is sym_kl_loss:
        held = t.detach()
        forward = torch.autograd.grad(loss_fn(x, t, reduction, 0.5, mask=mask).sum(), x)
        alone = torch.autograd.grad(0.5 * kl_loss(x, held, reduction, mask=mask).sum(), x)
        torch.testing.assert_close(forward, alone)
    elif loss_fn is js_loss:
        middle = (0.5 * (probabilities(x) + probabilities(t))).log().detach()
        found = torch.autograd.grad(loss_fn(x, t, reduction, 0.5, mask=mask).sum(), (x, t))
        for side, grad in zip((x, t), found, strict=True):
            (alone,) = torch.autograd.grad(0.5 * kl_loss(side, middle, reduction, mask=mask).sum(), side)
            torch.testing.assert_close(grad, alone)
    else:
        constant = log_odds(probabilities(x), 1e-6).detach() - log_odds(probabilities(t), 1e-6).detach()
        terms = torch.where(mask.unsqueeze(-1), 2 * (probabilities(x) - probabilities(t)) * constant, 0)
        count = {"none": 1, "sum": 1, "mean": max(int(mask.sum()), 1) * shape[-1], "batchmean": shape[0]}[reduction]
        found = torch.autograd.grad(loss_fn(x, t, reduction, mask=mask).sum(), (x, t))
        torch.testing.assert_close(found, torch.autograd.grad(terms.sum() / count, (x, t)))


@every_shape
@every_reduction
@every_loss
def test_masked_rows_do_not_count(loss_fn, reduction, shape):
    """The sum is that of the other rows; batchmean divides by size(0), mean by the elements that count."""
    x, t, mask = logits(shape, 0), logits(shape, 1), some_rows(shape)
    found = loss_fn(x, t, reduction, mask=mask)
    terms = loss_fn(x, t, "none")
    if reduction == "none":
        torch.testing.assert_close(found[mask], terms[mask])
        assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))
    else:
        count = {"sum": 1, "mean": max(int(mask.sum()), 1) * shape[-1], "batchmean": shape[0]}[reduction]
        torch.testing.assert_close(found, terms[mask].sum() / count)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_reduction
@every_loss
def test_masked_rows_may_hold_anything(loss_fn, reduction, dtype, garbage):
    found, mask = [], some_rows((4, 7))
    for fill in (garbage, 1.0):
        x, t = (
            torch.where(mask.unsqueeze(-1), logits((4, 7), seed, dtype), fill).detach().requires_grad_()
            for seed in (0, 1)
        )
        loss = loss_fn(x, t, reduction, mask=mask)
        loss.sum().backward()
        found.append((loss, x.grad, t.grad))
    assert all(map(same_bits, *found))
    assert all(each.isfinite().all() for each in found[0])
    assert not found[0][1][~mask].any()
    assert not found[0][2][~mask].any()
    assert found[0][1][mask].any()


@every_reduction
@every_loss
def test_everything_masked_is_zero(loss_fn, reduction):
    x, t = logits((4, 7), 0), logits((4, 7), 1)
    loss = loss_fn(x, t, reduction, mask=torch.zeros(4, dtype=torch.bool))
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros((4, 7) if reduction == "none" else (), dtype=torch.float64))
    assert not x.grad.any()
    assert not t.grad.any()


@every_reduction
@every_loss
def test_nothing_masked_changes_nothing(loss_fn, reduction):
    x, t = logits((2, 3, 7), 0), logits((2, 3, 7), 1)
    everything = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(loss_fn(x, t, reduction, mask=everything), loss_fn(x, t, reduction))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_loss
def test_masked_mean_of_more_elements_than_float16_counts(loss_fn, dtype):
    x, t = logits((300, 400), 0, dtype), logits((300, 400), 1, dtype)
    mask = torch.ones(300, dtype=torch.bool)
    mask[:20] = False
    found = loss_fn(x, t, "mean", mask=mask)
    torch.testing.assert_close(found.double(), loss_fn(x.double(), t.double(), "mean", mask=mask), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)])
@pytest.mark.parametrize("masked", [False, True])
@every_reduction
@every_loss
def test_empty_batches_give_zero(loss_fn, reduction, masked, shape):
    x, t = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    loss = loss_fn(x, t, reduction, mask=torch.ones(shape[:-1], dtype=torch.bool) if masked else None)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(shape if reduction == "none" else ()))
    assert x.grad.shape == t.grad.shape == shape


@every_loss
def test_inputs_are_left_alone(loss_fn):
    x, t = logits((4, 7), 0), logits((4, 7), 1)
    before = x.detach().clone(), t.detach().clone()
    loss_fn(x, t, mask=some_rows((4, 7))).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(t, before[1])


@every_loss
def test_a_side_that_needs_no_gradient_gets_none(loss_fn):
    x, t = logits((4, 7), 0), logits((4, 7), 1).detach()
    loss_fn(x, t).backward()
    assert x.grad.any()
    assert t.grad is None
    assert not loss_fn(x.detach(), t).requires_grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_fn", [kl_loss, sym_kl_loss, js_loss])
def test_temperature_divides_logits_and_multiplies_by_its_square(loss_fn, reduction, masked, backend, device):
    """On the backend of the fixture (fp32) and in PyTorch (float64), against the definition in float64."""
    mask = some_rows((2, 3, 7)) if masked else None
    for dtype, where, name, tolerance in (
        (torch.float64, torch.device("cpu"), "torch", 1e-12),
        (torch.float32, device, backend.name, 1e-5),
    ):
        x, t = (logits((2, 3, 7), seed, dtype).detach().to(where).requires_grad_() for seed in (0, 1))
        x64, t64 = (each.detach().cpu().double().requires_grad_() for each in (x, t))
        keep = None if mask is None else mask.to(where)
        loss = loss_fn(x, t, reduction, mask=keep, temperature=2.5, backend=name)
        want = 2.5**2 * loss_fn(x64 / 2.5, t64 / 2.5, reduction, mask=mask, backend="torch")
        upstream = torch.rand(want.shape, dtype=torch.float64)
        gradients = torch.autograd.grad(loss, (x, t), upstream.to(loss))
        wanted = torch.autograd.grad(want, (x64, t64), upstream)
        for got, exact in zip((loss, *gradients), (want, *wanted), strict=True):
            torch.testing.assert_close(got.cpu().double(), exact, rtol=tolerance, atol=tolerance)
