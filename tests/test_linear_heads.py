"""Linear losses of two projections, of scaled and capped logits, against float64 of whole logits."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from smart_fast import LinearDivergence, linear_jsd_loss, linear_kl_loss, linear_sym_kl_loss
from smart_fast.losses.divergences import divergence
from smart_fast.losses.softcap import Capped
from tests import oracle
from tests.helpers import exhaustively
from tests.test_linear import KINDS, LOSSES, PARAMETERS, TWO_MATRICES, Products, some_tokens

NAMES = ("input", "target", "weight", "bias", "target_weight", "target_bias")
HIDDEN, WIDER, VOCABULARY = 24, 33, 70

pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")

every_kind = pytest.mark.parametrize("kind", KINDS)
in_pytorch = pytest.mark.usefixtures("pytorch_by_default")
CAPS = pytest.mark.parametrize("cap", [None, 1.5], ids=["", "capped"])
HEADS = pytest.mark.parametrize("heads", [1, 2], ids=["shared", "two"])


def tensors(
    heads: int, shape: tuple[int, ...] = (3, 5), apart: float = 0.5, dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    device: str = "cpu", bias: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """By name; with one projection the two sides are ``apart``. The dtypes are those of the two sides."""
    generator = torch.Generator().manual_seed(1)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    found = {"input": draw(*shape, HIDDEN)}
    found["weight"] = draw(VOCABULARY, HIDDEN) / HIDDEN**0.5
    if heads == 1:
        found["target"] = found["input"] + apart * draw(*shape, HIDDEN)
    else:
        found["target"], found["target_weight"] = draw(*shape, WIDER), draw(VOCABULARY, WIDER) / WIDER**0.5
    if bias:
        found |= {f"{side}bias": draw(VOCABULARY) for side in ("", "target_")[:heads]}
    theirs = dtypes[-1]
    dtype = {name: theirs if name.startswith("target") else dtypes[0] for name in found}
    return {name: found[name].to(device, dtype[name]).requires_grad_() for name in NAMES if name in found}


def run(kind: str, given: dict[str, Tensor], upstream: Tensor | None = None, **options: object) -> dict[str, Tensor]:
    """The loss and the gradients to whatever requires one."""
    loss = LOSSES[kind](**given, **options)
    leaves = {name: each for name, each in given.items() if each.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), None if upstream is None else upstream.to(loss))
    for grad, leaf in zip(grads, leaves.values(), strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
    return {"loss": loss, **dict(zip(leaves, grads, strict=True))}


def expected(kind: str, given: dict[str, Tensor], *args: object, **options: object) -> dict[str, Tensor]:
    """`oracle.projected_divergence`, alpha that of ``kind`` if none is given."""
    return oracle.projected_divergence(kind, divergence(kind).alpha, given, *args, **options)


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, but: tuple[str, ...] = ()) -> None:
    for name, value in got.items():
        if name not in but and (value.any() or float(want[name].abs().max()) > 1e-12):
            error = oracle.relative_error(value, want[name])
            assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def agree(
    kind: str, heads: int, cap: float | None, reduction: str, dtypes: tuple[torch.dtype, ...], tolerance: float,
    device: str = "cpu",
) -> None:  # fmt: skip
    """One case with everything: an upstream gradient, a mask, a temperature, a scale, chunks that divide nothing."""
    given = tensors(heads, dtypes=dtypes, device=device)
    mask = some_tokens((3, 5)).to(device)
    alpha = 1.0 if kind == "kl" else 0.7
    upstream = torch.rand((3, 5) if reduction == "none" else (), generator=torch.Generator().manual_seed(3)) + 0.1
    options = {PARAMETERS[kind]: alpha} if kind in PARAMETERS else {}
    size = 4 * VOCABULARY * max(dtype.itemsize for dtype in dtypes)
    got = run(
        kind, given, upstream, reduction=reduction, mask=mask, temperature=1.6, chunk_bytes=size, logit_scale=1.3,
        logit_softcap=cap, **options,
    )  # fmt: skip
    check(got, oracle.projected_divergence(kind, alpha, given, reduction, upstream, mask, 1.6, 1.3, cap), tolerance)


@in_pytorch
@pytest.mark.parametrize("reduction", ["batchmean", "none", *exhaustively("sum", "mean")])
@CAPS
@HEADS
@every_kind
def test_whole_logits_agree(kind: str, heads: int, cap: float | None, reduction: str) -> None:
    agree(kind, heads, cap, reduction, (torch.float64,), 1e-12)
    agree(kind, heads, cap, reduction, (torch.float32,), 3e-6)


# What kernels see of it: two sides that are no difference, and differences in units of a cap.
IN_KERNELS = [("jsd", 2, None), ("sym_kl", 1, 1.5)]


@pytest.mark.parametrize(("kind", "heads", "cap"), [
    *IN_KERNELS,
    *exhaustively(*(case for case in itertools.product(KINDS, (1, 2), (None, 1.5)) if case not in IN_KERNELS)),
])  # fmt: skip
def test_whole_logits_agree_in_kernels(
    kind: str, heads: int, cap: float | None, backend: ModuleType, device: torch.device, poison: None
) -> None:
    agree(kind, heads, cap, "mean", (torch.float32,), 3e-6, str(device))


@in_pytorch
@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
])  # fmt: skip
@CAPS
@every_kind
def test_half_precision(kind: str, cap: float | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """Two sides may differ in their dtypes, too."""
    for heads in range(len(dtypes), 3):
        agree(kind, heads, cap, "batchmean", dtypes, 4 * (4e-3 if torch.float16 in dtypes else 2e-2))


@pytest.mark.parametrize("kind", ["sym_kl", *exhaustively(*(kind for kind in KINDS if kind != "sym_kl"))])
def test_mixed_precision_in_kernels(kind: str, backend: ModuleType, device: torch.device, poison: None) -> None:
    agree(kind, 2, None, "batchmean", (torch.float32, torch.bfloat16), 8e-2, str(device))


@in_pytorch
@pytest.mark.parametrize("cap", [1.5, 30.0])
@pytest.mark.parametrize("apart", [1e-5, 1e-3])
@every_kind
def test_nearly_equal_behind_a_softcap(kind: str, apart: float, cap: float) -> None:
    """Against float64 of the same fp32 numbers. (Not the weight of kl and jsd: two GEMMs cancel there.)"""
    given = tensors(1, apart=apart, dtypes=(torch.float32,))
    got = run(kind, given, reduction="sum", logit_scale=4.0, logit_softcap=cap)
    want = expected(kind, given, "sum", scale=4.0, cap=cap)
    check(got, want, 5e-6, ("weight", "bias") if kind in TWO_MATRICES else ())
    assert got["loss"] > 0


def test_bfloat16_sides_that_differ_by_a_thousandth_behind_a_softcap() -> None:
    generator = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn((64, 256), generator=generator)
    input = target + 1e-3 * torch.randn(target.shape, generator=generator)
    weight = torch.randn((2000, 256), generator=generator)
    given = {"input": input.bfloat16(), "target": target.bfloat16(), "weight": weight.bfloat16()}
    want = expected("sym_kl", given, "sum", cap=5.0)["loss"]
    assert oracle.relative_error(linear_sym_kl_loss(**given, logit_softcap=5.0, backend="torch"), want) < 0.02


def test_a_softcap_does_not_cancel_where_it_saturates() -> None:
    """To fp32's last digits, relative to each entry: tanh itself is one from 9 on."""
    v = torch.linspace(-40, 40, 161).unsqueeze(0)
    for apart in (1e-6, 1e-2, 3.0, 60.0):
        for sign in (1.0, -1.0):
            d = torch.full_like(v, sign * apart)
            capped = Capped(d, v, 1.0, True, torch.float32)
            # sinh d / (cosh u cosh v), in numbers that float64 holds
            u64, v64 = v.double() + d.double(), v.double()
            want = torch.sinh(d.double()) / (torch.cosh(u64) * torch.cosh(v64))
            known = want.abs() > 1e-30
            # u = v + d is rounded, and the derivative of its logarithm is two.
            error = ((capped.difference - want) / want).abs()[known]
            assert float(error.max()) < 2e-5
            assert float(((capped.slope(0) - u64.cosh() ** -2) / u64.cosh() ** -2).abs()[u64.abs() < 40].max()) < 2e-5
            slopes = u64.cosh() ** -2 - v64.cosh() ** -2
            assert oracle.relative_error(capped.slope(2), slopes) < 2e-5


