"""A whole training step as a task: forward, cross-entropy plus SMART regularizer, backward, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import smart_fast

from .captured import Captured
from .divergences import divergence64
from .models import LABELS, LanguageModel, Model
from .operations import EPSILON, STEP_SIZE
from .regularizer import CHECK_SEED, TOLERANCE, autocast, drawn_noise
from .task import Finding, deviation, finding


class TrainingStep:
    """``cross_entropy + weight * SMARTLoss(model, kl_loss, sym_kl_loss)`` at its defaults, all gradients, and one AdamW
    step. The weight, a power of two, makes both terms about as large: an error in either shows in the checks.

    A classifier has a label a sequence, a language model one a token. On a GPU under autocast in bfloat16. Dropout is
    off and the learning rate is zero, so that all steps are the same work on the same weights and can be compared.
    """

    def __init__(self, build: Callable[[], Model], shape: tuple[int, int], device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build().to(device).eval()
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        self.weight = 1.0
        self.weight = self._balance()
        self._reference: tuple[tuple[Tensor, ...], tuple[Tensor, list[Tensor | None]]] | None = None

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """``(ids, labels)``: int64 ``[B, S]``, and ``[B]`` or of a language model ``[B, S]``."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary, tokens = self.model.vocabulary, isinstance(self.model, LanguageModel)
        ids = torch.randint(vocabulary, self.shape, generator=generator)
        labels = torch.randint(
            vocabulary if tokens else LABELS, self.shape if tokens else self.shape[:1], generator=generator
        )
        return ids.to(self.device), labels.to(self.device)

    def smart_pytorch(self) -> Callable[..., Tensor]:
        import smart_pytorch  # not at the top: our own side runs where it is not installed

        return self._forward(smart_pytorch.SMARTLoss(self.model, smart_pytorch.kl_loss, smart_pytorch.sym_kl_loss))

    def ours(self, backend: str) -> Callable[..., Tensor]:
        losses = smart_fast.kl_loss, smart_fast.sym_kl_loss
        return self._forward(smart_fast.SMARTLoss(self.model, *losses, backend=backend))

    def variants(self, backend: str) -> dict[str, Callable[..., Any]]:
        """Our step compiled into one graph, that of a language model without the logits of the regularizer (the
        cross-entropy's are made), and on a GPU one captured as a CUDA graph."""
        found: dict[str, Callable[..., Any]] = {
            "compiled": torch.compile(self.ours(backend), fullgraph=True, dynamic=False)
        }
        if isinstance(self.model, LanguageModel):
            found["hidden states"] = self._hidden(self.model, backend)
        if self.device.type == "cuda":
            found["CUDA graph"] = Captured(self.call(self.ours(backend)), self.optimizer.zero_grad)
        return found

    def _balance(self) -> float:
        ids, labels = self.inputs(0)
        entropy = _cross_entropy(self.model(self.model.words(ids)), labels).detach()
        total = self.ours("torch")(ids, labels).detach()  # in float32: bfloat16 may give a negative divergence
        return float(2.0 ** (entropy / (total - entropy)).log2().round())

    def _forward(self, regularizer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(ids: Tensor, labels: Tensor) -> Tensor:
            embed = self.model.words(ids)
            logits = self.model(embed)
            return _cross_entropy(logits, labels) + self.weight * regularizer(embed, logits)

        return loss

    def _hidden(self, model: LanguageModel, backend: str) -> Callable[..., Tensor]:
        def compared(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda input, target: loss(input, target, model.head.weight)

        losses = compared(smart_fast.linear_kl_loss), compared(smart_fast.linear_sym_kl_loss)
        regularizer = smart_fast.SMARTLoss(model.hidden, *losses, backend=backend)

        def loss(ids: Tensor, labels: Tensor) -> Tensor:
            embed = model.words(ids)
            states = model.hidden(embed)
            return _cross_entropy(model.head(states), labels) + self.weight * regularizer(embed, states)

        return loss

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, Captured):
            return function

        def step(ids: Tensor, labels: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            with autocast(self.device, self.dtype):
                loss: Tensor = function(ids, labels)
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        return step

    def model_only(self) -> Callable[..., Any]:
        """The model's passes of such a step and the optimizer, and nothing beside them: clean forward, forward and
        input gradient of the ascent step, forward, backward through both."""

        def passes(ids: Tensor, labels: Tensor) -> Tensor:
            self.optimizer.zero_grad()
            with autocast(self.device, self.dtype):
                embed = self.model.words(ids)
                clean = self.model(embed)
                moved = embed.detach().requires_grad_()
                torch.autograd.grad(self.model(moved).sum(), moved)
                loss: Tensor = clean.sum() + self.model(embed).sum()
            loss.backward()
            self.optimizer.step()
            return loss.detach()

        return passes

    def check(self, run: Callable[..., Any], inputs: tuple[Any, ...], backend: str | None) -> list[Finding]:
        """The step in float64, from the very noise that the contestant draws for one seed."""
        torch.manual_seed(CHECK_SEED)
        noise = drawn_noise(self.model.words(inputs[0]).detach(), backend).double()
        torch.manual_seed(CHECK_SEED)
        loss = run(*inputs)
        gradients = [each.grad for each in self.parameters]
        given = (*inputs, noise)
        if self._reference is None or not all(map(torch.equal, self._reference[0], given)):
            self._reference = given, self._exact(*given)  # most contestants draw the same noise
        e_loss, e_gradients = self._reference[1]
        pairs = [(g, e) for g, e in zip(gradients, e_gradients, strict=True) if e is not None]
        found, expected = [g for g, _ in pairs], [e for _, e in pairs]
        tolerance = TOLERANCE[self.dtype]
        return [
            finding("loss", deviation([loss], [e_loss]), tolerance),
            finding("gradient to the parameters", deviation(found, expected), tolerance),
        ]

    def _exact(self, ids: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        model = copy.deepcopy(self.model).double()
        model.zero_grad()
        embed = model.words(ids)
        clean = model(embed)
        start = (embed.detach() + noise).requires_grad_()
        ascent = divergence64("kl", model(start).flatten(0, -2), clean.detach().flatten(0, -2)) / len(clean)
        step = noise + STEP_SIZE * torch.autograd.grad(ascent, start)[0]
        moved = embed + step / (step.abs().amax(-1, keepdim=True) + EPSILON)
        exact = divergence64("sym_kl", model(moved).flatten(0, -2), clean.flatten(0, -2))
        loss = _cross_entropy(clean, labels) + self.weight * exact
        loss.backward()
        return loss.detach(), [each.grad for each in model.parameters()]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all labels, in fp32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(dtype), labels.flatten())
