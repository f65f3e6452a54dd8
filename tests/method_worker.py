"""Checks of `BregmanProximal` and `checkpointed` in 2 processes; `test_method_distributed.py` runs it.

``python method_worker.py WORLD DIRECTORY``: see `parallel_worker.py`. As in `distributed_worker.py`, gradients of the
processes, each with its share of the batch, are compared with those of one process with all of it.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smart_fast import BregmanProximal, checkpointed
from tests import distributed_worker as base
from tests.parallel_worker import launch

TRAINING = 4
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def beta(step):
    return (0.5, 0.9)[step > 0]


def loss_of(call, eval_fn, words, proximal, tokens, labels, generator):
    """Cross-entropy, SMART and the proximal term; each called as a user would call it."""
    embed = words(tokens)
    logits = call(embed)
    smart = base.regularizer(eval_fn, 1, generator)(embed, logits)
    return nn.functional.cross_entropy(logits, labels) + smart + proximal(logits, tokens)


def around(model, proximal, batch, clean=lambda eval_fn: eval_fn):
    words = getattr(model, "module", model).words
    eval_fn = functools.partial(model, None)
    return loss_of(clean(eval_fn), eval_fn, words, proximal, *batch)


class Inside(nn.Module):
    def __init__(self, clean=lambda eval_fn: eval_fn):
        super().__init__()
        self.net = base.Net()
        self.proximal = BregmanProximal(self.net, beta)
        self.clean = clean

    def forward(self, *batch):
        eval_fn = functools.partial(self.net, None)
        return loss_of(self.clean(eval_fn), eval_fn, self.net.words, self.proximal, *batch)


@functools.cache
def reference():
    """Gradients of each step of training in one process, and the teacher in the end."""
    model, gradients = base.build(base.Net), []
    proximal = BregmanProximal(model, beta)
    for step in range(TRAINING):
        around(model, proximal, base.batch(step)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        base.descend(model)
        proximal.update()
    return gradients, proximal.state_dict()


def compare_teachers(proximal):
    """With that of one process, and with each other: bit for bit."""
    found, expected = proximal.state_dict(), reference()[1]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
        everywhere = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, value)
        assert all(torch.equal(each, value) for each in everywhere)


def train(model, net, proximal, loss_of, rank, world):
    for step in range(TRAINING):
        loss_of(base.share(rank, world, step)).backward()
        base.compare(net, reference()[0][step])
        base.descend(net)
        proximal.update()
    compare_teachers(proximal)


@check
def the_proximal_term_matters(rank, world):
    """Or the comparisons would be of the other terms alone."""
    model = base.build(base.Net)
    proximal = BregmanProximal(model, beta)
    around(model, proximal, base.batch(0)).backward()
    base.descend(model)
    grads = []
    for mu in (0.0, 1.0):
        proximal.mu = mu
        model.zero_grad()
        around(model, proximal, base.batch(1)).backward()
        grads.append(model.head.weight.grad.clone())
    assert (grads[0] - grads[1]).norm() > 0.01 * grads[0].norm()


@check
def proximal_around(rank, world):
    for options in base.DDP_MODES:
        model = DistributedDataParallel(base.build(base.Net), **options)
        proximal = BregmanProximal(model, beta)
        train(model, model, proximal, lambda batch: around(model, proximal, batch), rank, world)  # noqa: B023


@check
def proximal_inside(rank, world):
    """Built before DDP makes the processes equal: their seeds differ."""
    for options in base.DDP_MODES:
        task = base.build(Inside)
        if rank:
            with torch.no_grad():
                task.net.head.weight += 1.0
        assert [name for name, _ in task.named_parameters() if not name.startswith("net.")] == []
        model = DistributedDataParallel(task, **options)
        train(model, task.net, task.proximal, lambda batch: model(*batch), rank, world)  # noqa: B023


@check
def proximal_of_batch_norm(rank, world):
    """Statistics of the batch differ between processes, those of the teacher must not."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    proximal = BregmanProximal(model, 0.9)
    for step in range(3):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * rank + step))
        output = model(inputs)
        (output.square().mean() + proximal(output, inputs)).backward()
        base.descend(model)
        proximal.update()
        means = [torch.empty(6) for _ in range(world)]
        dist.all_gather(means, model.module[1].running_mean)
        assert not torch.equal(*means)
        dist.all_gather(means, proximal.teacher[1].running_mean)
        assert torch.equal(*means)
        assert torch.equal(means[0], model.module[1].running_mean) == (rank == 0)


@check
def proximal_of_sharded_parameters(rank, world):
    model = base.shard(base.build(base.Net))
    with pytest.raises(TypeError, match="model must not be sharded by FSDP2"):
        BregmanProximal(model).update()


@check
def checkpointed_around(rank, world):
    for options in base.DDP_MODES:
        model = DistributedDataParallel(base.build(base.Net), **options)
        proximal = BregmanProximal(model, beta)
        train(model, model, proximal, lambda batch: around(model, proximal, batch, checkpointed), rank, world)  # noqa: B023


@check
def checkpointed_inside(rank, world):
    for options in base.DDP_MODES:
        task = base.build(Inside, checkpointed)
        model = DistributedDataParallel(task, **options)
        train(model, task.net, task.proximal, lambda batch: model(*batch), rank, world)  # noqa: B023


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(4, 3)])

    def forward(self, x, head):
        return self.heads[head](x if head else self.norm(self.body(x)))


@check
def checkpointed_is_no_call_of_ddp(rank, world):
    """Which would forget, in the middle of a backward pass, the gradients that are there: those of the other head."""
    models = [DistributedDataParallel(base.build(TwoHeads)) for _ in range(2)]
    for step in range(TRAINING):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * rank + step)).double()
        for model, wrap in zip(models, (lambda eval_fn: eval_fn, checkpointed), strict=True):
            first = wrap(lambda x: model(x, 0).tanh())(inputs)  # noqa: B023
            (first.square().mean() + model(inputs, 1).square().mean()).backward()
        plain, ours = ([*(p.grad for p in each.parameters()), *each.buffers()] for each in models)
        assert all(map(torch.equal, plain, ours))
        base.descend(*models)


@check
def checkpointed_in_fsdp(rank, world):
    """Inside the root's forward pass; what is checkpointed is a sharded part, or a function that calls blocks."""

    class Sharded(base.Net):
        def forward(self, tokens, labels, generator):
            eval_fn = functools.partial(base.Net.forward, self, None)
            embed = self.words(tokens)
            logits = checkpointed(eval_fn)(embed)
            return nn.functional.cross_entropy(logits, labels) + base.regularizer(eval_fn, 1, generator)(embed, logits)

    for options in base.FSDP_MODES:
        model = base.shard(base.build(Sharded), **options)
        for step in range(base.TRAINING):
            model(*base.share(rank, world, step)).backward()
            base.compare(model, base.reference(1)[step])
            base.descend(model)


if __name__ == "__main__":
    launch(CHECKS)
