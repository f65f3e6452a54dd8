"""Vocabularies sharded over 2 and 4 processes (gloo) against one process in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import checks_of, exhaustively, once, run_workers

WORKER = Path(__file__).with_name("parallel_worker.py")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without torch.distributed or gloo"
)


@pytest.mark.parametrize("check", checks_of(WORKER))
@pytest.mark.parametrize("world", [2, *exhaustively(4)])
def test_sharded_vocabulary(world: int, check: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    results = once(tmp_path_factory, f"parallel-{world}", lambda directory: run_workers(WORKER, world, directory))
    for rank, found in enumerate(results):
        assert not found[check], f"process {rank} of {world}:\n{found[check]}"
