"""On-policy distillation of a language model into a narrower one, without whole logits of either.

    python examples/distillation.py    # seconds on a CPU

As in "On-Policy Distillation of Language Models" (Agarwal et al., ICLR 2024): every other batch is written by the
student itself, and on each token the student meets the teacher by the generalized Jensen-Shannon divergence. The two
share a vocabulary, not a width: `linear_jsd_loss` takes the hidden states and the head of each. The teacher is frozen
and costs neither products nor memory for gradients. (A trained teacher of one's own would come from a file; this one
learns a made-up language first.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smart_fast import linear_jsd_loss

WORDS, LENGTH, ROWS = 100, 12, 32
TEACHER, STUDENT = 64, 24  # widths
STEPS = 150


class LanguageModel(nn.Module):
    """Hidden states of every word, and a head that makes logits of the next one from them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(WORDS, width), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.body(tokens)
        return hidden

    @torch.no_grad()
    def write(self, tokens: Tensor) -> Tensor:
        """Go on from the first words ``[rows, 1]``."""
        while tokens.shape[1] < LENGTH:
            logits = self.head(self(tokens)[:, -1])
            tokens = torch.cat((tokens, torch.distributions.Categorical(logits=logits).sample()[:, None]), 1)
        return tokens


def draw(rows: int) -> Tensor:
    """Sentences: after word w comes 3 w + 1, or, one time in five, its neighbor."""
    tokens = [torch.randint(0, WORDS, (rows,))]
    while len(tokens) < LENGTH:
        tokens.append((3 * tokens[-1] + 1 + (torch.rand(rows) < 0.2).long()) % WORDS)
    return torch.stack(tokens, 1)


def taught() -> LanguageModel:
    teacher = LanguageModel(TEACHER)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(STEPS):
        tokens = draw(ROWS)
        logits = teacher.head(teacher(tokens[:, :-1]))
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher.eval().requires_grad_(False)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for tensors as small as these
    teacher, student = taught(), LanguageModel(STUDENT)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)
    for step in range(1, STEPS + 1):
        tokens = draw(ROWS)
        if step % 2 == 0:
            tokens = student.write(tokens[:, :1])
        divergence = linear_jsd_loss(
            student(tokens), teacher(tokens), student.head.weight, student.head.bias, "mean", beta=0.5,
            target_weight=teacher.head.weight, target_bias=teacher.head.bias,
        )  # fmt: skip
        (WORDS * divergence).backward()  # "mean" is over tokens and words
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: divergence {WORDS * divergence:.4f}")

    student.eval()
    tokens = draw(500)
    with torch.no_grad():
        same = student.head(student(tokens)).argmax(-1) == teacher.head(teacher(tokens)).argmax(-1)
    print(f"agreement with the teacher {same.float().mean():.3f}")


if __name__ == "__main__":
    main()
