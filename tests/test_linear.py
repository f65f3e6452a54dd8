"""The linear losses against float64 of whole logits: values, every gradient, chunks, masks, half precision, SMART."""

from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import smart_fast
from smart_fast import (
    LinearDivergence,
    SMARTLoss,
    linear_js_loss,
    linear_jsd_loss,
    linear_kl_loss,
    linear_sym_kl_loss,
    sym_kl_loss,
)
from smart_fast.backends.pytorch import PYTORCH
from smart_fast.losses import chunks
from smart_fast.losses.chunks import chunk_tokens
from smart_fast.losses.divergences import divergence
from tests import oracle
from tests.helpers import exhaustively

LOSSES = {"kl": linear_kl_loss, "sym_kl": linear_sym_kl_loss, "js": linear_js_loss, "jsd": linear_jsd_loss}
PARAMETERS = {"sym_kl": "alpha", "js": "alpha", "jsd": "beta"}
TWO_MATRICES = ("kl", "jsd")
KINDS = sorted(LOSSES)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
NAMES = ("loss", "input", "target", "weight", "bias")
HIDDEN, VOCABULARY = 24, 70

pytestmark = pytest.mark.filterwarnings("error::smart_fast.BackendFallbackWarning")

every_kind = pytest.mark.parametrize("kind", KINDS)
in_pytorch = pytest.mark.usefixtures("pytorch_by_default")


@pytest.fixture
def fused(backend: ModuleType) -> ModuleType:
    """A backend whose kernels know of differences of logits."""
    if not hasattr(backend, "divergence_parts"):
        pytest.skip(f"the {backend.name} backend does not have the kernels yet")
    return backend


