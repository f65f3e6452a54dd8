"""SMART in a loop of Accelerate: what `SMARTLoss` takes is what ``prepare`` returns.

    python examples/accelerate_loop.py              # seconds on a CPU
    accelerate launch examples/accelerate_loop.py   # on what ``accelerate config`` has set up

Nothing is downloaded: a tiny BERT with random weights, and a made-up task (which of three kinds of words is the most
frequent?).
"""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from smart_fast import SMARTLoss, kl_loss, sym_kl_loss

WORDS, LENGTH, KINDS = 30, 16, 3
EPOCHS, WEIGHT = 5, 1.0


def draw(rows: int) -> list[dict[str, Tensor]]:
    """Sentences of 8 to 16 words, padded with zeros."""
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    ids = torch.randint(1, WORDS, (rows, LENGTH)) * mask
    counts = (nn.functional.one_hot(ids % KINDS, KINDS) * mask[..., None]).sum(1)
    columns = {"input_ids": ids, "attention_mask": mask.long(), "labels": counts.argmax(1)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def main() -> None:
    accelerator = Accelerator()
    set_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=KINDS,
    )
    model = BertForSequenceClassification(config)
    words = model.get_input_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer, train, test = accelerator.prepare(
        model, optimizer, DataLoader(draw(1600), batch_size=32, shuffle=True), DataLoader(draw(500), batch_size=100)
    )
    set_seed(accelerator.process_index)  # each process draws its own noise

    def logits_of(embed: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=embed, attention_mask=attention_mask).logits
        return logits

    divergences = [partial(each, reduction="batchmean") for each in (kl_loss, sym_kl_loss)]
    regularizer = SMARTLoss(logits_of, *divergences, update="sift", step_size=1e-2, noise_var=1e-3)
    step = 0
    for _ in range(EPOCHS):
        model.train()
        for batch in train:
            ids, mask, labels = batch.values()
            embed = words(ids)
            logits = logits_of(embed, mask)
            task = nn.functional.cross_entropy(logits, labels)
            smoothness = regularizer(embed, logits, mask, mask=mask.bool())
            accelerator.backward(task + WEIGHT * smoothness)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                accelerator.print(f"step {step}: loss {task:.4f}, regularizer {smoothness:.4f}")

    model.eval()
    right = []
    for batch in test:
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(found == batch["labels"]))
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.3f}")


if __name__ == "__main__":
    main()
