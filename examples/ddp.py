"""SMART with DistributedDataParallel, on any number of processes and machines.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py    # one machine: 2 GPUs, or 2 processes on its CPU

Several machines: the same command on each of them, with the number of machines and the address of one of them

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 examples/ddp.py

The regularizer is part of the wrapped module's forward pass. Calling it outside, ``SMARTLoss(ddp, ...)``, works too:
its ascent then bypasses the wrapper, which sees nothing but ordinary forward and backward passes. Every process draws
its own noise, for its own rows. The task is made up: which of three kinds of words is the most frequent in a sequence?
"""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smart_fast import SMARTLoss, sym_kl_loss

WORDS, LENGTH, WIDTH, KINDS = 60, 16, 32, 3
BATCH, STEPS, WEIGHT = 32, 80, 1.0


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, KINDS)
        # Means over the batch, so that nothing depends on how many rows a process has.
        divergence = partial(sym_kl_loss, reduction="batchmean")
        self.smart = SMARTLoss(self.logits, divergence, update="sift", noise_var=1e-2, step_size=0.1)

    def logits(self, embed: Tensor) -> Tensor:
        for layer in self.layers:
            embed = layer(embed)
        logits: Tensor = self.head(embed.mean(1))
        return logits

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """The logits; with labels, the loss and the regularizer in it."""
        embed = self.words(tokens)
        logits = self.logits(embed)
        if labels is None:
            return (logits,)
        smoothness = self.smart(embed, logits)
        return nn.functional.cross_entropy(logits, labels) + WEIGHT * smoothness, smoothness.detach()


def draw(rows: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    counts = nn.functional.one_hot(tokens % KINDS, KINDS).sum(1)
    return tokens.to(device), counts.argmax(1).to(device)


def start() -> torch.device:
    """Join the other processes; the device of this one."""
    local = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    torch.manual_seed(0)  # the same weights everywhere
    return device


def train(model: nn.Module, device: torch.device) -> None:
    """Train, evaluate and report. Every process draws its own batches, and from here on its own noise."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1 + rank)
    data = torch.Generator().manual_seed(1 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, STEPS + 1):
        loss, smoothness = model(*draw(BATCH, data, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            values = torch.stack([loss.detach(), smoothness])
            dist.all_reduce(values)
            if rank == 0:
                print(f"step {step}: loss {values[0] / world:.4f}, regularizer {values[1] / world:.4f}")

    model.eval()
    tokens, labels = draw(512, torch.Generator().manual_seed(0), device)
    with torch.no_grad():  # all processes, since the parameters may be spread over them
        right = (model(tokens)[0].argmax(-1) == labels).float().mean()
    if rank == 0:
        print(f"accuracy {right:.3f} on {world} x {device.type}")


def main() -> None:
    device = start()
    model = DistributedDataParallel(Classifier().to(device), device_ids=[device] if device.type == "cuda" else None)
    train(model, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
