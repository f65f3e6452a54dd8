"""Checks of data and tensor parallel training in 2 processes; `test_distributed.py` runs it.

``python distributed_worker.py WORLD DIRECTORY``: see `parallel_worker.py`. Gradients of the processes, each with its
share of the batch, are compared with those of one process with all of it. Every row gets the same noise either way.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smart_fast import SMARTLoss, available_backends, l2_norm, perturbation, sym_kl_loss
from tests.parallel_worker import launch

ROWS, LENGTH, WIDTH, WORDS, CLASSES = 8, 4, 8, 11, 3
ASCENTS = (1, 3)
FISHER = "fisher"  # in the place of a number of steps
TRAINING = 3
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


# --- What is trained ---


class Net(nn.Module):
    """From tokens or an embedding to logits."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.reentrant = reentrant

    def forward(self, tokens=None, embed=None):
        x = self.words(tokens) if embed is None else embed
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x.mean(1))


def regularizer(eval_fn, num_steps, generator):
    return SMARTLoss(
        eval_fn,
        # A sum over rows: the step of a row does not depend on how many rows its process has.
        lambda x, t: sym_kl_loss(x, t, "sum"),
        lambda x, t: sym_kl_loss(x, t, "batchmean"),
        num_steps=1 if num_steps == FISHER else num_steps, ascent=FISHER if num_steps == FISHER else "perturbed",
        step_size=0.5, noise_var=0.1, update="sift", generator=generator,
    )  # fmt: skip


def objective(eval_fn, embed, labels, generator, num_steps):
    logits = eval_fn(embed)
    smart = regularizer(eval_fn, num_steps, generator)
    return nn.functional.cross_entropy(logits, labels) + smart(embed, logits)


class Inside(Net):
    """The regularizer is part of the forward pass, and calls parts of the module."""

    eval_fn = None

    def forward(self, tokens, labels, generator, num_steps):
        eval_fn = self.eval_fn or (lambda embed: Net.forward(self, embed=embed))
        return objective(eval_fn, self.words(tokens), labels, generator, num_steps)


def around(model, tokens, labels, generator, num_steps):
    """The regularizer calls the module, which may be wrapped, several times."""
    words = getattr(model, "module", model).words
    return objective(lambda embed: model(embed=embed), words(tokens), labels, generator, num_steps)


def inside(model, *inputs):
    return model(*inputs)


def build(kind, *args):
    torch.manual_seed(0)
    return kind(*args).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    return tokens, torch.randint(CLASSES, (ROWS,), generator=generator), torch.Generator().manual_seed(100 + step)


def share(rank, world, step):
    """This process's rows, and a generator that gives them the noise they get in one process."""
    rows = ROWS // world
    tokens, labels, generator = batch(step)
    if rank:  # normal_ fills 16 numbers at a time, and these are multiples of that
        torch.empty(rank * rows * LENGTH * WIDTH, dtype=torch.float64).normal_(generator=generator)
    return *(each[rank * rows : (rank + 1) * rows] for each in (tokens, labels)), generator


# --- What it is compared with ---


@functools.cache
def reference(num_steps, accumulate=1):
    """Gradients of each step of training in one process."""
    model, gradients = build(Net), []
    for step in range(TRAINING):
        for part in range(accumulate):
            around(model, *batch(step + part), num_steps).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        descend(model)
    return gradients


@torch.no_grad()
def descend(*modules):
    for parameter in itertools.chain(*(module.parameters() for module in modules)):
        parameter -= 0.5 * parameter.grad
        parameter.grad = None


def compare(model, expected, tolerance=1e-10):
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None, f"no gradient of {name}"
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        error = float((grad - expected[name]).norm() / expected[name].norm())
        assert error <= tolerance, f"gradient of {name}: relative error {error:.1e}"


def train(model, loss_of, rank, world, num_steps):
    for step in range(TRAINING):
        loss_of(model, *share(rank, world, step), num_steps).backward()
        compare(model, reference(num_steps)[step])
        descend(model)


def train_accumulating(model, loss_of, rank, world, without_sync):
    """Two batches a step; the gradients of the first stay where they are."""
    for step in range(TRAINING):
        with without_sync(model):
            loss_of(model, *share(rank, world, step), 1).backward()
        loss_of(model, *share(rank, world, step + 1), 1).backward()
        compare(model, reference(1, accumulate=2)[step])
        descend(model)


@check
def the_regularizer_matters(rank, world):
    """Or the comparisons would be of the cross-entropy alone."""
    name = "blocks.0.0.weight"
    grads = [reference(num_steps)[0][name] for num_steps in (0, *ASCENTS)]
    for left, right in itertools.combinations(grads, 2):
        assert (left - right).norm() > 0.01 * left.norm()


# --- DistributedDataParallel ---

