"""Perturb and ascend as tasks: inputs, smart-pytorch's own lines, our entry points, and the float64 check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import smart_fast
from smart_fast import autograd
from smart_fast.ascent import fisher
from smart_fast.backends import select
from smart_fast.backends.base import Step

from .task import TOLERANCE, Finding, deviation, finding

STEP_SIZE, EPSILON = 1e-3, 1e-6
CHECKED_NUMBERS = 8192  # how many a check of noise takes at the least
RADIUS = 5e-4  # of the paper's ball: about half of a step is cut off


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


class Perturb:
    """embed + noise_var * normal, embed ``[..., D]``; masked, only where a bool mask ``[...]`` says so; relative, times
    a unit ``[..., 1]``."""

    noise_var = 0.1

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, variant: str, device: torch.device) -> None:
        self.shape, self.dtype, self.variant, self.device = shape, dtype, variant, device

    def inputs(self, seed: int) -> tuple[Any, ...]:
        generator = _generator(self.device, seed)
        embed = torch.randn(self.shape, device=self.device, generator=generator).to(self.dtype)
        rows = torch.rand(self.shape[:-1], device=self.device, generator=generator)
        mask = rows < 0.75 if self.variant == "masked" else None
        return embed, mask, rows.unsqueeze(-1) + 0.5 if self.variant == "relative" else None

    def smart_pytorch(self) -> Callable[..., Any]:
        noise_var = self.noise_var

        def perturb(embed: Tensor, mask: Tensor | None, unit: Tensor | None) -> Tensor:
            noise = torch.randn_like(embed) * (noise_var if unit is None else (noise_var * unit).to(embed.dtype))
            return embed + (noise if mask is None else torch.where(mask.unsqueeze(-1), noise, 0.0))

        return perturb

    def ours(self, backend: str) -> Callable[..., Any]:
        def perturb(embed: Tensor, mask: Tensor | None, unit: Tensor | None) -> Tensor:
            module = select(backend, embed)
            # As in a call with steps to come: on a CPU the native backend stores its noise here.
            return autograd.perturb(module, embed, self.noise_var, None, mask, True, unit)[0]

        return perturb

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        """Noise differs between contestants: compare its moments, its fresh draws, and what a mask leaves alone."""
        embed, mask, unit = inputs
        calls = math.ceil(CHECKED_NUMBERS / embed.numel())  # a few numbers have no moments
        first, second = (
            torch.cat([self._noise(run(*inputs), embed, mask, unit).flatten() for _ in range(calls)]) for _ in range(2)
        )
        count = first.numel()
        sigma = 6 / math.sqrt(count)  # six standard errors: no honest generator fails
        rounding = TOLERANCE[self.dtype]
        within = (first.abs() < 1).double().mean()
        found = [
            finding("mean of the noise", first.mean().abs(), sigma + rounding),
            finding("standard deviation of the noise", (first.std() - 1).abs(), sigma + rounding),
            finding("share of the noise within one sigma", (within - math.erf(0.5**0.5)).abs(), sigma + rounding),
            finding("correlation of two calls", (first * second).mean().abs(), sigma + rounding),
        ]
        if mask is not None:
            found.append(finding("change of masked rows", (run(*inputs) - embed)[~mask].abs().max(), 0.0))
        return found

    def _noise(self, perturbed: Tensor, embed: Tensor, mask: Tensor | None, unit: Tensor | None) -> Tensor:
        noise = (perturbed.double() - embed.double()) / (self.noise_var if unit is None else self.noise_var * unit)
        return noise if mask is None else noise[mask]


class Ascend:
    """The inf-norm step of smart-pytorch, or of the paper, from given noise and gradient, all ``[..., D]``.

    Every contestant moves the same noise: the plain ones read it, a fused one reads what its perturb keeps (fp32) or
    regenerates it from its seed.
    """

    noise_var = 1e-5

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, update: str, device: torch.device) -> None:
        self.shape, self.dtype, self.update, self.device = shape, dtype, update, device

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = _generator(self.device, seed)
        normal = torch.randn((2, *self.shape), device=self.device, generator=generator)
        # A gradient whose step is as long as the noise, so that neither can be wrong unnoticed.
        embed, grad = normal[0].to(self.dtype), (normal[1] * self.noise_var / STEP_SIZE).to(self.dtype)
        seed_tensor = torch.randint(2**63 - 1, (1,), device=self.device, generator=generator)
        kept = seeded_noise(embed, seed_tensor, self.noise_var)
        return embed, grad, kept.to(self.dtype), kept, seed_tensor

    def smart_pytorch(self) -> Callable[..., Any]:
        from smart_pytorch.smart_pytorch import inf_norm  # not at the top: our own side runs where it is not installed

        def ascend(embed: Tensor, grad: Tensor, noise: Tensor, kept: Tensor, seed: Tensor) -> Tensor:
            step = noise + STEP_SIZE * grad
            return embed + step / (inf_norm(step) + EPSILON)

        def ascend_in_ball(embed: Tensor, grad: Tensor, noise: Tensor, kept: Tensor, seed: Tensor) -> Tensor:
            return embed + (noise + STEP_SIZE * grad / inf_norm(grad)).clamp(-RADIUS, RADIUS)

        if self.update == "paper":
            return ascend_in_ball
        return ascend

    def ours(self, backend: str) -> Callable[..., Any]:
        epsilon = RADIUS if self.update == "paper" else EPSILON
        step = Step(smart_fast.inf_norm, self.noise_var, STEP_SIZE, epsilon, self.update)
        stored = _keeps_noise(backend, self.device)

        def ascend(embed: Tensor, grad: Tensor, noise: Tensor, kept: Tensor, seed: Tensor) -> Tensor:
            module = select(backend, embed)
            given = noise if module.name == "torch" else kept if stored else seed
            return autograd.ascend(module, embed, grad, given, step, None, False, None)[0]

        return ascend

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        embed, grad, noise = (t.double() for t in inputs[:3])
        step = noise + STEP_SIZE * grad
        expected = embed + step / (step.abs().amax(-1, keepdim=True) + EPSILON)
        if self.update == "paper":
            step = noise + STEP_SIZE * grad / grad.abs().amax(-1, keepdim=True)
            expected = embed + step.clamp(-RADIUS, RADIUS)
        return [finding("perturbed embedding", deviation([run(*inputs)], [expected]), TOLERANCE[self.dtype])]


class Direction:
    """softmax - onehot(argmax) of logits ``[..., V]``: what ``ascent="fisher"`` goes backward from."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = _generator(self.device, seed)
        return (torch.randn(self.shape, device=self.device, generator=generator).to(self.dtype),)

    def smart_pytorch(self) -> Callable[..., Any]:
        """smart-pytorch has none: the formula as it stands."""

        def direction(logits: Tensor) -> Tensor:
            largest = logits.argmax(-1, keepdim=True)
            minus_one = torch.full_like(largest, -1.0, dtype=torch.float32)
            return logits.softmax(-1, dtype=torch.float32).scatter_add(-1, largest, minus_one).to(logits.dtype)

        return direction

    def ours(self, backend: str) -> Callable[..., Any]:
        return lambda logits: fisher.direction(logits, backend, wide=False)

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        logits = inputs[0].double()
        expected = logits.softmax(-1)
        expected.scatter_add_(-1, logits.argmax(-1, keepdim=True), torch.full_like(expected[..., :1], -1.0))
        return [finding("direction", deviation([run(*inputs)], [expected]), TOLERANCE[self.dtype])]


def seeded_noise(embed: Tensor, seed: Tensor, noise_var: float) -> Tensor:
    """The noise that the fused backends make of ``seed`` (the same on each), fp32 like ``embed``."""
    zeros = torch.zeros_like(embed, dtype=torch.float32)
    for name, reason in smart_fast.available_backends().items():
        if reason is None and name != "torch" and (module := select(name, zeros)).name == name:
            noise: Tensor = module.perturb(zeros, seed, noise_var, None, False, None)[0]
            return noise
    generator = _generator(embed.device, int(seed))
    return torch.randn(embed.shape, device=embed.device, generator=generator) * noise_var


def _keeps_noise(backend: str, device: torch.device) -> bool:
    """Whether `perturb` of a fused backend stores its noise for the step that follows, rather than its seed."""
    probe = torch.zeros(1, 4, device=device)
    module = select(backend, probe)
    if module.name == "torch":
        return True
    _, noise = autograd.perturb(module, probe, 1.0, None, None, True, None)
    return bool(noise.dtype != torch.int64)
