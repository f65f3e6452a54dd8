"""A call as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Captured:
    """``call`` as one CUDA graph, captured when it is first called; replays draw fresh noise.

    ``before`` is run before the capture: to drop gradients, for instance, which the graph is to allocate itself. What
    a replay returns is overwritten by the next one.
    """

    def __init__(self, call: Callable[..., Any], before: Callable[[], Any] = lambda: None) -> None:
        self._call, self._before = call, before
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self._graph is None:
            self._capture(inputs)
        with torch.no_grad():
            for static, each in zip(self._inputs, inputs, strict=True):
                static.copy_(each)
        assert self._graph is not None
        self._graph.replay()
        return self._results

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
        before = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as PyTorch's notes on CUDA graphs want it
            for _ in range(3):
                self._call(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._before()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = self._call(*self._inputs)
        torch.cuda.set_rng_state(before)