DDP_MODES = (
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
)


@functools.cache
def accumulated(step, num_steps):
    """Gradients of `free` in one process: those of one process's passes, which know nothing of each other."""
    model = build(Net)
    free(model, *batch(step), num_steps)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def free(model, tokens, labels, generator, num_steps):
    """A clean pass, an ascent whose gradients of parameters accumulate (FreeLB), and the pass at its end."""
    words = getattr(model, "module", model).words
    embed = words(tokens)

    def loss_of(x):
        return nn.functional.cross_entropy(model(embed=x), labels)

    clean = loss_of(embed)  # DDP now waits for a backward pass, and the ascent's must not be taken for it
    found = perturbation(
        loss_of, embed, num_steps=num_steps, step_size=0.5, epsilon=0.4, noise_var=0.1, norm=l2_norm,
        scale="absolute", generator=generator, backend="torch", accumulate=True,
    )  # fmt: skip
    (clean + loss_of(found.perturbed) / (num_steps + 1)).backward()


@check
def ddp_accumulated(rank, world):
    """The mean over processes of what each has accumulated and gets from its last pass, once."""
    for num_steps, options in itertools.product(ASCENTS, ({}, {"gradient_as_bucket_view": True})):
        model = DistributedDataParallel(build(Net), **options)
        free(model, *share(rank, world, 0), num_steps)
        compare(model, accumulated(0, num_steps))


@check
def ddp_inside(rank, world):
    for num_steps, options in itertools.product(ASCENTS, DDP_MODES):
        train(DistributedDataParallel(build(Inside), **options), inside, rank, world, num_steps)


@check
def ddp_around(rank, world):
    for num_steps, options in itertools.product(ASCENTS, DDP_MODES):
        train(DistributedDataParallel(build(Net), **options), around, rank, world, num_steps)


@check
def ddp_fisher(rank, world):
    for options in DDP_MODES[:2]:
        train(DistributedDataParallel(build(Inside), **options), inside, rank, world, FISHER)
        train(DistributedDataParallel(build(Net), **options), around, rank, world, FISHER)
    train(DistributedDataParallel(build(Inside), static_graph=True), inside, rank, world, FISHER)
    model = DistributedDataParallel(build(Net), static_graph=True)
    with pytest.raises(RuntimeError, match="goes backward through the state"):
        around(model, *share(rank, world, 0), FISHER)


class Holder:
    def __init__(self, model):
        self.model = model

    def logits(self, embed):
        return self.model(embed=embed)

    def __call__(self, embed):
        return self.logits(embed)


MODEL = None


def call_global(embed):
    def inner():
        return MODEL(embed=embed)

    return inner()


@check
def ddp_is_found(rank, world):
    """However ``eval_fn`` gets at it: a static graph shows when it is not."""

    def of_a_global(model):
        globals()["MODEL"] = model
        return call_global

    def of_a_closure(model):
        holder = Holder(model)
        return lambda embed: holder.logits(embed)

    ways = (lambda model: functools.partial(model, None), Holder, lambda model: Holder(model).logits)
    for way in (*ways, of_a_closure, of_a_global):
        model = DistributedDataParallel(build(Net), static_graph=True)
        eval_fn = way(model)
        train(
            model,
            lambda model, tokens, *rest, eval_fn=eval_fn: objective(eval_fn, model.module.words(tokens), *rest),
            rank, world, 1,
        )  # fmt: skip


@check
def ddp_out_of_reach(rank, world):
    """A static graph that cannot be found is an error, another DDP no harm."""
    for options in DDP_MODES:
        model = DistributedDataParallel(build(Net), **options)
        out_of_reach = {"deep": [Holder(model)]}

        def loss_of(model, tokens, *rest, out_of_reach=out_of_reach):
            return objective(lambda embed: out_of_reach["deep"][0](embed), model.module.words(tokens), *rest)

        if "static_graph" in options:
            with pytest.raises(RuntimeError, match=r"static_graph=True .* cannot find.* pass its \.module"):
                loss_of(model, *share(rank, world, 0), 1)
        else:
            train(model, loss_of, rank, world, 1)


@check
def ddp_compiled(rank, world):
    """A compiled DDP, a DDP of a compiled module; a compiled loss of a DDP leaves its ascent to eager mode."""
    for how in ("outside", "within", "loss"):
        torch._dynamo.reset()
        net = build(Net)
        ddp = DistributedDataParallel(
            torch.compile(net, backend="eager") if how == "within" else net, static_graph=True
        )
        called = torch.compile(ddp, backend="eager") if how == "outside" else ddp
        for step in range(TRAINING):
            tokens, labels, generator = share(rank, world, step)
            embed = net.words(tokens)
            logits = called(embed=embed)
            smart = regularizer(functools.partial(called, None), 1, generator)
            if how == "loss":
                smart.generator = None
                torch._dynamo.reset()
                with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the module, not the loss"):
                    torch.compile(smart, backend="eager", fullgraph=True)(embed, logits)
                torch.set_rng_state(generator.get_state())
                smart = torch.compile(smart, backend="eager")
            (nn.functional.cross_entropy(logits, labels) + smart(embed, logits)).backward()
            compare(net, reference(1)[step])
            descend(net)


