"""Checks of sharded vocabularies, in as many processes as asked for; `test_parallel.py` runs it.

``python parallel_worker.py WORLD DIRECTORY [CHECK ...]``: forks WORLD processes, runs every check (or these) in all of
them, and leaves DIRECTORY/RANK.json, a dict of the checks' tracebacks (empty: passed).
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import smart_fast
from smart_fast.backends.base import PARTS
from tests import oracle

LOSSES = {
    "kl": smart_fast.kl_loss, "sym_kl": smart_fast.sym_kl_loss, "js": smart_fast.js_loss, "jsd": smart_fast.jsd_loss,
}  # fmt: skip
PARAMETERS = {"sym_kl": "alpha", "js": "alpha", "jsd": "beta"}
DEFAULTS = {"kl": 1.0, "sym_kl": 1.0, "js": 1.0, "jsd": 0.5}
LINEAR = {
    "kl": smart_fast.linear_kl_loss, "sym_kl": smart_fast.linear_sym_kl_loss, "js": smart_fast.linear_js_loss,
    "jsd": smart_fast.linear_jsd_loss,
}  # fmt: skip
REDUCTIONS = ("none", "sum", "mean", "batchmean")
WIDTH, HIDDEN, SHAPE = 41, 8, (3, 2)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def bounds(world: int, rank: int) -> slice:
    """Slices of different widths, the last being the smallest."""
    step = WIDTH // world + 1
    return slice(rank * step, min((rank + 1) * step, WIDTH))


def logits(apart: float = 0.5, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = 2 * torch.randn((*shape, WIDTH), generator=generator, dtype=torch.float64)
    return t + apart * torch.randn(t.shape, generator=generator, dtype=torch.float64), t


def close(value: Tensor, reference: Tensor, tolerance: float = 1e-12, scale: Tensor | None = None) -> None:
    assert value.shape == reference.shape, (value.shape, reference.shape)
    if value.any() or float(reference.abs().max()) > 1e-14:
        error = oracle.relative_error(value, reference, scale)
        assert error <= tolerance, f"relative error {error:.1e}"


def weight_of(reduction, x, keep):
    """What a reduction multiplies the sum by."""
    return {"batchmean": 1 / x.shape[0], "mean": 1 / max(1, int(keep.sum()) * x.shape[-1])}.get(reduction, 1.0)


def whole(kind, x, t, reduction, alpha, upstream, mask):
    """Loss and gradients from whole logits."""
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    weight = weight_of(reduction, x, keep)
    loss = (
        oracle.divergence_terms(kind, x, t, alpha) if reduction == "none" else oracle.divergence_rows(kind, x, t, alpha)
    )
    loss = torch.where(keep.unsqueeze(-1) if reduction == "none" else keep, loss, 0.0)
    grads = oracle.divergence_grads(kind, x, t, alpha, upstream * weight * torch.ones(1, dtype=torch.float64))
    grads = [torch.where(keep.unsqueeze(-1), each, 0.0) for each in grads]
    return [loss if reduction == "none" else loss.sum() * weight, *grads]


def compare(x, t, kind, reduction, group, rank, world, mask=None, dtype=torch.float64, tolerance=1e-12, **options):
    alpha = 1.0 if kind == "kl" else 0.7
    upstream = torch.rand(x.shape if reduction == "none" else (), generator=torch.Generator().manual_seed(1)).double()
    x, t = x.to(dtype), t.to(dtype)
    part = bounds(world, rank)
    mine = [each[..., part].requires_grad_() for each in (x, t)]
    options |= {PARAMETERS[kind]: alpha} if kind in PARAMETERS else {}
    loss = LOSSES[kind](*mine, reduction, mask=mask, process_group=group, **options)
    local = upstream[..., part] if reduction == "none" else upstream
    found = [loss, *torch.autograd.grad(loss, mine, local.to(loss.dtype))]
    want = whole(kind, x, t, reduction, alpha, upstream, mask)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    scales = oracle.gradient_scales(kind, x, t, alpha, upstream * weight_of(reduction, x, keep) * keep.unsqueeze(-1))
    for index, (value, reference, scale) in enumerate(zip(found, want, (None, *scales), strict=True)):
        close(value, reference if index == 0 and reduction != "none" else reference[..., part], tolerance, scale)


@check
def losses_and_gradients(rank, world):
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for apart in (1e-6, 0.1, 5.0):
        for kind in LOSSES:
            for reduction in REDUCTIONS:
                compare(*logits(apart), kind, reduction, dist.group.WORLD, rank, world, backend="torch")
                compare(*logits(apart), kind, reduction, dist.group.WORLD, rank, world, mask, backend="torch")


@check
def single_rows(rank, world):
    for kind in LOSSES:
        for reduction in ("sum", "mean", "none"):
            compare(*logits(shape=()), kind, reduction, dist.group.WORLD, rank, world)
        x, t = (each[bounds(world, rank)] for each in logits(shape=()))
        close(
            LOSSES[kind](x, t, "batchmean", process_group=dist.group.WORLD),
            LOSSES[kind](*logits(shape=()), "batchmean"),
        )


@check
def fused_backends(rank, world):
    """fp32 by whatever kernels are there and know of slices."""
    from smart_fast.backends import select

    module = select("auto", torch.ones(2, 2))
    if module.name == "torch":
        return
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for apart in (1e-3, 5.0):
        for kind in LOSSES:
            for reduction in REDUCTIONS:
                compare(*logits(apart), kind, reduction, dist.group.WORLD, rank, world, mask, torch.float32, 2e-6)


@check
def a_slice_of_padding(rank, world):
    """The last process holds nothing but -inf in some rows, the first in one of them."""
    x, t = logits()
    for each in (x, t):
        each[:2, :, bounds(world, world - 1)] = -float("inf")
        each[2, 0, bounds(world, 0)] = -float("inf")
    part = bounds(world, rank)
    for kind in LOSSES:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            mine = [each[..., part].to(dtype).requires_grad_() for each in (x, t)]
            loss = LOSSES[kind](*mine, "sum", process_group=dist.group.WORLD, backend="torch")
            want = 0.0
            for row in range(3):
                for column in range(2):
                    kept = x[row, column].isfinite()
                    want += oracle.divergence_rows(kind, x[row, column][kept], t[row, column][kept], DEFAULTS[kind])
            close(loss, want, tolerance)
            for grad in torch.autograd.grad(loss, mine):
                assert grad.isfinite().all()
                assert not grad[x[..., part].isinf()].any()


@check
def two_collectives_forward_none_backward(rank, world):
    x, t = (each[..., bounds(world, rank)].requires_grad_() for each in logits())
    calls = []

    def counted(name):
        original = getattr(dist, name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            calls.append((name, args[0].numel()))
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        for name in ("all_reduce", gather):
            patch.setattr(dist, name, counted(name))
        for kind in LOSSES:
            calls.clear()
            loss = LOSSES[kind](x, t, "mean", process_group=dist.group.WORLD)
            assert calls == [(gather, world * 7 * PARTS), ("all_reduce", 6 * 2)]
            loss.backward()
            assert len(calls) == 2


@check
def groups_of_some_processes(rank, world):
    groups = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    compare(*logits(), "sym_kl", "mean", groups[rank // 2], rank % 2, 2)
    alone = dist.new_group([0])
    if rank == 0:
        compare(*logits(), "kl", "sum", alone, 0, 1)
    else:
        with pytest.raises((ValueError, TypeError), match="process_group must"):
            compare(*logits(), "kl", "sum", alone, 0, 1)


@check
def linear_losses(rank, world):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn((*SHAPE, HIDDEN), generator=generator, dtype=torch.float64)
    input = target + 0.3 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    weight = torch.randn((WIDTH, HIDDEN), generator=generator, dtype=torch.float64)
    bias = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    part = bounds(world, rank)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for loss_fn in LINEAR.values():
        for reduction in REDUCTIONS:
            for keep in (None, mask):
                leaves = [each.clone().requires_grad_() for each in (input, target, weight, bias)]
                slices = [*leaves[:2], leaves[2][part], leaves[3][part]]
                options = {"mask": keep, "temperature": 2.0, "backend": "torch"}
                loss = loss_fn(*slices, reduction, **options, process_group=dist.group.WORLD, chunk_bytes=4 * 8 * WIDTH)
                upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                found = torch.autograd.grad(loss, slices, upstream)
                reference = loss_fn(*leaves, reduction, **options)
                want = torch.autograd.grad(reference, leaves, upstream)
                close(loss, reference)
                for index, (value, whole_one) in enumerate(zip(found, want, strict=True)):
                    close(value, whole_one if index < 2 else whole_one[part], 1e-11)


@check
def linear_losses_of_two_heads(rank, world):
    """And of capped logits, of one head and of two."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    given = {"input": draw(*SHAPE, HIDDEN), "weight": draw(WIDTH, HIDDEN), "bias": draw(WIDTH)}
    shared = given | {"target": given["input"] + 0.3 * draw(*SHAPE, HIDDEN)}
    two = given | {"target": draw(*SHAPE, 5), "target_weight": draw(WIDTH, 5), "target_bias": draw(WIDTH)}
    part = bounds(world, rank)
    for loss_fn in LINEAR.values():
        for tensors, options in ((two, {}), (two, {"logit_softcap": 2.0}), (shared, {"logit_softcap": 2.0})):
            for reduction in ("mean", "none"):
                leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
                slices = {name: each[part] if each.shape[0] == WIDTH else each for name, each in leaves.items()}
                options |= {"reduction": reduction, "backend": "torch", "chunk_bytes": 4 * 8 * WIDTH}
                loss = loss_fn(**slices, **options, process_group=dist.group.WORLD)
                upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                found = torch.autograd.grad(loss, list(slices.values()), upstream)
                reference = loss_fn(**leaves, **options)
                want = torch.autograd.grad(reference, list(leaves.values()), upstream)
                close(loss, reference)
                for value, whole_one in zip(found, want, strict=True):
                    close(value, whole_one[part] if whole_one.shape[0] == WIDTH else whole_one, 1e-11)


