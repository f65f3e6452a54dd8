"""One run: fine-tune, then test in every domain, clean and attacked."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import attacks
from .data import DOMAINS, Sentence
from .methods import METHODS, OBJECTIVES, Batch, Forward

BATCH, EPOCHS, RATE, WARM_UP = 16, 4, 2e-4, 0.1  # of AdamW, whose rate falls linearly after its warm-up
LENGTH = 48  # tokens that are kept of a sentence: nine of ten are shorter
BINS = 15  # of the expected calibration error
VALIDATED = "movie", "product"  # domains that settings are chosen on


@dataclass(frozen=True)
class Run:
    """What makes a run the run that it is.

    ``stage``: "tune", tested on validation parts of `VALIDATED`, or "test", on test parts of all domains. ``tested``:
    sentences of each domain, of which half are attacked as texts; ``attacked``: those that attacks on embeddings see,
    of the domain that was trained in.
    """

    stage: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    size: int
    tested: int
    attacked: int
    domain: str = "movie"
    task: str = "classes"
    start: str = "pretrained"
    epochs: int = EPOCHS
    rate: float = RATE

    @property
    def key(self) -> dict[str, Any]:
        return asdict(self) | {"settings": dict(self.settings)}


@dataclass
class Materials:
    """What runs share: ``model(start, outputs)`` makes a model, ``encode`` token ids of texts; see `data.split`."""

    model: Callable[[str, int], nn.Module]
    encode: Callable[[Sequence[str]], list[list[int]]]
    parts: Callable[[bool], dict[tuple[str, str], list[Sentence]]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def batches_of(lengths: Sequence[int], generator: torch.Generator, size: int = BATCH) -> list[list[int]]:
    """Batches in random order, of sentences of like lengths: eight batches are drawn together and sorted by length."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    found: list[list[int]] = []
    for first in range(0, len(order), 8 * size):
        drawn = sorted(order[first : first + 8 * size], key=lambda i: lengths[i])
        found += [drawn[i : i + size] for i in range(0, len(drawn), size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def batch_of(ids: Sequence[Sequence[int]], targets: Sequence[float], device: torch.device, whole: bool) -> Batch:
    """Padded to the longest. ``whole``: targets are classes."""
    rows = [torch.tensor(each) for each in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(each) for each in rows])[:, None]
    target = torch.tensor(targets, dtype=torch.long if whole else torch.float32)
    return Batch(padded.to(device), mask.to(device), target.to(device))


def targets_of(sentences: Sequence[Sentence], task: str) -> list[float]:
    return [each.rating if task == "rating" else float(each.label or 0) for each in sentences]


def sample(run: Run, materials: Materials) -> list[Sentence]:
    """What a run trains on: one draw for a seed, the same for every method."""
    pool = materials.parts(run.task == "rating")[run.domain, "train"]
    return random.Random(run.seed).sample(pool, run.size)


def trained(run: Run, materials: Materials, say: Callable[[str], None] = lambda doing: None) -> nn.Module:
    """All methods of a seed see the same sentences in the same batches, from the same weights."""
    objective, whole = OBJECTIVES[run.task], run.task == "classes"
    chosen = sample(run, materials)
    ids, targets = materials.encode([each.text for each in chosen]), targets_of(chosen, run.task)
    torch.manual_seed(run.seed)
    model = materials.model(run.start, objective.outputs).to(materials.device).train()
    training = METHODS[run.method].make(model, objective, **run.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, fused=True)
    steps = run.epochs * math.ceil(len(ids) / BATCH)
    warm = WARM_UP * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    order = torch.Generator().manual_seed(run.seed)
    for epoch in range(run.epochs):
        say(f"epoch {epoch + 1} of {run.epochs}")
        for rows in batches_of([len(each) for each in ids], order):
            batch = batch_of([ids[i] for i in rows], [targets[i] for i in rows], materials.device, whole)
            optimizer.zero_grad()  # before the loss: FreeLB leaves gradients while it makes it
            training.loss(batch).backward()
            optimizer.step()
            schedule.step()
            training.after_step()
    return model.eval()


def sorted_batches(ids: Sequence[Sequence[int]], size: int = 64) -> Iterator[list[int]]:
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    yield from (order[i : i + size] for i in range(0, len(order), size))


@torch.no_grad()
def predicted(model: nn.Module, ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Logits ``[n, V]`` on the CPU, in the order of ``ids``."""
    rows, logits = [], []
    for chosen in sorted_batches(ids):
        batch = batch_of([ids[i] for i in chosen], [0.0] * len(chosen), device, True)
        logits.append(model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits.float().cpu())
        rows += chosen
    return torch.cat(logits)[torch.tensor(rows).argsort()]


def attacked(
    model: nn.Module, ids: Sequence[Sequence[int]], targets: Sequence[float], task: str, device: torch.device
) -> dict[str, float]:
    """Under each attack on embeddings: the share that is still right of ``ids``, or the error of ratings.

    A class that is wrong stays wrong: it is not attacked, nor by a larger radius where a smaller one sufficed.
    """
    run, objective = Forward(model), OBJECTIVES[task]
    found = dict.fromkeys(attacks.RADII, 0.0)
    for rows in sorted_batches(ids, 32):
        batch = batch_of([ids[i] for i in rows], [targets[i] for i in rows], device, task == "classes")
        with torch.no_grad():
            embed = run.words(batch.ids)
        right = torch.arange(len(rows), device=device)
        if task == "classes":
            right = right[run(embed, batch.mask).argmax(-1) == batch.target]
        for radius in attacks.RADII:
            if len(right) == 0:
                break
            mask, target = batch.mask[right], batch.target[right]

            def loss_of(x: Tensor, mask: Tensor = mask, target: Tensor = target) -> Tensor:
                return objective.task(run(x, mask), target) * len(target)  # a sum: each sentence on its own

            moved = attacks.ascend(loss_of, embed[right], mask, radius)
            with torch.no_grad():
                logits = run(moved, mask)
            if task == "classes":
                right = right[logits.argmax(-1) == target]
                found[radius] += len(right)
            else:
                found[radius] += float((logits.squeeze(-1) - target).square().sum())
    means = {radius: value / len(ids) for radius, value in found.items()}
    return {f"pgd_{radius}": value if task == "classes" else math.sqrt(value) for radius, value in means.items()}


def calibration_error(logits: Tensor, target: Tensor) -> float:
    """Expected calibration error: accuracy against confidence in bins of confidence, weighted by their share."""
    confidence, guess = logits.softmax(-1).max(-1)
    right = (guess == target).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, right - confidence.double())
    return float(gaps.abs().sum() / len(target))


def score(logits: Tensor, target: Tensor, task: str) -> float:
    """Accuracy, or the root mean square error of ratings."""
    if task == "classes":
        return float((logits.argmax(-1) == target).double().mean())
    return float((logits.squeeze(-1) - target).square().mean().sqrt())


def drawn(rows: Sequence[Sentence], run: Run) -> list[Sentence]:
    """Another sample for each seed, so that intervals over seeds cover the choice of sentences, too."""
    return random.Random(run.seed).sample(rows, min(run.tested, len(rows)))


def tested(run: Run, model: nn.Module, materials: Materials, say: Callable[[str], None]) -> dict[str, Any]:
    part, domains = ("test", tuple(DOMAINS)) if run.stage == "test" else ("validation", VALIDATED)
    parts = materials.parts(run.task == "rating")
    scores: dict[str, Any] = {"clean": {}, "ece": {}, "half": {}, "typos": {}, "lost_words": {}}
    dtype = torch.long if run.task == "classes" else torch.float32
    samples = {domain: drawn(parts[domain, part], run) for domain in domains}
    for domain, rows in samples.items():
        say(f"testing on {domain}")
        texts, target = [each.text for each in rows], torch.tensor(targets_of(rows, run.task), dtype=dtype)
        logits = predicted(model, materials.encode(texts), materials.device)
        scores["clean"][domain] = score(logits, target, run.task)
        if run.task == "classes":
            scores["ece"][domain] = calibration_error(logits, target)
        if run.stage == "test":
            half = len(texts) // 2
            scores["half"][domain] = score(logits[:half], target[:half], run.task)  # what these attacks start from
            for name, attack in (("typos", attacks.typos), ("lost_words", attacks.lost_words)):
                logits = predicted(model, materials.encode([attack(each) for each in texts[:half]]), materials.device)
                scores[name][domain] = score(logits, target[:half], run.task)
    say("attacking embeddings")
    rows = samples[run.domain][: run.attacked]
    ids = materials.encode([each.text for each in rows])
    return scores | attacked(model, ids, targets_of(rows, run.task), run.task, materials.device)


def perform(run: Run, materials: Materials, say: Callable[[str], None] = lambda doing: None) -> dict[str, Any]:
    """The line that `results` keeps of a run; shares and seconds."""
    start = time.perf_counter()
    model = trained(run, materials, say)
    between = time.perf_counter()
    scores = tested(run, model, materials, say)
    end = time.perf_counter()
    return {"run": run.key, "scores": scores, "seconds": [round(between - start, 1), round(end - between, 1)]}
