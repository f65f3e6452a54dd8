"""Checks of `SMARTTrainer` in 2 processes; `test_trainer_distributed.py` runs it.

``python trainer_worker.py WORLD DIRECTORY``: see `parallel_worker.py`.
"""

from __future__ import annotations

import os
import tempfile

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import SequentialSampler

from smart_fast.integrations.model import ModelRegularizer
from smart_fast.integrations.transformers import SMARTArguments, SMARTTrainer
from tests.parallel_worker import launch
from tests.test_integrations import HEADS, Watch, arguments, batch, rows_of

CHECKS = {}
# Without noise of its own, so that a process's share of a batch has the noise of the whole one: the ascent's direction.
SETTINGS = {"smart_ascent": "fisher", "smart_update": "paper", "smart_step_size": 0.1, "smart_epsilon": 0.1,
            "smart_noise_var": 0.0, "smart_backend": "torch", "smart_weight": 3.0}  # fmt: skip


def check(function):
    CHECKS[function.__name__] = function
    return function


def build():
    torch.manual_seed(0)
    return HEADS["next tokens"].model()


class InOrder(SMARTTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def gradients_of_trainer(rank, world, **settings):
    """Those of one step, with this process's share of eight rows."""
    # What torchrun would have said; the process group is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    folder, watch = tempfile.mkdtemp(), Watch()
    args = arguments(folder, per_device_train_batch_size=8 // world, **settings)
    rows = rows_of(batch(HEADS["next tokens"], 8))
    trainer = InOrder(build(), args, train_dataset=rows, callbacks=[watch], **SETTINGS)
    assert trainer.accelerator.num_processes == world
    trainer.train()
    return {name.removeprefix("module."): each for name, each in watch.gradients.items()}


def expected():
    """Of one process with all of the rows."""
    model, inputs = build().train(), batch(HEADS["next tokens"], 8)
    regularizer = ModelRegularizer(model, SMARTArguments(**SETTINGS))
    with regularizer.clean_pass():
        outputs = model(**inputs)
    labels = inputs.pop("labels")
    smooth = regularizer(lambda: model(**inputs), outputs, labels, inputs["attention_mask"])
    (outputs.loss + 3.0 * smooth.mean).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def compare(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@check
def ddp(rank, world):
    for unused in (False, True):
        compare(gradients_of_trainer(rank, world, ddp_find_unused_parameters=unused), expected())


@check
def fsdp2_mixed_precision_and_frozen_passes(rank, world):
    """The ascent's passes run with frozen parameters, after the clean one that initializes FSDP2. (FSDP2 itself does
    not bear parameters that are frozen in the first pass of all and trained later: torch 2.13, without SMART, too.)"""
    rows = batch(HEADS["next tokens"], 8)
    share = {name: each.chunk(world)[rank] for name, each in rows.items()}
    inputs = {name: each for name, each in share.items() if name != "labels"}
    mesh, found = init_device_mesh("cpu", (world,)), []
    half, logits = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=each) for each in (None, torch.float32)
    )
    for frozen in (False, True):
        settings = SMARTArguments(smart_recipe="recommended", smart_freeze_parameters=frozen, smart_backend="torch")
        model = build().train()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=half)
        fully_shard(model, mesh=mesh, mp_policy=logits)
        regularizer = ModelRegularizer(model, settings)
        with regularizer.clean_pass():
            outputs = model(**share)
        torch.manual_seed(rank)
        smooth = regularizer(lambda m=model: m(**inputs), outputs, share["labels"], share["attention_mask"])
        assert smooth.mean > 0, smooth
        (outputs.loss + 3.0 * smooth.mean).backward()
        found.append({name: each.grad.full_tensor() for name, each in model.named_parameters()})
    assert all(each.dtype == torch.float32 and each.isfinite().all() for each in found[1].values())
    compare(found[1], found[0])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    launch(CHECKS)
