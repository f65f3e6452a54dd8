"""The table of divergences: it is asked everywhere, and a kind that it lacks is an error everywhere."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import smart_fast
from smart_fast import autograd
from smart_fast.backends import log_ratio, pytorch, registry
from smart_fast.backends.base import DIVERGENCES, DivergenceSpec
from smart_fast.losses import chunks, divergences, linear, logits, passes, sharded
from tests.helpers import ROOT

LINEAR = {kind: getattr(smart_fast, f"linear_{kind}_loss") for kind in divergences.NAMES}

every_kind = pytest.mark.parametrize("kind", divergences.NAMES)


def branches(source: str) -> list[str]:
    """Comparisons in which a divergence's name stands as a literal."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(isinstance(each, ast.Constant) and each.value in DIVERGENCES for each in ast.walk(node))
    ]


def test_nothing_but_the_table_knows_a_divergence_by_name() -> None:
    assert branches('if spec.kind == "kl" or kind in ("js", "jsd"): pass') == [
        "spec.kind == 'kl'", "kind in ('js', 'jsd')",
    ]  # fmt: skip
    found = {
        str(path.relative_to(ROOT)): branches(path.read_text())
        for path in (ROOT / "smart_fast").rglob("*.py")
        if path.name != "divergences.py"
    }
    assert len(found) > 20
    assert not {path: names for path, names in found.items() if names}


def test_the_table_imports_neither_backends_nor_autograd() -> None:
    imported = [
        node for node in ast.walk(ast.parse(inspect.getsource(divergences))) if isinstance(node, ast.ImportFrom)
    ]
    assert {node.module for node in imported if node.level} == {"checks"}


@every_kind
def test_public_functions_have_the_defaults_of_the_table(kind: str) -> None:
    entry = divergences.divergence(kind)
    for function in (logits.LOSSES[kind], LINEAR[kind]):
        parameters = inspect.signature(function).parameters
        assert parameters["reduction"].default == entry.reduction
        if entry.parameter is None:
            assert not {"alpha", "beta"} & set(parameters)
        else:
            assert parameters[entry.parameter.name].default == entry.parameter.default
    assert logits.DEFAULTS[logits.LOSSES[kind]] == (kind, entry.reduction, entry.alpha)
    assert entry.name == kind


def plan(kind: str) -> chunks.Plan:
    return chunks.Plan(pytorch.PYTORCH, kind, 0.5, 1.0, (torch.float32,) * 2, 4)


X = torch.randn(2, 3)
UNKNOWN: dict[str, Callable[[], Any]] = {
    "table": lambda: divergences.divergence("mse"),
    "no string": lambda: divergences.divergence(None),  # type: ignore[arg-type]
    "pytorch": lambda: pytorch.divergence(X, X, "mse", "sum", 1.0, None),
    "log_ratio": lambda: log_ratio.divergence_forward(X, X, DivergenceSpec("mse", "rows"), None, True, True),
    "log_ratio terms": lambda: log_ratio.terms(X, X, torch.zeros(2, 7), DivergenceSpec("mse", "terms"), None),
    "log_ratio backward": lambda: log_ratio.divergence_backward(
        torch.ones(2), X, X, torch.zeros(2, 7), DivergenceSpec("mse", "rows"), None, True, True
    ),
    "log_ratio finish": lambda: log_ratio.divergence_finish(
        X, X, torch.zeros(2, 7), DivergenceSpec("mse", "rows"), None
    ),
    "autograd": lambda: autograd.divergence(pytorch.PYTORCH, X, X, "mse", "sum", 1.0, None),
    "passes": lambda: passes.losses(plan("mse"), chunks.Operands(X, X, torch.ones(4, 3)), False, None),
    "module": lambda: linear.LinearDivergence(torch.ones(4, 3), kind="mse"),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_kind_is_an_error_that_lists_the_kinds(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"kind must be one of \['kl', 'sym_kl', 'js', 'jsd'\], got"):
        call()


def test_an_unknown_kind_of_sharded_logits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "gather", lambda tensor, group: tensor.unsqueeze(0))
    with pytest.raises(ValueError, match="kind must be one of"):
        sharded.rows(pytorch.PYTORCH, X, X, DivergenceSpec("mse", "rows"), None, None)


def test_a_backend_that_lacks_a_kind_is_not_asked_for_it(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(type(native)):  # type: ignore[misc]
        """A backend whose kernels know one divergence."""

        def __init__(self, extension: Any) -> None:
            super().__init__(extension)
            self.kinds = frozenset({"kl"})

        def divergence(self, *_: Any) -> Tensor:
            raise AssertionError("the kernels of another divergence ran")

        def plain_divergence(self, *_: Any) -> None:
            return None

    monkeypatch.setitem(registry.state.found, "native", Older(native.extension))
    weight = torch.randn(5, 3)
    with pytest.warns(smart_fast.BackendFallbackWarning, match="'native' falls back to PyTorch.*divergence 'jsd'"):
        found = smart_fast.jsd_loss(X, X.flip(0), backend="native")
    assert torch.equal(found, smart_fast.jsd_loss(X, X.flip(0), backend="torch"))
    assert smart_fast.linear_jsd_loss(X, X.flip(0), weight) > 0  # nobody asked for it by name: no warning
    with pytest.raises(AssertionError, match="kernels of another divergence"):
        smart_fast.kl_loss(X, X.flip(0), backend="native")


@every_kind
def test_sums_make_the_loss_and_gradients_that_read_them_say_so(kind: str) -> None:
    """With ``needs_sums`` false, statistics of the row may be anything finite."""
    entry = divergences.divergence(kind)
    x, t = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    spec = DivergenceSpec(kind, "rows", 0.6)
    rows, stats = log_ratio.divergence_forward(x, t, spec, None, True, True)
    assert stats is not None
    assert torch.equal(entry.rows(stats[:, log_ratio.SUMS], 0.6), rows)
    other = stats.clone()
    other[:, log_ratio.SUMS] += 1.0
    upstream = torch.ones(3, dtype=torch.float64)
    found = [log_ratio.divergence_backward(upstream, x, t, each, spec, None, True, True) for each in (stats, other)]
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)
    assert same != entry.needs_sums


def test_rows_of_the_table_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        divergences.divergence("kl").name = "other"  # type: ignore[misc]
