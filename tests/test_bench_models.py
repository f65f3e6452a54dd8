"""The bench's models, a layer of each: their regularizer and training step agree with float64, and are checked so."""

from __future__ import annotations

import functools

import pytest
import torch

for package in ("smart_pytorch", "transformers", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from bench import cases, models  # noqa: E402
from bench.regularizer import Regularizer  # noqa: E402
from bench.run import run_case  # noqa: E402
from bench.task import Contestant  # noqa: E402
from bench.training import TrainingStep  # noqa: E402

CPU = torch.device("cpu")
MODELS = {
    "bert": functools.partial(models.bert, 1, 64, 50),
    "roberta": functools.partial(models.roberta, 1, 64, 50),
    "deberta": functools.partial(models.deberta, 1, 64, 50),
    "qwen2": functools.partial(models.qwen2, 1, 64, 500),
    "masked LM": functools.partial(models.bert_masked_lm, 1, 64, 300),
}


def contestants(task):
    yield None, task.smart_pytorch()
    yield "torch", task.ours("torch")
    yield "native", task.ours("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_regularizer(name, dtype, native):
    task = Regularizer(MODELS[name], (2, 8, 64), 0.02, dtype, CPU)
    inputs = task.inputs(1)
    assert inputs[1].dtype == dtype
    for backend, function in contestants(task):
        assert not [found for found in task.check(task.call(function), inputs, backend) if found.wrong]
    assert task.model_only()(*inputs).shape == inputs[0].shape


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "qwen2"])
def test_training_step(name, native):
    task = TrainingStep(MODELS[name], (2, 8), CPU)
    inputs = task.inputs(1)
    for backend, function in contestants(task):
        assert not [found for found in task.check(task.call(function), inputs, backend) if found.wrong]
    before = [each.clone() for each in task.parameters]
    task.model_only()(*inputs)
    assert all(map(torch.equal, before, task.parameters))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_language_model_without_logits(backend, native):
    """The regularizer of hidden states and the head's weight is that of logits: the same check."""
    task = TrainingStep(MODELS["qwen2"], (2, 8), CPU)
    ways = task.variants(backend)
    assert set(ways) == {"compiled", "hidden states"}
    assert set(TrainingStep(MODELS["bert"], (2, 8), CPU).variants(backend)) == {"compiled"}
    findings = task.check(task.call(ways["hidden states"]), task.inputs(1), backend)
    assert not [found for found in findings if found.wrong]


def test_a_step_without_its_regularizer_gets_no_time():
    """The smallest thing that a benchmark of SMART could leave out."""
    case = cases.training("bert 1x64", (2, 8), "cpu", MODELS["bert"])

    def entrants(task, device, backends):
        loss = torch.nn.functional.cross_entropy
        yield Contestant(
            "without", "ours", task.call(lambda ids, y: loss(task.model(task.model.words(ids)), y)), "torch"
        )

    (row,) = run_case(case, CPU, [], seconds=0.01, entrants=entrants)
    assert "off by" in row.wrong
    assert row.timing is row.speed is row.peak is None


def test_what_is_measured_on_a_gpu():
    """Encoders at 8 to 64 sequences of 128 to 512 tokens, and a language model with its vocabulary."""
    names = [case.name for case in cases.select(torch.device("cuda"), groups=["regulariser", "train"])]
    for model in ("bert-base", "roberta-large", "deberta-v3-base", "qwen2.5-0.5b"):
        assert any(name.startswith(f"{model}") for name in names)
        assert any(name.startswith(f"step of {model}") for name in names)
    assert any("[64, 128]" in name for name in names)
    assert any("[8, 512]" in name for name in names)
    assert any("V=151936" in name for name in names)