@in_pytorch
@pytest.mark.parametrize("reduction", ["sum", *exhaustively("none")])
def test_gradcheck(reduction: str) -> None:
    """Of kl and jsd, whose gradients are those of their values; the others hold sides constant."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"input": (2, 3), "target": (2, 4), "weight": (5, 3), "target_weight": (5, 4), "target_bias": (5,)}
    given = {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in sizes.items()
    }
    options = {"logit_scale": 1.2, "logit_softcap": 2.0, "chunk_bytes": 5 * 8}
    for loss in (linear_kl_loss, linear_jsd_loss):
        assert torch.autograd.gradcheck(
            lambda *a, loss=loss: loss(**dict(zip(sizes, a, strict=True)), reduction=reduction, **options),
            list(given.values()),
        )


@in_pytorch
@CAPS
@every_kind
def test_a_frozen_side_costs_nothing(kind: str, cap: float | None) -> None:
    """No product for it and no gradient as large as its weight; the other side's gradients are the same bits."""
    given = tensors(2, (64,), bias=False)
    options = {"reduction": "sum", "chunk_bytes": 16 * VOCABULARY * 8, "logit_softcap": cap}
    want = run(kind, given, **options)
    shapes = {"input": (16, HIDDEN), "weight": (VOCABULARY, HIDDEN), "target": (16, WIDER),
              "target_weight": (VOCABULARY, WIDER)}  # fmt: skip
    for frozen in (("target", "target_weight"), ("input", "weight"), ("target_weight", "weight")):
        for name, each in given.items():
            each.requires_grad_(name not in frozen)
        with Products() as seen:
            got = run(kind, given, **options)
        assert set(got) == {"loss", *given} - set(frozen)
        assert all(torch.equal(value, want[name]) for name, value in got.items())
        assert [seen.shapes.count(shape) for shape in shapes.values()] == [4 * (name not in frozen) for name in shapes]


