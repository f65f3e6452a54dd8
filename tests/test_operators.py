"""The registered operators: schemas, fakes, torch.compile; and which path eager mode takes."""

from __future__ import annotations

import pytest
import torch

from smart_fast import js_loss, kl_loss, sym_kl_loss
from smart_fast.backends import triton_ops

STEP = ("inf", 1e-5, 1e-3, "smart-pytorch")


def samples(device: torch.device) -> dict[str, list[tuple]]:
    x, t = torch.randn(2, 3, 10, device=device), torch.randn(2, 3, 10, device=device)
    seed = torch.tensor([3], device=device)
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)
    stats = triton_ops.divergence_forward(x, t, mask, "kl", False, 1.0, 1.0, True)[1]
    one = torch.ones((), device=device)
    return {
        "perturb": [(x, seed, 0.1, None), (x.transpose(0, 1), seed, 0.1, mask.T)],
        "ascend_measure": [(x, seed, None, *STEP), (x, seed, mask, "opaque", *STEP[1:])],
        "ascend": [
            (x, t, seed, None, None, "inf", "row", 1e-5, 1e-3, "smart-pytorch", 1e-6, True),
            (x, t, seed, None, mask, "l2", "row", 1e-5, 1e-3, "sift", 1e-6, False),
        ],
        "divergence_forward": [
            (x, t, None, "kl", False, 1.0, 1.0, True),
            (x, t, mask, "js", True, 0.5, 1.0, True),
            (x, t, None, "sym_kl", False, 0.5, 1.0, False),
        ],
        "divergence_backward": [
            (one, x, t, stats, mask, "kl", False, 1.0, 1.0, True, True),
            (x, x, t, stats, mask, "sym_kl", True, 1.0, 1.0, True, False),
        ],
    }


@pytest.mark.parametrize("name", ["perturb", "ascend_measure", "ascend", "divergence_forward", "divergence_backward"])
def test_opcheck(name: str, device: torch.device) -> None:
    operator = getattr(torch.ops.smart_fast, name).default
    # test_autograd_registration: autograd lives in torch.autograd.Functions around the operators, by design.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for arguments in samples(device)[name]:
        torch.library.opcheck(operator, arguments, test_utils=utilities)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("loss_fn", [kl_loss, sym_kl_loss, js_loss])
def test_losses_compile_whole(loss_fn, reduction: str, device: torch.device) -> None:
    """One graph, forward and backward, with the operators in it."""

    def compute(x, t):
        return loss_fn(x, t, reduction=reduction, backend="triton")

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(4, 9, device=device, requires_grad=True) for _ in range(2)]
    eager, traced = compute(*inputs), compiled(*inputs)
    assert torch.equal(eager, traced)
    upstream = torch.rand_like(eager)
    for left, right in zip(
        torch.autograd.grad(eager, inputs, upstream), torch.autograd.grad(traced, inputs, upstream), strict=True
    ):
        assert torch.equal(left, right)


def test_eager_mode_skips_the_dispatcher(device: torch.device) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() as seen:
        kl_loss(torch.randn(2, 3, device=device), torch.randn(2, 3, device=device), backend="triton")
    assert seen.names
    assert not [name for name in seen.names if "smart_fast" in name]
