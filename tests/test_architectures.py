"""SMART of every architecture that transformers lists: it trains what Trainer trains, without further settings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from smart_fast.integrations.transformers import SMARTTrainer
from tests.architectures import TASKS, build, inputs_of, models_of

transformers.logging.set_verbosity_error()

MOST_USED = {
    "sequence classification": ["BertForSequenceClassification", "DebertaV2ForSequenceClassification",
                                "BartForSequenceClassification", "ModernBertForSequenceClassification"],
    "token classification": ["DistilBertForTokenClassification", "T5ForTokenClassification"],
    "masked words": ["RobertaForMaskedLM"],
    "next words": ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM", "Qwen3ForCausalLM"],
    "sequence to sequence": ["T5ForConditionalGeneration"],
}  # fmt: skip
#: At the least, of the architectures of transformers 5.23 (some 440 train; of the others there is no tiny model here).
TRAINED = {
    "sequence classification": 115, "token classification": 90, "masked words": 45, "next words": 145,
    "sequence to sequence": 30,
}  # fmt: skip


@contextlib.contextmanager
def _trained(trainer: Trainer) -> Iterator[Any]:
    trainer.model.train()
    yield trainer
    trainer.model.zero_grad()


def smart_loss(name: str, task: str, args: TrainingArguments) -> tuple[float | None, str]:
    """The regularizer of one step; or None and why plain Trainer does not get as far as that."""
    try:
        model = build(*models_of(task)[name])
        inputs = inputs_of(task, model.config)
        with _trained(Trainer(model, args)) as plain:
            loss = plain.compute_loss(model, dict(inputs))
            loss.backward()
        assert loss.isfinite(), "not finite"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    with _trained(SMARTTrainer(model, args, callbacks=[seen := Seen()], smart_recipe="recommended")) as trainer:
        trainer.compute_loss(model, dict(inputs)).backward()
        trainer.log({"loss": 0.0})
    return seen.logs["smart_loss"], ""


class Seen(TrainerCallback):
    logs: dict[str, float]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs = dict(logs)


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in MOST_USED.items() for name in names])
def test_most_used(task: str, name: str, args: TrainingArguments) -> None:
    found, reason = smart_loss(name, task, args)
    assert not reason
    assert found > 0


@pytest.mark.exhaustive
@pytest.mark.sweep
@pytest.mark.parametrize("task", TASKS)
def test_all(task: str, args: TrainingArguments) -> None:
    """Whatever trains, is regularized. Prints a table."""
    good, bad, untried = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in models_of(task):
            try:
                found, reason = smart_loss(name, task, args)
            except Exception as error:
                bad.append((name, f"{type(error).__name__}: {error}"))
                continue
            if found is None:
                untried.append((name, reason))
            else:
                (good if found > 0 else bad).append((name, f"{found:.1e}"))
    print(f"\n| {task} | smart_loss |\n| --- | ---: |")
    for name, what in good:
        print(f"| {name} | {what} |")
    print(f"\n{len(good)} regularized, {len(bad)} not; no tiny model of {len(untried)}:")
    for name, reason in untried:
        print(f"  {name}: {reason}")
    assert not bad
    assert len(good) >= TRAINED[task]
