"""R-Drop on handwritten digits: SMART without noise is two passes with different dropout masks.

    python examples/r_drop.py    # seconds on a CPU; needs scikit-learn

`SMARTLoss` with `recipes.R_DROP` runs the model a second time on the very same input; what it returns is half the
symmetric KL divergence of the two outputs, and here the cross-entropy of the second pass, too (Liang et al., 2021).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smart_fast import SMARTLoss, recipes

EPOCHS, ALPHA, SAMPLES = 40, 4.0, 300


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images[order].float() / 16, labels[order]
    return images[:SAMPLES], labels[:SAMPLES], images[SAMPLES:], labels[SAMPLES:]


def train(images: Tensor, labels: Tensor, alpha: float) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(50):
            target = labels[rows]

            def second(logits: Tensor, first: Tensor, target: Tensor = target) -> Tensor:
                return (cross_entropy(logits, target) + alpha * recipes.half_sym_kl(logits, first)) / 2

            first = model(images[rows])
            loss = cross_entropy(first, target) / 2 + SMARTLoss(model, second, **recipes.R_DROP)(images[rows], first)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    for name, alpha in (("two passes", 0.0), ("R-Drop", ALPHA)):
        with torch.enable_grad():
            model = train(images, labels, alpha)
        apart = recipes.half_sym_kl(model(test_images), model(test_images))  # of two draws of dropout
        right = model.eval()(test_images).argmax(-1) == test_labels
        print(f"{name}: accuracy {right.float().mean():.3f}, dropout moves the output by {apart:.4f}")


if __name__ == "__main__":
    main()