@in_pytorch
@every_kind
def test_what_is_none_is_shared(kind: str) -> None:
    given = tensors(1)
    shared = LOSSES[kind](**given)
    same = {"target_weight": given["weight"], "target_bias": given["bias"]}
    assert torch.equal(LOSSES[kind](**given, **same), shared)
    assert torch.equal(LOSSES[kind](**given, target_weight=given["weight"]), shared)
    copied = {name: each.detach().clone() for name, each in same.items()}
    for options in (copied, {"target_weight": copied["target_weight"]}, {"target_bias": copied["target_bias"]}):
        torch.testing.assert_close(LOSSES[kind](**given, **options), shared, rtol=1e-11, atol=0)
    other = given["bias"].detach() + 1.0 + torch.arange(VOCABULARY) / VOCABULARY
    for one in (LOSSES[kind](**given, target_bias=other),
                LOSSES[kind](**given, target_bias=other, target_weight=given["weight"])):  # fmt: skip
        assert oracle.relative_error(one, shared) > 0.01


@in_pytorch
@HEADS
def test_classes_may_be_left_out(heads: int) -> None:
    """By a bias of minus infinity on both sides; behind a softcap that is a logit like any other, as in the model."""
    given = tensors(heads)
    with torch.no_grad():
        for name, each in given.items():
            if "bias" in name:
                each[::3] = -float("inf")
    keep = torch.arange(VOCABULARY) % 3 != 0
    part = {
        n: (e.detach()[keep] if e.shape[0] == VOCABULARY else e.detach()).requires_grad_() for n, e in given.items()
    }
    got, want = run("jsd", given, reduction="sum"), run("jsd", part, reduction="sum")
    for name, value in got.items():
        if value.shape[:1] == (VOCABULARY,):
            assert not value[~keep].any()
            value = value[keep]
        torch.testing.assert_close(value, want[name], rtol=1e-11, atol=1e-13)
    capped = run("jsd", given, reduction="sum", logit_softcap=2.0)
    low = {n: (torch.where(e == -float("inf"), -1e4, e) if "bias" in n else e).detach().requires_grad_()
           for n, e in given.items()}  # fmt: skip
    check(capped, run("jsd", low, reduction="sum", logit_softcap=2.0), 1e-11)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_tokens(reduction: str) -> None:
    got = run(
        "jsd", tensors(2, (0, 3)), upstream=torch.ones((0, 3) if reduction == "none" else ()), reduction=reduction
    )
    assert not any(each.any() for each in got.values())


