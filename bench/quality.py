"""``python -m bench quality``: what regularizers do to a model: accuracy, clean and attacked, for what time and memory.

Two data sets of scikit-learn with a small network on standardized features, where the whole input is the embedding,
and a small transformer on made-up tokens. Every row of a task trains the same models on the same batches.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import smart_pytorch
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import smart_fast
from smart_fast import recipes

from .measure import peak_memory

SEEDS = range(5, 10)  # RECOMMENDED was chosen on seeds 0 to 4
WEAK, STRONG = RADII = 0.1, 0.3  # of the attacks, in the largest entry
RADIUS = recipes.RECOMMENDED["epsilon"]
BALL = {"update": "paper", "scale": "relative", "epsilon": RADIUS}
NONE, SMART_PYTORCH, BREGMAN = "none", "smart-pytorch", "Bregman"
#: Settings of `smart_fast.SMARTLoss`; what else there is in a row is in its name.
ROWS: dict[str, dict[str, Any]] = {
    NONE: {},
    SMART_PYTORCH: {},
    "random noise": {
        "scale": "relative",
        "noise_var": RADIUS,
        "num_steps": 0,
    },  # as long (l2) as the corners of the ball
    "paper": {**BALL, "noise_var": RADIUS / 10, "step_size": RADIUS},  # the largest entry goes to the edge
    "fisher": {**BALL, "noise_var": RADIUS / 10, "step_size": RADIUS, "ascent": "fisher"},
    "sign": {**BALL, "noise_var": RADIUS / 10, "step_size": 1000 * RADIUS},  # all entries do
    "recommended": dict(recipes.RECOMMENDED),
    BREGMAN: {},
    f"recommended + {BREGMAN}": dict(recipes.RECOMMENDED),
}
BETA, MU = 0.99, 1.0  # of the Bregman proximal term
RATE, BATCH = 3e-3, 50  # of Adam


@dataclass(frozen=True)
class Task:
    """``relative``: attacks are in units of each token's root mean square."""

    name: str
    data: Callable[[int], tuple[Tensor, Tensor, Tensor, Tensor]]  # seed -> inputs and labels to train on, and to test
    model: Callable[[Tensor, Tensor], nn.Module]
    epochs: int
    relative: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Quality:
    """One row of one task for one seed. Accuracies as shares, times in seconds, memory in bytes."""

    task: str
    row: str
    seed: int
    clean: float
    gaussian: float
    fgsm_weak: float
    pgd_weak: float
    fgsm: float
    pgd: float
    ascent_ratio: float | None
    step_time: float
    peak: int


