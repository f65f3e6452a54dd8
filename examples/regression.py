"""SMART in transformers' Trainer: a number for each sequence.

    python examples/regression.py    # seconds on a CPU

Nothing is downloaded: a tiny RoBERTa with random weights, and a made-up task (the mean value of the words). A model of
one label is compared by the squared error of its numbers, as it is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import EvalPrediction, RobertaConfig, RobertaForSequenceClassification, TrainingArguments, set_seed

from smart_fast.integrations.transformers import SMARTTrainer

WORDS, LENGTH, PAD = 60, 16, 1


def draw(rows: int) -> list[dict[str, Tensor]]:
    """Sentences of 8 to 16 words, padded; the values of words lie between -1 and 1."""
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    ids = torch.randint(PAD + 1, WORDS, (rows, LENGTH)).masked_fill(~mask, PAD)
    values = (2 * ids / WORDS - 1) * mask
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": values.sum(1) / mask.sum(1)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    error = prediction.predictions.squeeze(-1) - prediction.label_ids
    return {"explained": 1 - (error**2).mean().item() / prediction.label_ids.var().item()}


def main() -> None:
    set_seed(0)
    config = RobertaConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_labels=1, pad_token_id=PAD,
    )  # fmt: skip
    trainer = SMARTTrainer(
        RobertaForSequenceClassification(config),
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
    print(f"explained variance {trainer.evaluate()['eval_explained']:.3f}")


if __name__ == "__main__":
    main()
