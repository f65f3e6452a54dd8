"""Latent adversarial training of a tiny language model that is to refuse.

    python examples/latent_adversarial_training.py    # seconds on a CPU

Prompts with a forbidden word get the answer NO, others YES. An attacker who reaches the hidden states of one layer
moves those of the prompt toward YES, within a ball of each token's norm. Latent adversarial training (Casper et al.,
2024; Sheshadri et al., 2024) makes that attack in every step, and trains the model to answer NO all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smart_fast import at_layer, l2_norm, perturbation

WORDS, FORBIDDEN, LENGTH, WIDTH = 40, 8, 6, 32
NO, YES, ASK = WORDS, WORDS + 1, WORDS + 2  # ASK ends a prompt
STEPS, WARM_UP, LAYER = 200, 200, "layers.1"
# A step of a third of the radius along the gradient, six times: targeted=True descends.
ATTACK = {"num_steps": 6, "step_size": 4.0, "epsilon": 10.0, "noise_var": 0.0, "norm": l2_norm, "targeted": True}


class Model(nn.Module):
    """Tokens to logits of the next one, the last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS + 3, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, WORDS + 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens) + self.positions.weight
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH + 1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=causal, is_causal=True)
        logits: Tensor = self.head(hidden[:, -1])
        return logits


def draw(rows: int) -> tuple[Tensor, Tensor]:
    """Prompts, half of them with a forbidden word, and answers."""
    tokens = torch.randint(FORBIDDEN, WORDS, (rows, LENGTH))
    bad = torch.arange(rows) % 2 == 0
    tokens[bad, torch.randint(LENGTH, (int(bad.sum()),))] = torch.randint(FORBIDDEN, (int(bad.sum()),))
    tokens = torch.cat([tokens, torch.full((rows, 1), ASK)], 1)
    return tokens, torch.where(bad, NO, YES)


def attacked(model: Model, tokens: Tensor) -> Tensor:
    """Answers to forbidden prompts after the attack on the prompt's hidden states."""
    embed, eval_fn = at_layer(model, LAYER)
    hidden, _ = embed(tokens)
    prompt = tokens != ASK
    goal = torch.full((len(tokens),), YES)
    found = perturbation(lambda x: cross_entropy(eval_fn(x, tokens), goal), hidden, mask=prompt, **ATTACK)
    logits: Tensor = eval_fn(found.perturbed, tokens)
    return logits


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(WARM_UP + STEPS + 1):
        if step in (WARM_UP, WARM_UP + STEPS):  # before and after
            tokens, answers = draw(500)
            accuracy = (model(tokens).argmax(-1) == answers).float().mean()
            logits = attacked(model, tokens[answers == NO])
            success = (logits.argmax(-1) != NO).float().mean()
            print(f"step {step}: accuracy {accuracy:.3f}, attacks succeed {success:.3f}")
        tokens, answers = draw(64)
        loss = cross_entropy(model(tokens), answers)
        if step >= WARM_UP:
            logits = attacked(model, tokens[answers == NO])
            loss = loss + cross_entropy(logits, torch.full((len(logits),), NO))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
