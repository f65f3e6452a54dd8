"""The Fisher direction by the kernels, against float64: values, ties, edges of the numbers, shapes, strides, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smart_fast import SMARTLoss, kl_loss
from smart_fast.ascent import fisher
from tests.helpers import exhaustively

# A fallback to PyTorch would make these tests compare PyTorch with itself.
pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 3, 5, 16, 17, 100, 128, 129, 1000, 8192, 8193, 30522)


def direct(logits: Tensor, backend, wide: bool = True) -> Tensor:
    return fisher.direction(logits, backend.name, wide=wide)


def exact(logits: Tensor) -> Tensor:
    """In float64, where the largest cancels to no more than its last digits; so the others are added up here too."""
    x = logits.detach().cpu().double()
    q = x.softmax(-1)
    largest = (x == x.amax(-1, keepdim=True)).double().argmax(-1, keepdim=True)  # the first
    q = q.scatter(-1, largest, 0.0)
    return q.scatter(-1, largest, -q.sum(-1, keepdim=True))


def check(got: Tensor, logits: Tensor, tolerance: float = 2e-6) -> None:
    """Entry by entry, relative: the smallest counts as much as the largest, down to where fp32 ends."""
    want = exact(logits)
    assert got.shape == logits.shape
    assert got.is_contiguous()
    off = (got.cpu().double() - want).abs()
    assert bool((off <= tolerance * want.abs() + 1e-37).all()), f"off by {(off / want.abs()).nan_to_num().max():.1e}"


def random(*shape: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_float64_agreement(width: int, dtype: torch.dtype, backend, device, poison: None) -> None:
    logits = random(7 if width < 8192 else 2, width).to(device, dtype)
    found = direct(logits, backend)
    assert found.dtype == torch.float32
    check(found, logits, 1e-5 if width > 8192 else 2e-6)
    narrow = direct(logits, backend, wide=False)
    assert narrow.dtype == dtype
    # The interpreter cuts bfloat16 off where a GPU rounds.
    finfo = torch.finfo(dtype)
    torch.testing.assert_close(
        narrow.float(), found.to(dtype).float(), rtol=finfo.eps, atol=finfo.smallest_normal * finfo.eps
    )


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 10.0, 60.0])
@pytest.mark.parametrize("width", [2, 3, 40, 1000, 9000])
def test_nothing_cancels(width: int, spread: float, backend, device, poison: None) -> None:
    """Where one class has all of the probability, its entry is as exact as the others."""
    logits = random(5, width, spread=spread).to(device)
    found = direct(logits, backend).cpu().double()
    want = exact(logits)
    kept = want.abs() > 1e-30  # an exponential below is allowed to be zero
    assert kept.any()
    # exp(x) in fp32 is off by about as many units in the last place as x has halves.
    torch.testing.assert_close(found[kept], want[kept], rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [2, 5, 100, 9000, 20000])
@pytest.mark.parametrize("places", [(0,), (0, 1), (1, -1), (-1,)])
def test_the_first_of_equal_ones(width: int, places: tuple[int, ...], backend, device, poison: None) -> None:
    logits = random(3, width)
    logits[:, list(places)] = 7.0
    logits = logits.to(device)
    check(direct(logits, backend), logits, 1e-5)
    equal = torch.full((2, width), -3.0, device=device)
    found = direct(equal, backend)
    assert bool((found[:, 0] < 0).all())
    assert bool((found[:, 1:] > 0).all())


def test_one_class_is_zero(backend, device, poison: None) -> None:
    assert not direct(random(5, 1).to(device), backend).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 200, 9000])
def test_excluded_classes(width: int, dtype: torch.dtype, backend, device, poison: None) -> None:
    logits = random(4, width).to(device, dtype)
    logits[1, 0] = logits[2, -1] = float("-inf")
    logits[3, : width - 1] = float("-inf")  # one class left
    found = direct(logits, backend)
    assert found[1, 0] == 0
    assert found[2, -1] == 0
    assert not found[3].any()
    check(found, logits, 1e-5)


WITHOUT_A_SOFTMAX = ("nan", "nan that carries bits", "inf", "all -inf", "all nan")


@pytest.mark.parametrize("width", [2, 3, 200, 9000])
@pytest.mark.parametrize("value", WITHOUT_A_SOFTMAX)
@pytest.mark.parametrize("place", [0, -1])
def test_rows_without_a_softmax_are_nan(width: int, value: str, place: int, backend, device, poison: None) -> None:
    """As PyTorch's; the other rows are not touched by them."""
    logits = random(5, width).to(device)
    row = logits[2]
    if value.startswith("all"):
        row[:] = float(value.removeprefix("all "))
    elif value.endswith("bits"):
        row[place] = torch.tensor(0x7FC00001, dtype=torch.int32, device=device).view(torch.float32)
    else:
        row[place] = float(value)
    found = direct(logits, backend)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    check(found[others], logits[others], 1e-5)
    assert fisher.direction(logits, "torch")[2].isnan().all()


