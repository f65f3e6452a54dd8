"""The whole regularizer as a task: one SMARTLoss call and its gradients, on a model with random weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import smart_fast
from smart_fast import autograd
from smart_fast.backends import select

from .captured import Captured
from .divergences import WEIGHT, divergence64
from .operations import EPSILON, STEP_SIZE, seeded_noise
from .task import Finding, deviation, finding

NOISE_VAR = 1e-5
CHECK_SEED = 20
# Under autocast contestants and reference differ by the rounding of every layer in bfloat16, which is not small beside
# what noise does to an untrained classifier.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-1}
# Of a row's divergence, where log-probabilities of order one are in the dtype of the logits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def drawn_noise(embed: Tensor, backend: str | None) -> Tensor:
    """The noise that one of our backends, or smart-pytorch (None), draws next for ``embed``."""
    if backend is None:
        return torch.randn_like(embed) * NOISE_VAR
    module = select(backend, embed)
    _, noise = autograd.perturb(module, embed, NOISE_VAR, None, None, True, None)
    return seeded_noise(embed, noise, NOISE_VAR) if noise.dtype == torch.int64 else noise


class Regularizer:
    """SMART regularization: ``SMARTLoss(model, kl_loss, sym_kl_loss)`` at its defaults (one ascent step).

    ``dtype``: that of the model's arithmetic, under autocast unless float32; weights are float32. The call is forward
    and backward of WEIGHT times it, to the parameters, the embedding and the clean logits. The clean pass itself is
    outside: it belongs to the task that is regularized. Dropout is off, so that results can be compared.
    """

    def __init__(
        self, build: Callable[[], nn.Module], shape: tuple[int, ...], scale: float, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = build().to(device).eval()
        self.shape, self.scale, self.dtype, self.device = shape, scale, dtype, device
        self.small = len(shape) == 2
        self._reference: tuple[Tensor, list[Tensor]] | None = None
        probe = self.model(self._embed(0))
        grads = torch.autograd.grad(probe.sum(), list(self.model.parameters()), allow_unused=True)
        pairs = zip(self.model.named_parameters(), grads, strict=True)
        # The word embeddings are not read when the input is embedded already.
        self.names = [name for (name, _), grad in pairs if grad is not None]
        self.parameters = self._used(self.model)

    def _used(self, model: nn.Module) -> list[Tensor]:
        named = dict(model.named_parameters())
        return [named[name] for name in self.names]

    def _embed(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        embed = torch.randn(self.shape, device=self.device, generator=generator) * self.scale
        return embed.requires_grad_()

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """``(embed, state)``: the embedding and the clean logits, both leaves that require gradients."""
        embed = self._embed(seed)
        with torch.no_grad(), autocast(self.device, self.dtype):
            state = self.model(embed)
        return embed, state.requires_grad_()

    def smart_pytorch(self) -> Callable[..., Any]:
        import smart_pytorch  # not at the top: our own side runs where it is not installed

        return smart_pytorch.SMARTLoss(self.model, smart_pytorch.kl_loss, smart_pytorch.sym_kl_loss)

    def ours(self, backend: str) -> Callable[..., Any]:
        return smart_fast.SMARTLoss(self.model, smart_fast.kl_loss, smart_fast.sym_kl_loss, backend=backend)

    def variants(self, backend: str) -> dict[str, Callable[..., Any]]:
        """Of a small head, whose passes cost less than the host's work: compiled into one graph, and on a GPU captured
        as a CUDA graph."""
        if not self.small:
            return {}
        found = {"compiled": torch.compile(self.ours(backend), fullgraph=True, dynamic=False)}
        if self.device.type == "cuda":
            found["CUDA graph"] = Captured(self.call(self.ours(backend)))
        return found

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, Captured):
            return function

        def forward_backward(embed: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            with autocast(self.device, self.dtype):
                loss = function(embed, state)
            return loss, *torch.autograd.grad(WEIGHT * loss, (embed, state, *self.parameters))

        return forward_backward

    def model_only(self) -> Callable[..., Any]:
        """The model passes that one such call makes, and nothing beside them: forward and input gradient of the
        ascent step, then forward and full backward."""

        def passes(embed: Tensor, state: Tensor) -> Tensor:
            upstream = state.detach()
            moved = embed.detach().requires_grad_()
            with autocast(self.device, self.dtype):
                torch.autograd.grad(self.model(moved), moved, upstream)
                last = self.model(embed)
            return torch.autograd.grad(last, (embed, *self.parameters), upstream)[0]

        return passes

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        """The same call in float64, from the very noise that the contestant draws for one seed."""
        embed, state = inputs
        torch.manual_seed(CHECK_SEED)
        noise = drawn_noise(embed.detach(), backend).double()
        torch.manual_seed(CHECK_SEED)
        loss, d_embed, d_state, *d_parameters = run(*inputs)
        if self._reference is None or not torch.equal(self._reference[0], noise):
            self._reference = noise, self._exact(embed, state, noise)  # most contestants draw the same noise
        e_loss, e_embed, e_state, *e_parameters = self._reference[1]
        tolerance = TOLERANCE[self.dtype]
        size = e_loss.abs() + ROUNDING[self.dtype] / tolerance * d_state.shape[:-1].numel()
        return [
            finding("loss", (loss.detach() - e_loss).abs() / size, tolerance),
            finding("gradient to the embedding", deviation([d_embed], [e_embed]), tolerance),
            finding("gradient to the clean logits", deviation([d_state], [e_state]), tolerance),
            finding("gradient to the parameters", deviation(d_parameters, e_parameters), tolerance),
        ]

    def _exact(self, embed: Tensor, state: Tensor, noise: Tensor) -> list[Tensor]:
        """Loss, and gradients of WEIGHT times it, in float64, written out: one ascent step, then the returned loss."""
        model = copy.deepcopy(self.model).double()
        clean = state.detach().double().requires_grad_()
        start = (embed.detach().double() + noise).requires_grad_()
        ascent = divergence64("kl", model(start).flatten(0, -2), clean.detach().flatten(0, -2)) / len(clean)
        step = noise + STEP_SIZE * torch.autograd.grad(ascent, start)[0]
        moved = embed.detach().double() + step / (step.abs().amax(-1, keepdim=True) + EPSILON)
        moved.requires_grad_()
        exact = divergence64("sym_kl", model(moved).flatten(0, -2), clean.flatten(0, -2))
        return [exact.detach(), *torch.autograd.grad(WEIGHT * exact, (moved, clean, *self._used(model)))]