@in_pytorch
def test_autocast() -> None:
    given = tensors(2, dtypes=(torch.float32,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run("jsd", given, reduction="mean", logit_softcap=3.0)
    assert {each.dtype for each in got.values()} == {torch.float32}
    check(got, expected("jsd", given, "mean", cap=3.0), 8e-2)


@pytest.mark.exhaustive
@HEADS
def test_compiled(heads: int) -> None:
    """In one graph."""
    given = tensors(heads)
    compiled = torch.compile(
        lambda tensors: linear_jsd_loss(**tensors, logit_softcap=2.0, backend="torch"),
        backend="aot_eager",
        fullgraph=True,
    )
    want = run("jsd", given, logit_softcap=2.0, backend="torch")
    got = [compiled(given)]
    got += torch.autograd.grad(got[0], list(given.values()))
    for value, reference in zip(got, want.values(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-14)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_weight": torch.ones(80, 33), "target_bias": None}, ValueError,
         "got 70 words of the input's head and 80 of the target's"),
        ({"target_weight": torch.ones(70, 24)}, ValueError,
         r"target_weight must have shape \[V, 33\], H being that of target, got \(70, 24\)"),
        ({"target_bias": torch.ones(3)}, ValueError, r"target_bias must have shape \(70,\)"),
        ({"target": torch.ones(4, 33)}, ValueError, r"\[..., H\] and \[..., H_target\].* \(3, 5, 24\) and \(4, 33\)"),
        ({"target_weight": torch.ones(70, 33).half()}, TypeError, "target, target_weight and target_bias must have"),
        ({"weight": torch.ones(0)}, ValueError, r"weight must hold the parameter, got \(0,\).*ZeRO-3.*GatheredParam"),
        ({"target_weight": torch.ones(0, 33)}, ValueError, r"target_weight must hold the parameter, got \(0, 33\)"),
        ({"bias": torch.ones(0)}, ValueError, r"bias must hold the parameter, got \(0,\)"),
        ({"weight": torch.ones(840)}, ValueError, r"weight must have shape \[V, 24\].* got \(840,\): a flat one"),
        ({"target_weight": torch.ones(70, 33, device="meta")}, ValueError, "target_weight and input must be on"),
        ({"target_weight": torch.ones(70, 33, dtype=torch.uint8)}, TypeError, "target_weight must have a floating"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive and finite, got 0.0"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap must be positive and finite, got -1.0"),
        ({"logit_softcap": "no"}, TypeError, "logit_softcap must be a real number, got str"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {**tensors(2, dtypes=(torch.float32,)), **changes}
    with pytest.raises(error, match=message):
        linear_sym_kl_loss(**given)  # type: ignore[arg-type]


def test_the_module_takes_two_weights() -> None:
    given = tensors(2)
    sides = given["input"], given["target"]
    options = {"target_bias": given["target_bias"], "logit_softcap": 3.0, "beta": 0.3}
    want = linear_jsd_loss(**given, logit_softcap=3.0, beta=0.3)
    weights = given["weight"], given["bias"], "jsd"
    assert torch.equal(LinearDivergence(*weights, given["target_weight"], **options)(*sides), want)
    module = LinearDivergence(*weights, target_weight=given["target_weight"], **options)
    assert torch.equal(module(*sides), want)
    assert not list(module.parameters())
    with pytest.raises(ValueError, match="target and target_weight must not both be given"):
        LinearDivergence(*weights, given["target_weight"], target_weight=given["target_weight"])