def tensors(
    shape: tuple[int, ...] = (3, 5), apart: float = 0.5, dtype: torch.dtype = torch.float64, device: str = "cpu",
    vocabulary: int = VOCABULARY,
) -> list[Tensor]:  # fmt: skip
    """Two hidden states, weight and bias; logits of size one."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn((*shape, HIDDEN), generator=generator, dtype=torch.float64)
    input = target + apart * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn((vocabulary, HIDDEN), generator=generator, dtype=torch.float64) / HIDDEN**0.5
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return [each.to(device, dtype).requires_grad_() for each in (input, target, weight, bias)]


def some_tokens(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask.view(-1)[:2] = torch.tensor([False, True])[: mask.numel()]
    return mask


def run(
    kind: str, given: list[Tensor], *args: object, upstream: Tensor | None = None, **options: object
) -> list[Tensor]:
    """The loss and the gradients to whatever requires one."""
    loss = LOSSES[kind](*given, *args, **options)
    leaves = [each for each in given if each.requires_grad]
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream.to(loss))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
    return [loss, *grads]


def expected(
    kind: str, given: list[Tensor], reduction: str, alpha: float | None = None, upstream: Tensor | None = None,
    mask: Tensor | None = None, temperature: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """The same from whole float64 logits."""
    alpha = divergence(kind).alpha if alpha is None else alpha
    named = dict(zip(NAMES[1:], given, strict=True))
    found = oracle.projected_divergence(kind, alpha, named, reduction, upstream, mask, temperature)
    return [found[name] for name in NAMES]


def check(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, value, reference in zip(NAMES, got, want, strict=True):
        if value.any() or float(reference.abs().max()) > 1e-12:  # what is zero but for float64's rounding is zero here
            error = oracle.relative_error(value, reference)
            assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def agree(kind: str, reduction: str, masked: bool, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    """One case, with an upstream gradient, alpha, a temperature, and chunks that do not divide the tokens."""
    given = tensors(dtype=dtype, device=device)
    mask = some_tokens((3, 5)).to(device) if masked else None
    alpha = 1.0 if kind == "kl" else 0.7
    upstream = torch.rand((3, 5) if reduction == "none" else (), generator=torch.Generator().manual_seed(3)) + 0.1
    options = {PARAMETERS[kind]: alpha} if kind in PARAMETERS else {}
    options |= {"mask": mask, "temperature": 1.6, "chunk_bytes": 4 * VOCABULARY * dtype.itemsize, "upstream": upstream}
    got = run(kind, given, reduction, **options)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(got, expected(kind, given, reduction, alpha, upstream, mask, 1.6), tolerance)


@in_pytorch
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_kind
def test_whole_logits_agree(kind: str, reduction: str, masked: bool, dtype: torch.dtype) -> None:
    agree(kind, reduction, masked, dtype, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("masked", [True, *exhaustively(False)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@every_kind
def test_whole_logits_agree_in_kernels(
    kind: str, reduction: str, masked: bool, fused: ModuleType, device: torch.device, poison: None
) -> None:
    agree(kind, reduction, masked, torch.float32, 2e-6, str(device))


@in_pytorch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@every_kind
def test_half_precision(kind: str, reduction: str, dtype: torch.dtype) -> None:
    # The gradients of the weight are a difference of two GEMMs of rounded matrices.
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype] * (4 if kind in TWO_MATRICES else 1)
    agree(kind, reduction, False, dtype, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_half_precision_in_kernels(
    kind: str, dtype: torch.dtype, fused: ModuleType, device: torch.device, poison: None
) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype] * (4 if kind in TWO_MATRICES else 1)
    agree(kind, "batchmean", True, dtype, tolerance, str(device))


@in_pytorch
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)], ids=lambda shape: f"{len(shape) + 1}-D")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_kind
def test_any_number_of_dimensions(kind: str, reduction: str, shape: tuple[int, ...]) -> None:
    given = tensors(shape)
    want = expected(kind, given, reduction)
    got = run(kind, given, reduction)
    assert got[0].shape == (shape if reduction == "none" else ())
    check(got, want, 1e-12)
    mask = torch.ones(shape, dtype=torch.bool)
    check(run(kind, given, reduction, mask=mask), want, 1e-12)


@in_pytorch
@pytest.mark.parametrize("tokens", [1, 2, 4, 15, 100])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_kind
def test_chunks_make_no_difference(kind: str, reduction: str, tokens: int) -> None:
    given = tensors()
    size = tokens * VOCABULARY * 8
    check(run(kind, given, reduction, chunk_bytes=size), expected(kind, given, reduction), 1e-12)
    assert LOSSES[kind](*given, chunk_bytes=1).isfinite()


@in_pytorch
@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_kind
def test_only_what_is_wanted(kind: str, reduction: str) -> None:
    given = tensors()
    want = expected(kind, given, reduction)
    for chosen in range(1, 16):
        for index, each in enumerate(given):
            each.requires_grad_(bool(chosen >> index & 1))
        got = run(kind, given, reduction)
        wanted = [w for w, each in zip(want[1:], given, strict=True) if each.requires_grad]
        for value, reference in zip(got[1:], wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-13)


@in_pytorch
@every_kind
def test_any_strides(kind: str) -> None:
    given = tensors((5, 3))
    plain = run(kind, given, "sum")
    strided = [
        given[0].detach().transpose(0, 1).contiguous().transpose(0, 1),
        given[1].detach().repeat_interleave(2, -1),
    ]
    strided = [
        strided[0],
        strided[1][..., ::2],
        given[2].detach().t().contiguous().t(),
        given[3].detach().expand(2, -1)[1],
    ]
    for value, reference in zip(run(kind, [each.requires_grad_() for each in strided], "sum"), plain, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)
    none = run(kind, given, "none", upstream=torch.ones(()).expand(5, 3))
    for value, reference in zip(none[1:], plain[1:], strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)


@in_pytorch
@pytest.mark.parametrize("masked", [True, *exhaustively(False)])
def test_gradcheck(masked: bool) -> None:
    """Of kl and jsd, whose gradients are those of their values; the others hold sides constant."""
    given = [each.detach()[..., :4].requires_grad_() for each in tensors((2, 3), vocabulary=7)[:3]]
    given.append(torch.randn(7, dtype=torch.float64, requires_grad=True))
    options = {"mask": some_tokens((2, 3)) if masked else None, "temperature": 0.7, "chunk_bytes": 2 * 7 * 8}
    for reduction in ("none", "mean"):
        for loss in (linear_kl_loss, linear_jsd_loss):
            assert torch.autograd.gradcheck(lambda *a, r=reduction, loss=loss: loss(*a, r, **options), given)


@in_pytorch
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_kind
def test_masked_tokens_may_hold_anything(
    kind: str, reduction: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:  # where masked tokens keep their places
        monkeypatch.setattr(chunks, "kept", lambda mask: (None, mask))
    given, mask = tensors(), some_tokens((3, 5))
    want = run(kind, given, reduction, mask=mask)
    dirty = [each.detach().clone() for each in given]
    dirty[0][~mask], dirty[1][~mask] = float("nan"), float("inf")
    upstream = torch.ones((3, 5) if reduction == "none" else (), dtype=torch.float64)
    if reduction == "none":
        upstream[~mask] = float("nan")
    got = run(kind, [each.requires_grad_() for each in dirty], reduction, mask=mask, upstream=upstream)
    for value, reference in zip(got, want, strict=True):
        assert torch.equal(value, reference)
    nothing = run(kind, given, reduction, mask=torch.zeros_like(mask))
    assert not any(each.any() for each in nothing)


@in_pytorch
@every_kind
def test_classes_may_be_left_out(kind: str) -> None:
    given = tensors()
    with torch.no_grad():
        given[3][::3] = -float("inf")
    keep = [each.detach() for each in given]
    keep[2], keep[3] = (torch.stack([row for i, row in enumerate(each) if i % 3]) for each in keep[2:])
    want = expected(kind, keep, "sum")
    got = run(kind, given, "sum")
    assert not got[3][::3].any()
    assert not got[4][::3].any()
    check([*got[:3], *(torch.stack([row for i, row in enumerate(each) if i % 3]) for each in got[3:])], want, 1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@every_kind
def test_no_tokens(kind: str, shape: tuple[int, ...], reduction: str) -> None:
    loss, *grads = run(kind, tensors(shape, dtype=torch.float32), reduction, mask=torch.ones(shape, dtype=torch.bool))
    assert torch.equal(loss, torch.zeros(shape if reduction == "none" else ()))
    assert not any(each.any() for each in grads)


@in_pytorch
@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_kind
def test_a_second_backward_pass(kind: str, reduction: str) -> None:
    given = tensors()
    loss = LOSSES[kind](*given, reduction)
    upstream = torch.full_like(loss, 1.7)
    first = torch.autograd.grad(loss, given, upstream, retain_graph=True)
    kept = [each.clone() for each in first]
    for each in first:
        each.zero_()  # a receiver may do that
    for value, reference in zip(torch.autograd.grad(loss, given, upstream), kept, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-13)


@in_pytorch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """GEMMs in the autocast dtype, losses in fp32, gradients in the dtypes of the parameters."""
    given = tensors(dtype=torch.float32)
    given[0] = given[0].detach().to(dtype).requires_grad_()  # what a layer under autocast gives
    want = expected("sym_kl", given, "mean", 1.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_sym_kl_loss(*given, "mean")
    assert loss.dtype == torch.float32
    got = [loss, *torch.autograd.grad(loss, given)]
    assert [each.dtype for each in got[1:]] == [dtype, torch.float32, torch.float32, torch.float32]
    check(got, want, 2e-2 if dtype == torch.bfloat16 else 3e-3)
    double = [each.detach().double() for each in given]
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(linear_sym_kl_loss(*double, "mean"), linear_sym_kl_loss(*double, "mean", backend="torch"))
        assert linear_sym_kl_loss(*double).dtype == torch.float64


@in_pytorch
@pytest.mark.parametrize("apart", [1e-5, 1e-3])
@every_kind
def test_nearly_equal(kind: str, apart: float) -> None:
    """Against float64 of the same fp32 numbers. (Not the weight of kl and jsd: two GEMMs cancel there.)"""
    given = tensors(apart=apart, dtype=torch.float32)
    got, want = run(kind, given, "sum"), expected(kind, given, "sum")
    count = 3 if kind in TWO_MATRICES else 5
    check(got[:count] + want[count:], want, 2e-6)
    assert got[0] > 0


def test_bfloat16_sides_that_differ_by_a_thousandth(capsys: pytest.CaptureFixture[str]) -> None:
    """What the difference of hidden states is for."""
    generator = torch.Generator().manual_seed(0)
    target = 0.1 * torch.randn((64, 256), generator=generator)
    input = target + 1e-3 * torch.randn(target.shape, generator=generator)
    weight = torch.randn((2000, 256), generator=generator)
    given = [each.bfloat16() for each in (input, target, weight)]
    exact = oracle.divergence_rows("sym_kl", *(F.linear(h.double(), given[2].double()) for h in given[:2]), 1.0).sum()
    ours = oracle.relative_error(linear_sym_kl_loss(*given, backend="torch"), exact)
    logits = [F.linear(h, given[2]) for h in given[:2]]
    theirs = oracle.relative_error(sym_kl_loss(*logits, backend="torch"), exact)
    with capsys.disabled():
        print(f"\nbf16, hidden states 1e-3 apart: linear_sym_kl {ours:.2%} off, eager on whole logits {theirs:.0%} off")
    assert ours < 0.02
    assert theirs > 10 * max(ours, 0.02)


# ---- what is computed, and what is not -------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """The shapes of all matrix products, and the largest number of elements of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                self.shapes.append(tuple(result.shape))
        return result


