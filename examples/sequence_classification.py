"""SMART in transformers' Trainer: a class for each sequence.

    python examples/sequence_classification.py    # seconds on a CPU

Nothing is downloaded: a tiny BERT with random weights, and a made-up task (which of three kinds of words is the most
frequent?). `SMARTTrainer` is `transformers.Trainer` with a few more arguments. It logs the regularizer as
``smart_loss`` beside the whole ``loss``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, EvalPrediction, TrainingArguments, set_seed

from smart_fast.integrations.transformers import SMARTTrainer

WORDS, LENGTH, KINDS = 30, 16, 3


def draw(rows: int) -> list[dict[str, Tensor]]:
    """Sentences of 8 to 16 words, padded with zeros."""
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    ids = torch.randint(1, WORDS, (rows, LENGTH)) * mask
    counts = (nn.functional.one_hot(ids % KINDS, KINDS) * mask[..., None]).sum(1)
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": counts.argmax(1)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


def main() -> None:
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=KINDS,
    )
    trainer = SMARTTrainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            "out", per_device_train_batch_size=32, num_train_epochs=5, learning_rate=5e-3, logging_steps=50,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=draw(1600),
        eval_dataset=draw(500),
        compute_metrics=metrics,
        smart_weight=1.0,
    )  # fmt: skip
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