class Network(nn.Module):
    """Features are their own embedding."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, classes))

    def embed(self, inputs: Tensor) -> Tensor:
        return inputs.clone().requires_grad_()

    def forward(self, embed: Tensor) -> Tensor:
        logits: Tensor = self.layers(embed)
        return logits


class Transformer(nn.Module):
    def __init__(self, words: int, length: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) / 10)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.words(inputs)  # type: ignore[no-any-return]

    def forward(self, embed: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(embed + self.places).mean(1))
        return logits


def _scikit(load: str, train: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn import datasets

    features, labels = (torch.tensor(each) for each in getattr(datasets, load)(return_X_y=True))
    features = features.float()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    used, rest = order[:train], order[train:]
    mean, std = features[used].mean(0), features[used].std(0).clamp(min=1e-3)
    features = ((features - mean) / std).clamp(-5, 5)
    return features[used], labels[used], features[rest], labels[rest]


def _tokens(seed: int, words: int = 60, length: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which of three kinds of words is the most frequent?"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (2000, length), generator=generator)
    labels = F.one_hot(ids % 3, 3).sum(1).argmax(1)
    return ids[:600], labels[:600], ids[600:1600], labels[600:1600]


def _network(inputs: Tensor, labels: Tensor) -> nn.Module:
    return Network(inputs.shape[1], int(labels.max()) + 1)


def _transformer(inputs: Tensor, labels: Tensor) -> nn.Module:
    return Transformer(int(inputs.max()) + 1, inputs.shape[1], int(labels.max()) + 1)


TASKS = (
    Task("digits", functools.partial(_scikit, "load_digits", 600), _network, 40),
    Task("breast_cancer", functools.partial(_scikit, "load_breast_cancer", 300), _network, 40),
    Task("tokens", _tokens, _transformer, 15, relative=True),
)


def measure(
    say: Callable[[str], None] = lambda doing: None, tasks: Sequence[Task] = TASKS, seeds: Sequence[int] = SEEDS
) -> list[Quality]:
    """Every row of every task for every seed, a process for each processor and one thread in each: these models are
    too small to share. All rows of a task and seed run in one process, one after the other, so that their times and
    numbers can be compared."""
    jobs = [(task, seed) for task in reversed(tasks) for seed in seeds]  # the longest first
    found: dict[tuple[str, int], list[Quality]] = {}
    with concurrent.futures.ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        running = {pool.submit(all_rows, task, seed): (task.name, seed) for task, seed in jobs}
        for done in concurrent.futures.as_completed(running):
            found[running[done]] = done.result()
            say(f"{len(found)} of {len(jobs)}: {running[done][0]}, seed {running[done][1]}")
    return [each for task in tasks for seed in seeds for each in found[task.name, seed]]


def all_rows(task: Task, seed: int) -> list[Quality]:
    data = task.data(seed)
    return [run(task, row, seed, data) for row in ROWS]


def run(task: Task, row: str, seed: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> Quality:
    """Train one model and attack it."""
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(seed)
    model = task.model(train_x, train_y)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    smart = regularizer(row, model)
    proximal = smart_fast.BregmanProximal(model, BETA, MU) if BREGMAN in row else None

    def step(x: Tensor, y: Tensor) -> None:
        embed = model.embed(x)  # type: ignore[operator]
        logits = model(embed)
        loss = F.cross_entropy(logits, y)
        if smart is not None:
            loss = loss + task.weight * smart(embed, logits)
        if proximal is not None:
            loss = loss + proximal(logits, embed.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if proximal is not None:
            proximal.update()

    times = []
    batches = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(train_y), generator=batches).split(BATCH):
            start = time.perf_counter()
            step(train_x[chosen], train_y[chosen])
            times.append(time.perf_counter() - start)
    quick = statistics.quantiles(times, n=10)[0]  # the lowest decile: other processes only add
    peak = peak_memory(step, (train_x[:BATCH], train_y[:BATCH]), torch.device("cpu"))
    model.eval()
    ratio = None
    if smart is not None:
        ours = smart if isinstance(smart, smart_fast.SMARTLoss) else _ours(model, backend="torch")
        ratio = smart_fast.ascent_ratio(ours, model.embed(test_x[:200]).detach())  # type: ignore[operator]
    return Quality(task.name, row, seed, *attacked(task, model, test_x, test_y), ratio, quick, peak)


def regularizer(row: str, model: nn.Module) -> Any:
    """What is added to the loss in a row; None: nothing."""
    if row == SMART_PYTORCH:
        losses = smart_pytorch.kl_loss, functools.partial(smart_pytorch.sym_kl_loss, reduction="batchmean")
        return smart_pytorch.SMARTLoss(model, *losses)
    return _ours(model, **ROWS[row]) if ROWS[row] else None


def settings(row: str) -> dict[str, Any]:
    """All that a row's regularizer was made with, defaults, too."""
    found: dict[str, Any] = {}
    smart = regularizer(row, nn.Identity())
    if smart is not None:
        names = ("num_steps", "step_size", "epsilon", "noise_var", "norm_fn", "update", "ascent", "scale")
        found = {name: getattr(smart, name) for name in names if hasattr(smart, name)}
        found["norm_fn"] = found["norm_fn"].__name__
        found |= {"loss_fn": "kl_loss", "loss_last_fn": "sym_kl_loss, batchmean"}
    return found | ({"beta": BETA, "mu": MU} if BREGMAN in row else {})


