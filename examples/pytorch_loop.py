"""SMART in a training loop of your own: PyTorch and smart-fast, nothing else.

    python examples/pytorch_loop.py    # seconds on a CPU

The task is made up: which of three kinds of words is the most frequent in a sequence?
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from smart_fast import SMARTLoss, kl_loss, sym_kl_loss

WORDS, LENGTH, WIDTH, KINDS = 60, 16, 32, 3
STEPS, WEIGHT = 200, 1.0


class Classifier(nn.Module):
    """From word embeddings on: what SMART perturbs has to be an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, KINDS)

    def forward(self, embed: Tensor, mask: Tensor) -> Tensor:
        hidden = self.layer(embed, src_key_padding_mask=~mask) * mask[..., None]
        logits: Tensor = self.head(hidden.sum(1) / mask.sum(1, keepdim=True))
        return logits


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences of 8 to 16 words, padded with zeros; which words are real; the kind."""
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (rows, 1))
    tokens = torch.randint(1, WORDS, (rows, LENGTH)) * mask
    counts = (nn.functional.one_hot(tokens % KINDS, KINDS) * mask[..., None]).sum(1)
    return tokens, mask, counts.argmax(1)


def main() -> None:
    torch.manual_seed(0)
    words, model = nn.Embedding(WORDS, WIDTH), Classifier()
    # The ascent climbs the KL divergence, the symmetric one is returned; both as a mean over the batch.
    divergences = [partial(each, reduction="batchmean") for each in (kl_loss, sym_kl_loss)]
    regularizer = SMARTLoss(model, *divergences, update="sift", step_size=0.1, noise_var=1e-2)
    optimizer = torch.optim.AdamW([*words.parameters(), *model.parameters()], lr=5e-3)
    for step in range(1, STEPS + 1):
        tokens, mask, labels = draw(32)
        embed = words(tokens)
        logits = model(embed, mask)
        task = nn.functional.cross_entropy(logits, labels)
        smoothness = regularizer(embed, logits, mask, mask=mask)  # for the model, and for SMART: no noise on padding
        (task + WEIGHT * smoothness).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {task:.4f}, regularizer {smoothness:.4f}")

    model.eval()
    tokens, mask, labels = draw(500)
    with torch.no_grad():
        right = model(words(tokens), mask).argmax(-1) == labels
    print(f"accuracy {right.float().mean():.3f}")


if __name__ == "__main__":
    main()