@in_pytorch
@pytest.mark.parametrize(("kind", "products"), [("kl", 2), ("sym_kl", 1), ("js", 1), ("jsd", 2)])
def test_products_of_a_training_step(kind: str, products: int) -> None:
    """Logits and their difference once; one product a matrix of gradients; nothing as large as the logits."""
    given = tensors((64,))
    with Products() as seen:
        run(kind, given, "sum", chunk_bytes=16 * VOCABULARY * 8)
    logits, hidden, weight = (16, VOCABULARY), (16, HIDDEN), (VOCABULARY, HIDDEN)
    assert [seen.shapes.count(shape) for shape in (logits, hidden, weight)] == [4 * 2, 4 * products, 4 * products]
    assert seen.largest == VOCABULARY * HIDDEN
    with Products() as seen, torch.no_grad():
        LOSSES[kind](*given, "sum", chunk_bytes=16 * VOCABULARY * 8)
    assert seen.shapes == [logits] * 8


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Linear(6, HIDDEN, dtype=torch.float64),
            nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64),
        )

    def forward(self, embed: Tensor) -> Tensor:
        return self.body(embed).tanh()


def regularizers(model: Body, **options: object) -> tuple[SMARTLoss, SMARTLoss]:
    """By hidden states and by whole logits."""
    linear = LinearDivergence(model.head.weight, model.head.bias, kind="sym_kl", reduction="batchmean", **options)

    def eval_fn(embed: Tensor) -> Tensor:
        logits: Tensor = model.head(model(embed))
        return logits

    settings = {"step_size": 1.0, "noise_var": 0.1, "backend": "torch"}
    whole = SMARTLoss(eval_fn, lambda x, t: sym_kl_loss(x, t, "batchmean"), **settings)
    return SMARTLoss(model, linear, **settings), whole


