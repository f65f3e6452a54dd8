"""What SMART is for: a Trainer run with it resists attacks on the embeddings that a plain one does not.

python -m tests.test_robustness 0 1 2    # print the figures of these seeds
"""

from __future__ import annotations

import copy
import sys
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

import transformers
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from smart_fast.integrations.transformers import SMARTTrainer

transformers.logging.set_verbosity_error()

WORDS, LENGTH, KINDS = 60, 16, 3
RADIUS, RELATIVE_RADIUS = 0.02, 0.4  # of attacks: absolute, and in standard deviations of the model's own embeddings


def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Which of three kinds of words is the most frequent, by three words or more?"""
    ids = torch.randint(1, WORDS, (20 * rows, LENGTH), generator=generator)
    length = torch.randint(LENGTH // 2, LENGTH + 1, (20 * rows, 1), generator=generator)
    mask = torch.arange(LENGTH) < length
    ids = ids.masked_fill(~mask, 0)
    counts = (F.one_hot(ids % KINDS, KINDS) * mask[..., None]).sum(1)
    first, second = counts.topk(2).values.unbind(1)
    clear = (first - second >= 3).nonzero().squeeze(1)[:rows]
    assert len(clear) == rows
    return {"input_ids": ids[clear], "attention_mask": mask[clear].long(), "labels": counts.argmax(1)[clear]}


def accuracy(model: torch.nn.Module, data: dict[str, Tensor], radius: float = 0.0, steps: int = 1) -> float:
    """Under an attack within ``radius`` in the largest entry: FGSM (one step), or PGD."""
    model.eval()
    clean = model.get_input_embeddings()(data["input_ids"]).detach()
    change, size = torch.zeros_like(clean), radius if steps == 1 else 2.5 * radius / steps

    def logits_of(embed: Tensor) -> Tensor:
        return model(inputs_embeds=embed, attention_mask=data["attention_mask"]).logits

    for _ in range(steps if radius else 0):
        embed = (clean + change).requires_grad_()
        loss = F.cross_entropy(logits_of(embed), data["labels"], reduction="sum")
        change = (change + size * torch.autograd.grad(loss, embed)[0].sign()).clamp(-radius, radius)
    with torch.no_grad():
        return (logits_of(clean + change).argmax(-1) == data["labels"]).float().mean().item()


class Figures(NamedTuple):
    """Accuracies after fine-tuning, and the regularizer as it was logged."""

    clean: float
    fgsm: float
    pgd: float
    fgsm_relative: float
    pgd_relative: float
    smart_loss: list[float]


def fine_tune(
    model: torch.nn.Module, train: dict[str, Tensor], test: dict[str, Tensor], seed: int, directory: str, **smart: Any
) -> Figures:
    args = TrainingArguments(
        directory,
        per_device_train_batch_size=32,
        num_train_epochs=6,
        learning_rate=3e-3,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    rows = [dict(zip(train, row, strict=True)) for row in zip(*train.values(), strict=True)]
    trainer = SMARTTrainer(model, args, train_dataset=rows, **smart)
    trainer.train()
    relative = RELATIVE_RADIUS * model.get_input_embeddings().weight.std().item()
    attacked = [accuracy(model, test, radius, steps) for radius in (RADIUS, relative) for steps in (1, 10)]
    logged = [entry["smart_loss"] for entry in trainer.state.log_history if "smart_loss" in entry]
    return Figures(accuracy(model, test), *attacked, logged)


def measure(seed: int) -> tuple[Figures, Figures]:
    """Fine-tune one pretrained model without and with SMART."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = draw(800, generator), draw(1000, generator)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=KINDS, **sizes, **none)
    model = BertForSequenceClassification(config)
    with TemporaryDirectory() as directory:
        fine_tune(model, train, test, seed, directory, smart_weight=0.0)  # what stands for pretraining
        plain = fine_tune(copy.deepcopy(model), train, test, seed, directory, smart_weight=0.0)
        smart = fine_tune(model, train, test, seed, directory, smart_weight=1.0, smart_step_size=RADIUS)
    for name, figures in (("plain", plain), ("SMART", smart)):
        print(
            f"seed {seed} {name}:",
            *(f"{key} {value:.3f}" for key, value in zip(figures._fields[:5], figures, strict=False)),
        )
    print(f"seed {seed} smart_loss:", *(f"{value:.4f}" for value in smart.smart_loss))
    return plain, smart


@pytest.mark.exhaustive
def test_smart_resists_attacks() -> None:
    plain, smart = measure(seed=0)
    assert smart.clean >= plain.clean - 0.01
    assert smart.fgsm >= plain.fgsm + 0.2
    assert smart.pgd >= plain.pgd + 0.3
    # Not only because embeddings have grown.
    assert smart.fgsm_relative >= plain.fgsm_relative + 0.08
    assert all(0 < each < float("inf") for each in smart.smart_loss)
    assert smart.smart_loss[-1] <= smart.smart_loss[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        measure(int(argument))