@check
def ddp_is_left_as_it_was(rank, world):
    model = DistributedDataParallel(build(Net))
    before = dict(vars(model))
    for fails in (False, True):

        def loss_fn(x, t, fails=fails):
            assert not fails, "on purpose"
            return (x - t).square().sum() + x.sum()

        smart = SMARTLoss(lambda embed: model(embed=embed), loss_fn)
        embed = model.module.words(share(rank, world, 0)[0])
        if fails:
            with pytest.raises(AssertionError, match="on purpose"):
                smart(embed, model(embed=embed))
        else:
            smart(embed, model(embed=embed)).backward()
        assert vars(model).keys() == before.keys()
        assert "forward" not in vars(model)


@check
def ddp_checkpoints(rank, world):
    for reentrant, loss_of in itertools.product((False, True), (inside, around)):
        kind = Inside if loss_of is inside else Net
        # Reentrant checkpoints used twice in one backward pass need a static graph, with SMART or without.
        model = DistributedDataParallel(build(kind, reentrant), static_graph=reentrant)
        train(model, loss_of, rank, world, 1)


@check
def ddp_accumulation(rank, world):
    for options, loss_of in itertools.product(DDP_MODES[:2], (inside, around)):
        model = DistributedDataParallel(build(Inside if loss_of is inside else Net), **options)
        train_accumulating(model, loss_of, rank, world, DistributedDataParallel.no_sync)


# --- FSDP2 ---

FSDP_MODES = (
    {},
    {"reshard_after_forward": False},
    {"reshard_after_forward": True},
    {"each_block": False},
)