def test_smart_on_hidden_states() -> None:
    model, embed = Body(), torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    linear, whole = regularizers(model)
    found = []
    for smart, state in ((linear, model(embed)), (whole, model.head(model(embed)))):
        torch.manual_seed(0)
        loss = smart(embed, state)
        found.append([loss, *torch.autograd.grad(loss, [embed, *model.parameters()])])
    for value, reference in zip(*found, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-8, atol=1e-12)


def test_the_ascent_spends_nothing_on_the_weight() -> None:
    model, embed = Body(), torch.randn(4, 3, 6, dtype=torch.float64)
    linear, _ = regularizers(model)
    ascent_alone = SMARTLoss(model, linear.loss_fn, lambda x, t: (x - t).sum(), num_steps=2, backend="torch")
    with Products() as seen:
        ascent_alone(embed, model(embed).detach())
    assert seen.shapes.count((12, VOCABULARY)) == 2 * 2
    assert (VOCABULARY, HIDDEN) not in seen.shapes
    with Products() as seen:
        linear(embed, model(embed).detach()).backward()
    assert seen.shapes.count((VOCABULARY, HIDDEN)) == 1
    assert model.head.weight.grad is not None


def test_the_module_holds_the_weight_and_does_not_register_it() -> None:
    model = Body()
    linear, _ = regularizers(model, temperature=2.0)
    assert set(linear.state_dict()) == {f"eval_fn.{name}" for name in model.state_dict()}
    assert len(list(linear.parameters())) == 4
    copied = copy.deepcopy(linear)
    assert copied.loss_fn.weight is copied.eval_fn.head.weight
    assert copied.loss_fn.weight is not model.head.weight
    loaded = pickle.loads(pickle.dumps(linear))
    assert loaded.loss_fn.weight is loaded.eval_fn.head.weight
    assert loaded.loss_fn.options == {"reduction": "batchmean", "temperature": 2.0}
    linear.float()
    assert linear.loss_fn.weight.dtype == torch.float32
    assert "kind='sym_kl'" in repr(linear)
    assert "temperature=2.0" in repr(linear)


