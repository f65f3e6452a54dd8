"""DDP, FSDP2 and tensor parallelism in 2 processes (gloo): the gradients are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import checks_of, exhaustively, once, run_workers

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without torch.distributed or gloo"
)


ONE_OF_EACH = ["the_regularizer_matters", "ddp_inside", "ddp_around", "fsdp_inside", "fsdp_around", "state_dict_keys"]
REST = [each for each in checks_of(WORKER) if each not in ONE_OF_EACH]


@pytest.mark.parametrize("check", [*ONE_OF_EACH, *exhaustively(*REST)])
def test_distributed(check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    name, checks = ("distributed", ONE_OF_EACH) if check in ONE_OF_EACH else ("distributed-rest", REST)
    for rank, found in enumerate(once(tmp_path_factory, name, lambda made: run_workers(WORKER, 2, made, checks))):
        assert not found[check], f"process {rank} of 2:\n{found[check]}"
