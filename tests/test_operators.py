"""The registered operators: schemas, fakes, torch.compile; and which path eager mode takes."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from smart_fast import SMARTLoss, js_loss, jsd_loss, kl_loss, sym_kl_loss
from smart_fast.backends.base import STATISTICS
from tests.helpers import exhaustively

STEP = ("inf", 1e-5, 1e-3, "smart-pytorch")
NAMES = [
    "perturb", "ascend_norm", "ascend", "divergence_forward", "divergence_backward", "divergence_parts",
    "divergence_finish", "fisher_direction",
]  # fmt: skip


def samples(backend: ModuleType, device: torch.device) -> dict[str, list[tuple]]:
    x, t = torch.randn(2, 3, 10, device=device), torch.randn(2, 3, 10, device=device)
    seed = torch.tensor([3], device=device)
    mask = torch.tensor([[True, False, True], [True, True, True]], device=device)
    unit, norm = torch.rand(2, 3, 1, device=device), torch.rand(2, 3, 1, device=device)
    stats = torch.rand(6, STATISTICS, device=device)
    one = torch.ones((), device=device)
    found = {
        "perturb": [(x, seed, 0.1, None, None), (x.transpose(0, 1), seed, 0.1, mask.T, unit.view(3, 2, 1))],
        "ascend_norm": [
            (x, seed, None, None, None, *STEP),
            (x, seed, None, mask, unit, "opaque", *STEP[1:]),
            (x, seed, norm, mask, unit, "l2", 1e-5, 1e-3, "paper"),
        ],
        "ascend": [
            (x, t, seed, None, None, None, None, "inf", "row", 1e-5, 1e-3, "smart-pytorch", 1e-6, True),
            (x, t, seed, None, None, mask, unit, "l2", "row", 1e-5, 1e-3, "sift", 1e-6, False),
            (x, t, seed, None, None, mask, unit, "l1", "row", 1e-5, 1e-3, "paper", 1e-6, True),
            (x, t, seed, norm, norm, None, unit, "l2", "given", 1e-5, 1e-3, "paper", 1e-6, False),
            (x, t, seed, None, None, mask, unit, "inf", "row", 1e-5, 1e-3, "sign", 1e-6, True, "uniform"),
        ],
        "divergence_forward": [
            (x, t, None, "kl", "sum", 1.0, 1.0, 1.0, False, True),
            (x, t, mask, "js", "terms", 0.5, 1.0, 0.5, False, True),
            (x, t, None, "sym_kl", "rows", 0.5, 1.0, 1.0, True, False),
            (x, t, mask, "jsd", "rows", 0.5, 1.0, 0.5, True, True),
        ],
        "divergence_backward": [
            (one, x, t, stats, mask, "kl", "sum", 1.0, 1.0, 1.0, False, True, True),
            (x, x, t, stats, mask, "sym_kl", "terms", 1.0, 1.0, 0.5, True, True, False),
            (x[..., 0], x, t, stats, None, "js", "rows", 1.0, 1.0, 1.0, False, True, True),
            (one, x, t, stats, mask, "jsd", "sum", 0.5, 1.0, 1.0, False, True, True),
        ],
        "divergence_parts": [(x, t, mask, "kl", "rows", 1.0, 1.0, 1.0, False)],
        "divergence_finish": [(x, t, stats, mask, "js", "rows", 1.0, 1.0, 0.5, True)],
        "fisher_direction": [(x, True), (x.transpose(0, 1).bfloat16(), False), (x[..., :0], True)],
    }
    if backend.name == "native":  # whether to keep the noise, and which gradients to give with the loss
        found["perturb"] = [(*rest, keep, unit) for *rest, unit in found["perturb"] for keep in (False, True)]
        found["perturb"] = [
            (*each, kind) for each, kind in zip(found["perturb"], ("normal", "uniform") * 2, strict=True)
        ]
        forward = found["divergence_forward"]
        found["divergence_forward"] = [(*each, False, False) for each in forward]
        found["divergence_forward"] += [(*forward[0], True, True), (*forward[2], False, True)]
    return found


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, backend: ModuleType, device: torch.device) -> None:
    operator = getattr(torch.ops.smart_fast, name if backend.name == "triton" else f"native_{name}").default
    # test_autograd_registration: autograd lives in torch.autograd.Functions around the operators, by design.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for arguments in samples(backend, device)[name]:
        torch.library.opcheck(operator, arguments, test_utils=utilities)


@pytest.mark.parametrize("reduction", ["sum", *exhaustively("none")])
@pytest.mark.parametrize("loss_fn", [kl_loss, sym_kl_loss, js_loss, jsd_loss])
def test_losses_compile_whole(loss_fn, reduction: str, backend: ModuleType, device: torch.device) -> None:
    """One graph, forward and backward, with the operators in it."""

    def compute(x, t):
        return loss_fn(x, t, reduction=reduction, backend=backend.name)

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(4, 9, device=device, requires_grad=True) for _ in range(2)]
    eager, traced = compute(*inputs), compiled(*inputs)
    torch.testing.assert_close(traced, eager, rtol=1e-6, atol=0)  # another loop computes the loss alone
    upstream = torch.rand_like(eager)
    for left, right in zip(
        torch.autograd.grad(eager, inputs, upstream), torch.autograd.grad(traced, inputs, upstream), strict=True
    ):
        # To rounding: the eager native backend multiplies by the upstream gradient last, a compiled graph first.
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_smart_loss_compiles_whole(backend: ModuleType, device: torch.device) -> None:
    net = torch.nn.Linear(8, 5).to(device)
    embed = torch.randn(4, 8, device=device, requires_grad=True)
    smart = SMARTLoss(net, kl_loss, sym_kl_loss, num_steps=0, noise_var=0.1, backend=backend.name)
    compiled = torch.compile(lambda e: smart(e, net(e)), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    eager = smart(embed, net(embed))
    torch.manual_seed(0)
    traced = compiled(embed)
    torch.testing.assert_close(traced, eager)
    for one, two in zip(
        torch.autograd.grad(eager, [embed, net.weight]), torch.autograd.grad(traced, [embed, net.weight]), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_eager_mode_skips_the_dispatcher(backend: ModuleType, device: torch.device) -> None:
    """Of Triton's operators: their boundary is in Python, and costs as much as a launch."""
    if backend.name != "triton":
        pytest.skip("the boundary of a C++ operator is cheap")
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