def _ours(model: nn.Module, **settings: Any) -> smart_fast.SMARTLoss:
    last = functools.partial(smart_fast.sym_kl_loss, reduction="batchmean")
    return smart_fast.SMARTLoss(model, smart_fast.kl_loss, last, **settings)


def attacked(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Accuracy on clean inputs, under Gaussian noise of the strong radius, and at each radius under FGSM and PGD in ten
    steps."""
    clean = model.embed(x).detach()  # type: ignore[operator]
    size = clean.square().mean(-1, keepdim=True).sqrt() if task.relative else torch.ones(())

    def right(change: Tensor | float) -> float:
        with torch.no_grad():
            return float((model(clean + change).argmax(-1) == y).float().mean())

    def ascended(change: Tensor, length: Tensor, radius: Tensor) -> Tensor:
        moved = (clean + change).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), y, reduction="sum"), moved)
        return (change + length * gradient.sign()).clamp(-radius, radius)

    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found = [right(0.0), right(noise * STRONG * size)]
    for radius in (WEAK * size, STRONG * size):
        start = torch.zeros_like(clean)
        pgd = start
        for _ in range(10):
            pgd = ascended(pgd, radius / 4, radius)
        found += [right(ascended(start, radius, radius)), right(pgd)]
    return tuple(found)


COLUMNS = {
    "clean": "clean",
    "gaussian": f"gaussian {STRONG}",
    "fgsm_weak": f"fgsm {WEAK}",
    "pgd_weak": f"pgd {WEAK}",
    "fgsm": f"fgsm {STRONG}",
    "pgd": f"pgd {STRONG}",
}


def summary(results: Sequence[Quality], task: str, row: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds of every figure of a row."""
    these = [each for each in results if (each.task, each.row) == (task, row)]
    found = {}
    for name in (*COLUMNS, "ascent_ratio", "step_time", "peak"):
        values = [value for each in these if (value := getattr(each, name)) is not None]
        if values:
            found[name] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def table(results: Sequence[Quality]) -> list[list[str]]:
    """Header and rows. Times and memory in units of the task's row without regularizer."""
    lines = [["task", "regularizer", *COLUMNS.values(), "ascent ratio", "x step time", "x peak memory"]]
    for task, row in dict.fromkeys((each.task, each.row) for each in results):
        found, plain = summary(results, task, row), summary(results, task, NONE)
        cells = [f"{100 * found[name][0]:.1f} ± {100 * found[name][1]:.1f}" for name in COLUMNS]
        mean = found.get("ascent_ratio", (None,))[0]
        ratio = "" if mean is None else f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"
        relative = [f"{found[name][0] / plain[name][0]:.2f}" for name in ("step_time", "peak")]
        lines.append([task, row, *cells, ratio, *relative])
    return lines


def show(results: Sequence[Quality], console: Console) -> None:
    title = f"accuracy in %, mean and standard deviation of {len(SEEDS)} seeds"
    shown = Table(title=title, box=box.SIMPLE_HEAD)
    if not console.is_terminal:
        console.width = max(console.width, 170)  # a log file has no edge to wrap at
    header, *rows = table(results)
    for name in header:
        shown.add_column(name, justify="left" if name in ("task", "regularizer") else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def save(results: Sequence[Quality], environment: dict[str, Any], path: pathlib.Path) -> None:
    named = ("name", "epochs", "relative", "weight")
    tasks = [{name: getattr(task, name) for name in named} for task in TASKS]
    content = {
        "environment": environment | {"threads": 1, "processes": os.cpu_count()},
        "training": {"optimizer": "Adam", "lr": RATE, "batch": BATCH},
        "attacks": {"radii": RADII, "pgd_steps": 10},
        "settings": {row: settings(row) for row in ROWS},
        "tasks": tasks,
        "quality": [dataclasses.asdict(each) for each in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: pathlib.Path) -> list[Quality]:
    return [Quality(**each) for each in json.loads(path.read_text())["quality"]]