@check
def linear_losses_of_different_tokens(rank, world):
    hidden = torch.ones(2 + (rank == 1), HIDDEN)
    with pytest.raises(ValueError, match=r"\(tokens, H, chunk_bytes\) must be the same in every process"):
        smart_fast.linear_kl_loss(hidden, hidden, torch.ones(3, HIDDEN), process_group=dist.group.WORLD)
    called = smart_fast.LinearDivergence(torch.nn.Identity(), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group must be None for a head that is called, as Identity is"):
        called(hidden, hidden)


@check
def dtensors(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    x, t = logits()
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for placement in (Shard(-1), Shard(2), Replicate()):
        for kind in LOSSES:
            for reduction in REDUCTIONS:
                mine = [distribute_tensor(each, mesh, [placement]).requires_grad_() for each in (x, t)]
                loss = LOSSES[kind](*mine, reduction, mask=mask, backend="torch")
                upstream = torch.rand(
                    x.shape if reduction == "none" else (), generator=torch.Generator().manual_seed(1)
                )
                if reduction == "none":
                    assert isinstance(loss, DTensor)
                    local = distribute_tensor(upstream.double(), mesh, [placement])
                else:
                    local = upstream.double()
                grads = torch.autograd.grad(loss, mine, local)
                want = whole(kind, x, t, reduction, DEFAULTS[kind], upstream.double(), mask)
                close(loss.full_tensor() if reduction == "none" else loss, want[0])
                for grad, like, reference in zip(grads, mine, want[1:], strict=True):
                    assert isinstance(grad, DTensor)
                    assert grad.placements == like.placements
                    close(grad.full_tensor(), reference)


@check
def dtensors_placed_otherwise(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    x, _ = logits()
    sharded = distribute_tensor(x, mesh, [Shard(-1)])
    for placement in (Shard(0), Shard(1), Partial()):
        other = DTensor.from_local(x, mesh, [placement], run_check=False)
        with pytest.raises(ValueError, match=r"must be placed as \(Shard\(dim=-1\),\).* got \((Shard|Partial)"):
            smart_fast.sym_kl_loss(other, other)
        with pytest.raises(ValueError, match="must have one mesh and the same placements"):
            smart_fast.sym_kl_loss(sharded, other)
    square = init_device_mesh("cpu", (2, world // 2))
    both = DTensor.from_local(x, square, [Replicate(), Replicate()], run_check=False)
    with pytest.raises(ValueError, match="on a mesh of one dimension; got"):
        smart_fast.kl_loss(both, both)
    with pytest.raises(ValueError, match="must both be DTensors or neither, target is a Tensor"):
        smart_fast.kl_loss(sharded, x)
    with pytest.raises(ValueError, match="process_group must be None for DTensor logits"):
        smart_fast.kl_loss(sharded, sharded, process_group=dist.group.WORLD)
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor"):
        smart_fast.linear_kl_loss(x, x, sharded[0])


@check
def smart_with_a_sharded_vocabulary(rank, world):
    """The regularizer, its gradient and the ascent are those of one process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((WIDTH, HIDDEN), generator=generator, dtype=torch.float64)
    part = bounds(world, rank)
    found = []
    for head, group in ((weight, None), (weight[part], dist.group.WORLD)):
        body = torch.nn.Linear(5, HIDDEN, dtype=torch.float64)
        with torch.no_grad():
            body.weight.copy_(torch.linspace(-1, 1, 5 * HIDDEN).view(HIDDEN, 5))
            body.bias.zero_()
        head = head.clone().requires_grad_()
        loss_fn = smart_fast.LinearDivergence(head, kind="sym_kl", process_group=group)
        embed = torch.linspace(-1, 1, 30, dtype=torch.float64).view(2, 3, 5)
        torch.manual_seed(0)
        smart = smart_fast.SMARTLoss(body, loss_fn, step_size=1.0, noise_var=0.1, backend="torch")
        loss = smart(embed, body(embed))
        found.append([loss, *torch.autograd.grad(loss, [body.weight, head])])
    close(found[1][0], found[0][0], 1e-9)
    close(found[1][1], found[0][1], 1e-9)
    close(found[1][2], found[0][2][part], 1e-9)


def work(checks, rank: int, world: int, directory: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    file = directory / f"{rank}.json"
    results = dict.fromkeys(checks, "not run: an earlier check failed in some process")
    for name, function in checks.items():
        try:
            function(rank, world)
        except (Exception, pytest.fail.Exception):
            # The processes no longer agree on which collective is next: this one leaves, which ends the others' wait.
            results[name] = traceback.format_exc()
            file.write_text(json.dumps(results))
            return
        results[name] = ""
        file.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def launch(checks) -> None:
    torch.set_num_threads(1)
    world, directory = int(sys.argv[1]), Path(sys.argv[2])
    checks = {name: checks[name] for name in sys.argv[3:] or checks}
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(checks, rank, world, directory)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    launch(CHECKS)
