"""TRADES on handwritten digits: the loop of SMART as adversarial training for images, by `smart_fast.perturbation`.

    python examples/trades.py    # seconds on a CPU; needs scikit-learn

The ascent climbs the KL divergence from the clean output by sign steps inside of a box, within the range of a pixel;
that divergence is then added to the clean cross-entropy (Zhang et al., 2019). The attack that both models meet at the
end is the same tool on another loss.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smart_fast import kl_loss, perturbation, recipes

EPOCHS, BETA, RADIUS = 25, 2.0, 0.1
SETTINGS = {**recipes.TRADES, "num_steps": 3, "step_size": RADIUS / 2, "epsilon": RADIUS}  # the recipe's are CIFAR-10's


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images[order].float() / 16, labels[order]
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def train(images: Tensor, labels: Tensor, robust: bool) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(100):
            logits = model(images[rows])
            loss = cross_entropy(logits, labels[rows])
            if robust:
                clean = logits.detach()
                found = perturbation(lambda x, clean=clean: kl_loss(model(x), clean), images[rows], **SETTINGS)
                loss = loss + BETA * kl_loss(model(found.perturbed), logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    for name, robust in (("plain", False), ("TRADES", True)):
        model = train(images, labels, robust)
        attack = {**SETTINGS, "num_steps": 10, "step_size": RADIUS / 4}
        found = perturbation(lambda x, model=model: cross_entropy(model(x), test_labels), test_images, **attack)
        clean, attacked = (accuracy(model, each, test_labels) for each in (test_images, found.perturbed))
        print(f"{name}: accuracy {clean:.3f}, under attack {attacked:.3f}")


if __name__ == "__main__":
    main()
