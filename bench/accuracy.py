"""``python -m bench accuracy``: how exact the divergences of nearly equal logits are, in fp32.

The reference is float64 with the log-ratio formulas; tests/test_oracle.py checks it in 50-digit arithmetic. Logits are
standard normal; the other side differs from them by normal noise of the given size.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import smart_fast

from .peers import EAGER, OURS

ROWS, VOCABULARY = 8, 30522
DIFFERENCES = (1.0, 1e-2, 1e-3, 1e-4, 1e-5)
KINDS = {"kl": smart_fast.kl_loss, "sym_kl": smart_fast.sym_kl_loss, "js": smart_fast.js_loss}


@dataclass(frozen=True)
class Accuracy:
    """``loss``: largest relative error of a row's divergence; ``negative``: rows below zero of ``rows``;
    ``gradient``: relative error (Euclidean norm) of the gradient to the input."""

    kind: str
    difference: float
    contestant: str
    loss: float
    negative: int
    gradient: float
    rows: int = ROWS


def exact(kind: str, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(divergence of each row, gradient of their sum to x), float64: smart-pytorch's definitions in the log-ratio."""
    x, t = x.double(), t.double()
    d, q = x - t, torch.softmax(t, -1)
    close = torch.log1p((q * torch.expm1(d)).sum(-1, keepdim=True))
    r = d - torch.where(d.abs().amax(-1, keepdim=True) < 1, close, (x.logsumexp(-1) - t.logsumexp(-1)).unsqueeze(-1))
    small = r.abs() < 1e-2
    s = torch.where(small, r, 0.0)
    f = torch.where(small, s * s / 2 * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6)))), torch.expm1(r) - r)
    gradient = q * torch.expm1(r)
    if kind == "kl":
        return (q * f).sum(-1), gradient
    if kind == "sym_kl":
        return (gradient * r).sum(-1), gradient
    return (q * (1 + r.exp()) * torch.log1p(2 * torch.sinh(r / 4) ** 2)).sum(-1), gradient / 2


def measure(device: torch.device, backends: Sequence[str]) -> Iterator[Accuracy]:
    """Every kind, difference and contestant: smart-pytorch, and those of our fused backends that serve ``device``."""
    import smart_pytorch

    theirs = {
        "kl": smart_pytorch.kl_loss, "sym_kl": smart_pytorch.sym_kl_loss, "js": smart_pytorch.js_loss,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for difference in DIFFERENCES:
        t = torch.randn(ROWS, VOCABULARY, generator=generator)
        x = t + difference * torch.randn(ROWS, VOCABULARY, generator=generator)
        for kind, loss_fn in KINDS.items():
            reference = exact(kind, x, t)
            contestants: dict[str, Callable[..., Tensor]] = {EAGER: theirs[kind]}
            for name in backends:
                contestants[OURS + name] = lambda *a, f=loss_fn, b=name, **k: f(*a, backend=b, **k)
            for name, run in contestants.items():
                yield _compare(kind, difference, name, run, x.to(device), t.to(device), reference)


def _compare(
    kind: str, difference: float, name: str, run: Callable[..., Tensor], x: Tensor, t: Tensor, reference: Any
) -> Accuracy:
    x = x.detach().requires_grad_()
    rows = torch.stack([run(x[i : i + 1], t[i : i + 1], reduction="sum") for i in range(len(x))])
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    loss, rows = reference[0], rows.detach().double().cpu()
    off = (gradient.double().cpu() - reference[1]).norm() / reference[1].norm()
    return Accuracy(
        kind, difference, name, float(((rows - loss) / loss).abs().max()), int((rows < 0).sum()), float(off)
    )


def table(results: Sequence[Accuracy]) -> list[list[str]]:
    """Header and rows: one row for a kind and difference, three columns for each contestant."""
    names = list(dict.fromkeys(each.contestant for each in results))
    lines = [["fp32 logits differ by", "divergence"]]
    lines[0] += [f"{name}: {what}" for name in names for what in ("loss", "rows < 0", "gradient")]
    for kind, difference in dict.fromkeys((each.kind, each.difference) for each in results):
        cells = [f"{difference:.0e}", kind]
        for name in names:
            found = next(r for r in results if (r.kind, r.difference, r.contestant) == (kind, difference, name))
            cells += [f"{found.loss:.0e}", f"{found.negative} of {found.rows}", f"{found.gradient:.0e}"]
        lines.append(cells)
    return lines


def show(results: Sequence[Accuracy], console: Console) -> None:
    shown = Table(title=f"relative errors, {ROWS} rows, V = {VOCABULARY}", box=box.SIMPLE_HEAD)
    header, *rows = table(results)
    for name in header:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def save(results: Sequence[Accuracy], environment: dict[str, Any], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "accuracy": [dataclasses.asdict(each) for each in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: pathlib.Path) -> list[Accuracy]:
    return [Accuracy(**each) for each in json.loads(path.read_text())["accuracy"]]