@pytest.mark.parametrize("width", [3, 130, 9000])
def test_huge_logits(width: int, backend, device, poison: None) -> None:
    logits = random(3, width).to(device)
    for scale in (1e30, 3e38 / 6, 1e-30):
        check(direct(logits * scale, backend), logits * scale)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(3, torch.bfloat16), *exhaustively((100, torch.float32), (700, torch.float16), (9000, torch.bfloat16))],
)
def test_shapes_and_strides(width: int, dtype: torch.dtype, backend, device, poison: None) -> None:
    base = random(4, 3, 2, width).to(device, dtype)
    for view in (
        base[0, 0, 0],
        base[1, 0],
        base,
        base.permute(2, 0, 1, 3),
        base[:, ::2],
        base.transpose(-1, -2)[..., :1].transpose(-1, -2),  # width 2 rows apart
        base.permute(3, 1, 0, 2)[:5],  # the last dimension strided
        base[:, :, :1].expand(4, 3, 5, width),
        base[..., 1:],
    ):
        # A GPU may add up rows that are not aligned in another order.
        torch.testing.assert_close(direct(view, backend), direct(view.contiguous(), backend), rtol=1e-6, atol=1e-37)
        check(direct(view, backend), view, 1e-5)


@pytest.mark.exhaustive
def test_many_rows(backend, device, poison: None) -> None:
    """More rows than a chunk or a block has; every one is its own."""
    for width in (2, 3, 10, 130):
        logits = random(1001, width).to(device)
        check(direct(logits, backend), logits)


def test_nothing_to_do(backend, device) -> None:
    for shape in ((0, 5), (3, 0, 5)):
        assert direct(torch.empty(shape, device=device), backend).shape == shape


def test_traced(backend, device) -> None:
    logits = random(6, 40).to(device)
    torch.compiler.reset()
    function = torch.compile(lambda x: direct(x, backend), fullgraph=True)
    assert torch.equal(function(logits), direct(logits, backend))


def test_the_loss_takes_it(backend, device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the one in PyTorch, whose results would look the same."""
    found = []
    kernel = backend.fisher_direction

    def recorded(logits: Tensor, wide: bool) -> Tensor:
        found.append(kernel(logits, wide))
        return found[-1]

    monkeypatch.setattr(backend, "fisher_direction", recorded)
    net, embed = torch.nn.Linear(6, 3).to(device), torch.randn(4, 6, device=device, requires_grad=True)
    state = net(embed)
    SMARTLoss(net, kl_loss, ascent="fisher", backend=backend.name)(embed, state)
    (taken,) = found
    check(taken, state)


def test_the_loss_runs_the_compiled_operator(native) -> None:
    net, embed = torch.nn.Linear(6, 3), torch.randn(4, 6, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, ascent="fisher", backend="native")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        smart(embed, net(embed))
    names = {event.key for event in profile.key_averages()}
    assert "smart_fast::native_fisher_direction" in names
    assert "aten::argmax" not in names
