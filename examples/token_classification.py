"""SMART in transformers' Trainer: a tag for each word.

    python examples/token_classification.py    # seconds on a CPU

Nothing is downloaded: a tiny Qwen2 with random weights, and a made-up task (the kind of a word, which a "not" before it
changes). Only words with a label count in the loss and in the regularizer: neither padding nor "not", whose label is
-100. The settings of SMART are options of the command line, ``--smart_weight 0`` among them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, HfArgumentParser, Qwen2Config, TrainingArguments, set_seed
from transformers import Qwen2ForTokenClassification as Model

from smart_fast.integrations.transformers import SMARTArguments, SMARTTrainer

WORDS, LENGTH, KINDS = 60, 16, 3
PAD, NOT = 0, 1


def draw(rows: int) -> list[dict[str, Tensor]]:
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    ids = torch.randint(2, WORDS, (rows, LENGTH))
    ids[torch.rand(rows, LENGTH) < 0.2] = NOT
    ids[~mask] = PAD
    negated = nn.functional.pad(ids == NOT, (1, 0))[:, :-1]
    labels = ((ids + negated.long()) % KINDS).masked_fill((ids == NOT) | ~mask, -100)
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    known = prediction.label_ids != -100
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids)[known].mean().item()}


def main() -> None:
    (smart,) = HfArgumentParser(SMARTArguments).parse_args_into_dataclasses()
    set_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, num_labels=KINDS, pad_token_id=PAD,
    )  # fmt: skip
    trainer = SMARTTrainer(
        Model(config),
        TrainingArguments(
            "out", per_device_train_batch_size=32, num_train_epochs=5, learning_rate=5e-3, logging_steps=50,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=draw(1600),
        eval_dataset=draw(500),
        compute_metrics=metrics,
        smart=smart,
    )  # fmt: skip
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
