"""``python -m bench.sanitize``: every kernel once at small, odd shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.sanitize --device cuda

Rows that end inside a vector, strided ones, masked ones, and one row shared by several programs. Results are held to
PyTorch's, so that a run without compute-sanitizer means something too. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every
tensor an allocation of its own, whose ends the tool then knows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import smart_fast
from smart_fast.ascent import fisher
from smart_fast.backends import select

#: Few, since each is compiled anew by Triton: a row of several to a program, one to a program, and in blocks.
INPUTS = (
    ((2, 3, 5), torch.float32),
    ((2, 3, 5), torch.float16),
    ((2, 3, 1001), torch.float32),
    ((2, 3, 1001), torch.bfloat16),
    ((1, 20001), torch.float32),
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def checks(backend: str, device: torch.device) -> Iterator[str]:
    """Run and check; the name of each check as it is passed.

    Raises:
        RuntimeError: ``backend`` does not serve ``device``.
        AssertionError: a result is wrong.
    """
    for shape, dtype in INPUTS:
        if select(backend, torch.empty(1, dtype=dtype, device=device)).name != backend:
            raise RuntimeError(f"backend {backend!r} does not serve {device}")
        x = torch.randn(shape, device=device).to(dtype)
        t = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]  # rows far apart
        mask = torch.rand(shape[:-1], device=device) < 0.7
        yield from _divergences(backend, x, t, mask)
        close(fisher.direction(t, backend), fisher.direction(t), t.dtype)
        yield f"fisher direction {list(shape)} {dtype}"
        if len(shape) > 2:
            yield from _steps(backend, x, mask)


def _divergences(backend: str, x: Tensor, t: Tensor, mask: Tensor) -> Iterator[str]:
    for name, reduction, given in itertools.product(("kl", "sym_kl", "js"), ("sum", "none"), (None, mask)):
        loss = getattr(smart_fast, f"{name}_loss")

        def results(to: str, loss=loss, reduction=reduction, given=given) -> list[Tensor]:
            # PyTorch's own in float64, where nothing cancels.
            sides = [
                each.detach().to(torch.float64 if to == "torch" else each.dtype).requires_grad_() for each in (x, t)
            ]
            value = loss(*sides, reduction=reduction, mask=given, backend=to)
            return [value, *torch.autograd.grad(value.sum(), sides)]

        for ours, theirs in zip(results(backend), results("torch"), strict=True):
            close(ours, theirs, x.dtype)
        yield f"{name} {reduction}{'' if given is None else ' masked'} {list(x.shape)} {x.dtype}"


def _steps(backend: str, x: Tensor, mask: Tensor) -> Iterator[str]:
    """Whole regularizers, of token norms and one of sentences; K = 2 keeps noise in between."""
    norms = (smart_fast.inf_norm, smart_fast.l1_norm, smart_fast.sentence_norm(smart_fast.l2_norm))
    for norm, (update, scale) in itertools.product(norms, (("smart-pytorch", "absolute"), ("paper", "relative"))):
        # Of a square the gradient depends on the noise, and the result says whether anything was out of place.
        smart = smart_fast.SMARTLoss(
            lambda e: e.square(), smart_fast.kl_loss, smart_fast.sym_kl_loss, num_steps=2, noise_var=0.1,
            step_size=0.1, epsilon=0.5, norm_fn=norm, update=update, scale=scale, backend=backend,
        )  # fmt: skip
        embed = x.detach().requires_grad_()
        loss = smart(embed, embed.square(), mask=mask)
        (grad,) = torch.autograd.grad(loss, embed)
        assert loss.isfinite(), f"{update} {_name(norm)} {list(x.shape)}: loss {loss}"
        assert grad.isfinite().all(), f"{update} {_name(norm)} {list(x.shape)}: gradient"
        yield f"step {update} {_name(norm)} {scale} {list(x.shape)} {x.dtype}"


def _name(norm: Any) -> str:
    return getattr(norm, "__name__", repr(norm))


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Euclidean distance, relative."""
    off, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    assert off <= TOLERANCE[dtype] * size + 1e-6, f"off by {float(off):.2e} of {float(size):.2e}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--backends", nargs="+", default=["triton"], metavar="NAME", help="fused ones (default triton)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    for backend in options.backends:
        count = sum(1 for _ in checks(backend, torch.device(options.device)))
        print(f"{backend} on {options.device}: {count} checks passed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
