"""`LinearDivergence` of modules: what their forward pass computes, against whole logits in float64."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import smart_fast
from smart_fast import LinearDivergence, SMARTLoss
from smart_fast.losses import heads
from tests import oracle
from tests.test_linear import KINDS, PARAMETERS, Products, some_tokens

LOSSES = {kind: getattr(smart_fast, f"{kind}_loss") for kind in KINDS}
HIDDEN, WIDER, VOCABULARY, RANK = 12, 17, 40, 3

every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("pytorch_by_default")


class Adapted(nn.Module):
    """A Linear with a low-rank adapter, as adapters are: frozen weight, dropout before the first factor."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False)
        self.down, self.up = nn.Linear(HIDDEN, RANK, bias=False), nn.Linear(RANK, VOCABULARY, bias=False)
        self.dropout, self.out_features = nn.Dropout(dropout), VOCABULARY

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.base(hidden) + 2.0 * self.up(self.down(self.dropout(hidden)))
        return result


class Quantized(nn.Module):
    """Frozen bytes with a scale for each row, made numbers in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(0, 256, (VOCABULARY, HIDDEN), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(VOCABULARY, 1) / 128)
        self.bias = nn.Parameter(torch.randn(VOCABULARY))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, (self.weight.to(hidden.dtype) - 128.0) * self.scale, self.bias)


class Masked(nn.Module):
    """A parametrization: half of the weight is zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.arange(weight.shape[1]) % 2)


def parametrized() -> nn.Module:
    head = parametrizations.weight_norm(nn.Linear(HIDDEN, VOCABULARY))
    nn.utils.parametrize.register_parametrization(head, "weight", Masked())
    return head


def hooked() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(HIDDEN, VOCABULARY))


def replaced() -> nn.Module:
    """As accelerate replaces the forward pass of one module."""
    head = nn.Linear(HIDDEN, VOCABULARY)
    head.forward = functools.partial(lambda forward, hidden: 3.0 * forward(hidden), head.forward)
    return head


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(HIDDEN, VOCABULARY, bias=False),
    "parametrized": parametrized,
    "weight_norm": hooked,
    "replaced": replaced,
    "adapted": Adapted,
    "quantized": Quantized,
    "sequential": lambda: nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, VOCABULARY)),
}  # fmt: skip
READ = ("linear", "parametrized")


