"""`bench.quality`, and what its transformer shows of the ascents."""

from __future__ import annotations

import copy
import dataclasses
import statistics

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("sklearn")

from bench import quality, readme
from smart_fast import SMARTLoss, ascent_ratio, kl_loss, sym_kl_loss

PAPER = {"update": "paper", "scale": "relative", "noise_var": 0.005, "step_size": 0.05, "epsilon": 0.05}


@pytest.fixture(scope="module")
def trained():
    """The transformer of the task "tokens", fine-tuned without a regularizer, and embeddings that it has not seen."""
    task = quality.TASKS[-1]
    x, y, other, _ = task.data(0)
    torch.manual_seed(0)
    model = task.model(x, y)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(y)).split(50):
            loss = F.cross_entropy(model(model.embed(x[chosen])), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), model.embed(other[:200]).detach()


def ratio(model, embed, **settings):
    torch.manual_seed(0)
    smart = SMARTLoss(model, kl_loss, sym_kl_loss, **settings)
    return statistics.mean(ascent_ratio(smart, embed) for _ in range(8))


@pytest.mark.exhaustive
def test_ascent_ratios(trained, capsys):
    model, embed = trained
    found = {
        "default": ratio(model, embed),
        "paper": ratio(model, embed, **PAPER),
        "fisher": ratio(model, embed, ascent="fisher", **PAPER),
        "paper, bf16 model": ratio(copy.deepcopy(model).bfloat16(), embed.bfloat16(), **PAPER),
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        found["paper, bf16 autocast"] = ratio(model, embed, **PAPER)
    with capsys.disabled():
        print("\nascent ratios:", ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    assert found["default"] == pytest.approx(1.0, abs=0.2)
    assert found["paper"] >= 300
    assert found["fisher"] >= found["paper"]
    assert found["paper, bf16 model"] >= 0.9 * found["paper"]
    assert found["paper, bf16 autocast"] >= 0.9 * found["paper"]


@pytest.mark.parametrize("row", quality.ROWS)
def test_every_row_runs(row):
    task = quality.TASKS[1]
    task = quality.Task(task.name, task.data, task.model, 2)
    found = quality.run(task, row, 0, task.data(0))
    assert found.clean > 0.8
    assert found.clean >= found.fgsm_weak >= found.fgsm >= found.pgd - 0.02
    assert found.pgd_weak >= found.pgd
    assert (found.ascent_ratio is None) == (not quality.ROWS[row] and row != quality.SMART_PYTORCH)
    assert found.peak > 0


def test_same_seed_same_model():
    task = quality.TASKS[1]
    task = quality.Task(task.name, task.data, task.model, 2)
    first, second = (quality.run(task, "recommended", 3, task.data(3)) for _ in range(2))
    assert (first.clean, first.fgsm, first.pgd) == (second.clean, second.fgsm, second.pgd)


@pytest.mark.exhaustive
def test_processes_find_what_one_process_finds():
    """In the order of tasks and seeds, whichever ends first."""
    tasks = [dataclasses.replace(task, epochs=1) for task in quality.TASKS[:2]]
    found = quality.measure(tasks=tasks, seeds=(1, 0))
    assert [(e.task, e.seed, e.row) for e in found] == [
        (task.name, seed, row) for task in tasks for seed in (1, 0) for row in quality.ROWS
    ]
    here = quality.run(tasks[1], "recommended", 0, tasks[1].data(0))
    there = found[-len(quality.ROWS) + list(quality.ROWS).index("recommended")]
    assert there.clean == pytest.approx(here.clean, abs=0.01)  # threads add up in another order
    assert there.pgd == pytest.approx(here.pgd, abs=0.02)


def test_committed_results_show_what_the_readme_says():
    results = quality.load(readme.RESULTS / "quality.json")
    assert {each.row for each in results} == set(quality.ROWS)
    for task in quality.TASKS:
        best, theirs, noise = (
            quality.summary(results, task.name, row) for row in ("recommended", quality.SMART_PYTORCH, "random noise")
        )
        assert best["clean"][0] >= theirs["clean"][0] - 0.005
        for attack in ("fgsm", "pgd", "fgsm_weak", "pgd_weak"):
            for rival in (theirs, noise):
                assert best[attack][0] > rival[attack][0]
                if (task.name, rival) != ("breast_cancer", theirs) or "weak" not in attack:  # within the spread
                    assert best[attack][0] - best[attack][1] > rival[attack][0] + rival[attack][1]


def test_table_and_plot(tmp_path):
    results = quality.load(readme.RESULTS / "quality.json")
    header, *rows = quality.table(results)
    assert len(rows) == len(quality.TASKS) * len(quality.ROWS)
    assert all(len(row) == len(header) for row in rows)
    pytest.importorskip("matplotlib")
    from bench import figures

    figures.save_robustness(results, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000