def test_the_backend_of_the_caller_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(smart_fast.losses.linear, "select", lambda backend, *_, **__: asked.append(backend) or PYTORCH)
    linear, _ = regularizers(Body())
    embed = torch.randn(2, 6, dtype=torch.float64)
    linear(embed, linear.eval_fn(embed))
    assert asked == ["torch", "torch"]
    linear_sym_kl_loss(*tensors())
    assert asked[-1] == "auto"


def test_chunks_by_budget() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_tokens(2048, 32000, 4, None, cpu) == 512  # 524 fit 64 MiB: four equal chunks
    assert chunk_tokens(8192, 128256, 2, None, cuda) == 1024
    assert chunk_tokens(8192, 262144, 4, None, cpu) == 256
    assert chunk_tokens(8192, 10, 4, None, cpu) == 4096
    assert chunk_tokens(100, 32000, 4, None, cpu) == 100
    assert chunk_tokens(100, 1000, 4, 1, cpu) == 1
    assert chunk_tokens(100, 1000, 4, 40000, cpu) == 10


# ---- errors ----------------------------------------------------------------------------------------------------------


def wrong(**changes: object) -> None:
    names = ("input", "target", "weight", "bias")
    arguments: dict[str, object] = dict(zip(names, tensors(dtype=torch.float32), strict=True)) | changes
    linear_sym_kl_loss(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": 1}, TypeError, "input must be a torch.Tensor, got int"),
        ({"weight": torch.ones(3, 24, dtype=torch.int64)}, TypeError, "weight must have a floating point dtype"),
        ({"weight": torch.ones(3, 24, dtype=torch.complex64)}, TypeError, "weight must be real, got torch.complex64"),
        ({"target": torch.ones(3, 24)}, ValueError, r"same shape \[..., H\], got \(3, 5, 24\) and \(3, 24\)"),
        ({"weight": torch.ones(70, 23)}, ValueError, r"weight must have shape \[V, 24\].*got \(70, 23\)"),
        ({"weight": torch.ones(24)}, ValueError, r"weight must have shape \[V, 24\].*got \(24,\)"),
        ({"bias": torch.ones(24)}, ValueError, r"bias must have shape \(70,\).*got \(24,\)"),
        ({"bias": torch.ones(70).bfloat16()}, TypeError, "must have one dtype outside autocast.*bias torch.bfloat16"),
        ({"weight": torch.ones(70, 24, device="meta")}, ValueError, "weight and input must be on one device"),
        ({"mask": torch.ones(3, 5)}, TypeError, "mask must have dtype torch.bool"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"mask must have the shape.*\(3, 5\), got \(3, 4\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' does not exist"),
        ({"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a plain number, got a Tensor"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be positive and finite, got inf"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number, got str"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be positive, got 0"),
        ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes must be an integer or None, got float"),
        ({"chunk_bytes": True}, TypeError, "chunk_bytes must be an integer or None, got bool"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong(**changes)


def test_errors_of_the_module() -> None:
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match="kind must be one of"):
        LinearDivergence(weight, kind="mse")
    with pytest.raises(TypeError, match=r"options of kind='kl' must be among .*, got \['alpha'\]"):
        LinearDivergence(weight, kind="kl", alpha=1.0)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        LinearDivergence(None)
