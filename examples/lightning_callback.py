"""SMART in Lightning: one callback more.

    python examples/lightning_callback.py    # seconds on a CPU

Nothing is downloaded: a tiny BERT with random weights, and a made-up task (which of three kinds of words is the most
frequent?). The LightningModule knows nothing of SMART: `SMARTCallback` adds the regularizer to the loss of its
``training_step``, and logs it as ``smart_loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from smart_fast.integrations.lightning import SMARTCallback

WORDS, LENGTH, KINDS = 30, 16, 3


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            num_labels=KINDS,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Report(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % 50 == 0:
            loss, smoothness = (trainer.callback_metrics[name] for name in ("loss", "smart_loss"))
            print(f"step {trainer.global_step}: loss {loss:.4f}, regularizer {smoothness:.4f}")


def draw(rows: int) -> list[dict[str, Tensor]]:
    """Sentences of 8 to 16 words, padded with zeros."""
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    ids = torch.randint(1, WORDS, (rows, LENGTH)) * mask
    counts = (nn.functional.one_hot(ids % KINDS, KINDS) * mask[..., None]).sum(1)
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": counts.argmax(1)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def main() -> None:
    seed_everything(0)
    trainer = Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SMARTCallback(smart_weight=1.0), Report()],
    )  # fmt: skip
    trainer.fit(
        Classifier(), DataLoader(draw(1600), batch_size=32, shuffle=True), DataLoader(draw(500), batch_size=100)
    )
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