def sides(*shape: int, wider: bool = False, apart: float = 0.5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    x = torch.randn(*shape, HIDDEN, dtype=torch.float64)
    t = torch.randn(*shape, WIDER, dtype=torch.float64) if wider else x + apart * torch.randn_like(x)
    return [each.to(dtype).requires_grad_() for each in (x, t)]


def gradients(loss: Tensor, given: list[Tensor], *modules: nn.Module, upstream: Tensor | None = None) -> list[Tensor]:
    """The loss and all gradients, by name those of parameters."""
    leaves = given + [each for module in modules for each in module.parameters() if each.requires_grad]
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


def whole(
    kind: str, given: list[Tensor], head: nn.Module, other: nn.Module, mask: Tensor | None = None, scale: float = 1.0,
    cap: float | None = None, temperature: float = 1.0, **options: object,
) -> Tensor:  # fmt: skip
    """The losses of tokens from whole logits: sums of terms."""
    logits = [scale * module(each) for module, each in zip((head, other), given, strict=True)]
    x, t = (each if cap is None else cap * torch.tanh(each / cap) for each in logits)
    return LOSSES[kind](x, t, "none", mask=mask, temperature=temperature, backend="torch", **options).sum(-1)


def check(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for index, (value, reference) in enumerate(zip(got, want, strict=True)):
        assert value.dtype == reference.dtype
        if max(float(each.detach().abs().max()) for each in (value, reference)) < 1e-12:
            continue  # what is zero but for float64's rounding is zero here
        error = oracle.relative_error(value, reference)
        assert error <= tolerance, f"{index}: relative error {error:.1e}"


@pytest.mark.parametrize("name", MODULES)
@every_kind
def test_a_module_is_what_it_computes(kind: str, name: str) -> None:
    head = MODULES[name]().double()
    assert isinstance(heads.of_module(head), heads.Weights) == (name in READ)
    given, mask = sides(3, 5), some_tokens((3, 5))
    options = {PARAMETERS[kind]: 0.7} if kind in PARAMETERS else {}
    for capped in ({}, {"logit_scale": 1.3, "logit_softcap": 2.0}):
        module = LinearDivergence(
            head, kind=kind, reduction="none", mask=mask, temperature=1.6, chunk_bytes=4 * VOCABULARY * 8,
            **options, **capped,
        )  # fmt: skip
        assert not list(module.parameters())
        upstream = torch.rand(3, 5, dtype=torch.float64)
        got = gradients(module(*given), given, head, upstream=upstream)
        scale, cap = capped.get("logit_scale", 1.0), capped.get("logit_softcap")
        want = whole(kind, given, head, head, mask, scale, cap, 1.6, **options)
        check(got, gradients(want, given, head, upstream=upstream))


@pytest.mark.parametrize("name", MODULES)
@every_kind
def test_a_module_of_the_targets_own(kind: str, name: str) -> None:
    """Of another width, without the bias that the first has; a frozen one gets nothing."""
    head, teacher = MODULES[name]().double(), nn.Linear(WIDER, VOCABULARY, bias=False).double()
    given = sides(7, wider=True)
    for frozen in (False, True):
        teacher.requires_grad_(not frozen)
        module = LinearDivergence(head, kind=kind, target=teacher, reduction="sum", chunk_bytes=3 * VOCABULARY * 8)
        want = whole(kind, given, head, teacher).sum()
        check(gradients(module(*given), given, head, teacher), gradients(want, given, head, teacher))
    turned = LinearDivergence(teacher, kind=kind, target=head, reduction="sum")
    want = whole(kind, given[::-1], teacher, head).sum()
    check(gradients(turned(*given[::-1]), given, head), gradients(want, given, head))
    weight = LinearDivergence(head, kind=kind, target=teacher.weight, target_bias=torch.zeros(VOCABULARY).double())
    assert weight(*given).isfinite()


@every_kind
def test_any_reduction_and_number_of_dimensions(kind: str) -> None:
    head = Adapted().double()
    for shape in ((), (6,), (2, 1, 3)):
        given = sides(*shape)
        rows = whole(kind, given, head, head)
        for reduction, want in {
            "none": rows, "sum": rows.sum(), "mean": rows.sum() / rows.numel() / VOCABULARY,
            "batchmean": rows.sum() / (shape[0] if shape else VOCABULARY),
        }.items():  # fmt: skip
            got = LinearDivergence(head, kind=kind, reduction=reduction)(*given)
            torch.testing.assert_close(got, want, rtol=1e-11, atol=0)


def test_masked_tokens_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    head, mask = Adapted().double(), some_tokens((3, 5))
    given = sides(3, 5)
    want = gradients(LinearDivergence(head, mask=mask)(*given), given, head)
    with torch.no_grad():
        given[0][~mask], given[1][~mask] = float("nan"), float("inf")
    for _ in range(2):
        got = gradients(LinearDivergence(head, mask=mask)(*given), given, head)
        check(got, want, 1e-12)
        monkeypatch.setattr(smart_fast.losses.modules, "kept", lambda mask: (None, mask))  # as on a GPU
    nothing = LinearDivergence(head, mask=torch.zeros_like(mask), reduction="none")(*given)
    assert not nothing.any()
    assert nothing.shape == (3, 5)
    assert not LinearDivergence(head)(*(each[:0] for each in given)).any()


def test_dropout_is_drawn_for_each_side_and_the_same_in_the_backward_pass() -> None:
    head = Adapted(0.5).double()
    given = sides(8)

    def whole_logits() -> Tensor:
        return whole("kl", given, head, head).sum()

    losses = []
    for loss in (lambda: LinearDivergence(head, kind="kl", reduction="sum")(*given), whole_logits):
        torch.manual_seed(5)
        losses.append(gradients(loss(), given, head))
    check(*losses)
    assert LinearDivergence(head)(given[0], given[0]).item() > 0  # two masks
    head.eval()
    assert LinearDivergence(head)(given[0], given[0]).item() == 0


def test_frozen_weights_get_no_gradients() -> None:
    """A product with the adapter in each direction, none as large as the weight, nothing as large as all logits."""
    head, given = Adapted(), sides(64, dtype=torch.float32)
    with Products() as seen:
        loss = LinearDivergence(head, reduction="sum", chunk_bytes=16 * VOCABULARY * 4)(*given)
        gradients(loss, given, head)
    assert (VOCABULARY, RANK) in seen.shapes
    assert (VOCABULARY, HIDDEN) not in seen.shapes
    assert seen.largest <= max(64 * HIDDEN, 17 * VOCABULARY)


class Body(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, HIDDEN), head

    def forward(self, embed: Tensor) -> Tensor:
        return self.body(embed).tanh()


@pytest.mark.parametrize("name", ["parametrized", "adapted", "quantized"])
def test_smart_on_hidden_states(name: str) -> None:
    model = Body(MODULES[name]()).double()
    embed = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    settings = {"step_size": 1.0, "noise_var": 0.1, "backend": "torch"}
    linear = SMARTLoss(model, LinearDivergence(model.head, reduction="batchmean"), **settings)
    logits = SMARTLoss(
        lambda e: model.head(model(e)), lambda x, t: smart_fast.sym_kl_loss(x, t, "batchmean"), **settings
    )
    found = []
    for smart, state in ((linear, model(embed)), (logits, model.head(model(embed)))):
        torch.manual_seed(0)
        found.append(gradients(smart(embed, state), [embed], model))
    check(*found, 1e-8)


def test_the_module_is_held_and_not_registered() -> None:
    model = Body(Adapted())
    smart = SMARTLoss(model, LinearDivergence(model.head, kind="kl", target=model.head.base))
    assert set(smart.state_dict()) == {f"eval_fn.{name}" for name in model.state_dict()}
    for other in (copy.deepcopy(smart), pickle.loads(pickle.dumps(smart))):
        assert other.loss_fn.weight is other.eval_fn.head
        assert other.loss_fn.target is other.eval_fn.head.base
        assert other.eval_fn.head is not model.head
    assert "head=Adapted, kind='kl'" in repr(smart)


def test_autocast() -> None:
    head, given = Adapted(), sides(3, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(LinearDivergence(head)(*given), given, head)
    assert {each.dtype for each in got} == {torch.float32}
    check(got, gradients(whole("sym_kl", given, head, head).sum(), given, head), 5e-2)


def test_errors() -> None:
    head, given = Adapted(), sides(2, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight must be a tensor where a bias is given: a module has its own"):
        LinearDivergence(head, torch.ones(VOCABULARY))
    with pytest.raises(ValueError, match="target must be a tensor where a bias is given"):
        LinearDivergence(head, target=head, target_bias=torch.ones(VOCABULARY))
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor"):
        LinearDivergence(head, target="teacher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_bias must come with a weight of the target"):
        LinearDivergence(head, target_bias=torch.ones(VOCABULARY))(*given)
    with pytest.raises(ValueError, match=r"got 40 words of the input's head and 41 of the target's"):
        LinearDivergence(head, target=nn.Linear(HIDDEN, 41))(*given)
    identity = nn.Identity()
    identity.forward = lambda hidden: (hidden,)
    with pytest.raises(ValueError, match=r"logits \[n, V\] of hidden states \[\d+, 12\], Identity made tuple"):
        LinearDivergence(identity)(*given)
    with pytest.raises(ValueError, match=r"Flatten made shape \(\d+,\)"):
        LinearDivergence(nn.Flatten(0))(*given)
    linear = nn.Linear(HIDDEN, VOCABULARY)
    linear.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(
        ValueError, match=r"weight must hold the parameter, got \(0,\): this is what DeepSpeed's ZeRO-3"
    ):
        LinearDivergence(linear)(*given)