def shard(model, each_block=True, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks if each_block else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@check
def fsdp_inside(rank, world):
    for num_steps, options in itertools.product((*ASCENTS, FISHER), FSDP_MODES):
        train(shard(build(Inside), **options), inside, rank, world, num_steps)


class WithEmbedding(Net):
    """The embedding is an output of the root's forward pass."""

    def forward(self, tokens=None, embed=None):
        embed = self.words(tokens) if embed is None else embed
        return super().forward(embed=embed), embed + 0.0


def around_root(model, tokens, labels, generator, num_steps):
    logits, embed = model(tokens)
    smart = regularizer(lambda embed: model(embed=embed)[0], num_steps, generator)
    return nn.functional.cross_entropy(logits, labels) + smart(embed, logits)


@check
def fsdp_around(rank, world):
    for num_steps, options in itertools.product(ASCENTS, FSDP_MODES):
        train(shard(build(WithEmbedding), **options), around_root, rank, world, num_steps)


@check
def fsdp_around_what_follows_the_embedding(rank, world):
    """The words are a root of their own."""
    for num_steps, options in itertools.product((*ASCENTS, FISHER), FSDP_MODES):
        body = build(Net)
        words, body.words = body.words, None
        words, body = fully_shard(words, mesh=init_device_mesh("cpu", (world,))), shard(body, **options)
        for step in range(TRAINING):
            tokens, *rest = share(rank, world, step)
            objective(lambda embed, body=body: body(embed=embed), words(tokens), *rest, num_steps).backward()
            expected = dict(reference(num_steps)[step])
            compare(words, {"weight": expected.pop("words.weight")})
            compare(body, expected)
            descend(words, body)


class OnItsBody(nn.Module):
    """``eval_fn`` is a sharded part and knows nothing of the root, whose forward pass is under way."""

    def __init__(self):
        super().__init__()
        self.body = Net()
        self.words, self.body.words = self.body.words, None

    def forward(self, tokens, labels, generator, num_steps):
        embed, eval_fn = self.words(tokens), functools.partial(self.body, None)
        smoothness = regularizer(eval_fn, num_steps, generator)(embed, eval_fn(embed))
        return nn.functional.cross_entropy(eval_fn(self.words(tokens)), labels) + smoothness


@check
def fsdp_inside_on_a_part(rank, world):
    for num_steps, options in itertools.product(ASCENTS, FSDP_MODES):
        model = build(OnItsBody)
        shard(model.body, **options)
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        for step in range(TRAINING):
            model(*share(rank, world, step), num_steps).backward()
            expected = {f"body.{name}": grad for name, grad in reference(num_steps)[step].items()}
            expected["words.weight"] = expected.pop("body.words.weight")
            compare(model, expected)
            descend(model)


class WithoutSync:
    """`no_sync` of FSDP2."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_):
        self.model.set_requires_gradient_sync(True)


@check
def fsdp_accumulation(rank, world):
    for kind, loss_of in ((Inside, inside), (WithEmbedding, around_root)):
        train_accumulating(shard(build(kind)), loss_of, rank, world, WithoutSync)


@check
def fsdp_checkpoints(rank, world):
    for kind, loss_of in ((Inside, inside), (WithEmbedding, around_root)):
        train(shard(build(kind, False)), loss_of, rank, world, 1)


def settings(model):
    """What FSDP2 remembers of its modules."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    names = ("_training_state", "_sharded_state", "reduce_grads", "all_reduce_grads", "reshard_after_backward")
    return [
        (
            state._training_state, state._state_ctx.is_last_backward, state._state_ctx.iter_forward_root,
            *(getattr(group, name) for group in state._fsdp_param_groups for name in names),
        )
        for state in states
    ]  # fmt: skip


@check
def fsdp_is_left_as_it_was(rank, world):
    model = shard(build(Inside))
    model(*share(rank, world, 0), 0).backward()
    between = settings(model)
    model(*share(rank, world, 0), 2).backward()
    assert settings(model) == between
    model.zero_grad()  # not after the evaluation, which leaves the root with its whole parameters
    with torch.no_grad():
        value = model(*share(rank, world, 0), 2)
    dist.all_reduce(value, dist.ReduceOp.SUM)
    torch.testing.assert_close(value / world, around(build(Net), *batch(0), 2).detach(), rtol=1e-10, atol=0)
    model(*share(rank, world, 0), 1).backward()
    compare(model, reference(1)[0])
    assert settings(model) == between


@check
def fsdp_within_a_forward_pass(rank, world):
    """The last pass meets what the clean one met: modules under way, and the order that prefetches follow."""
    model, seen = shard(build(Inside)), []

    def eval_fn(embed):
        order = model._get_fsdp_state()._comm_ctx.post_forward_order
        seen.append((settings(model), len(order)))
        return Net.forward(model, embed=embed)

    model.eval_fn = eval_fn
    model(*share(rank, world, 0), 2).backward()
    (clean, _), *_, (last, order) = seen
    assert len(seen) == 4
    assert [each[:3] for each in last] == [each[:3] for each in clean]
    assert last[0] == clean[0]  # the root
    assert order == 3 * len(model.blocks)
    compare(model, reference(2)[0])


@check
def fsdp_ascents_reduce_nothing(rank, world):
    """Nor what an accumulated batch left."""
    model = shard(build(Inside))
    with WithoutSync(model):
        model(*share(rank, world, 0), 0).backward()
    model(*share(rank, world, 0), 1)
    assert all(isinstance(each, DTensor) and each.grad is None for each in model.blocks.parameters())


# --- Tensor parallelism, state dicts ---


@check
def tensor_parallel_noise(rank, world):
    """One generator seed in a group: the perturbed embeddings have the same bits, whatever the global generators do."""
    mesh = init_device_mesh("cpu", (world,))
    backends = [name for name in ("torch", "native") if available_backends()[name] is None]
    for backend, num_steps, dtype in itertools.product(backends, (0, *ASCENTS), (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES)).to(dtype)
        parallelize_module(body, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        embed = torch.randn(ROWS, LENGTH, WIDTH).to(dtype)
        torch.manual_seed(rank)
        seen = []

        def eval_fn(embed, body=body, seen=seen):
            seen.append(embed.detach().clone())
            return body(embed)

        generator = torch.Generator().manual_seed(5)
        smart = SMARTLoss(eval_fn, sym_kl_loss, num_steps=num_steps, backend=backend, generator=generator,
                          step_size=0.5, noise_var=0.1, update="sift")  # fmt: skip
        smart(embed, body(embed)).backward()
        assert len(seen) == num_steps + 1
        for each in seen:
            assert not torch.equal(each, embed)
            everywhere = [torch.empty_like(each) for _ in range(world)]
            dist.all_gather(everywhere, each)
            assert all(torch.equal(other, each) for other in everywhere)


@check
def state_dict_keys(rank, world):
    from smart_pytorch import SMARTLoss as Theirs

    for model in (DistributedDataParallel(build(Net)), shard(build(Net))):
        ours = SMARTLoss(model, sym_kl_loss)
        assert list(ours.state_dict()) == list(Theirs(model, sym_kl_loss).state_dict())
        embed = torch.ones(2, LENGTH, WIDTH, dtype=torch.float64)
        ours.eval_fn = model
        SMARTLoss(functools.partial(model, None), sym_kl_loss)(embed, model(embed=embed))
        assert list(ours.state_dict()) == list(Theirs(model, sym_kl_loss).state_dict())


if __name__ == "__main__":
    launch(CHECKS)
