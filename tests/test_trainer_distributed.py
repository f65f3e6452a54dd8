"""`SMARTTrainer` in 2 processes (gloo): DDP, and FSDP2 in mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import checks_of, once, run_workers

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

WORKER = Path(__file__).with_name("trainer_worker.py")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without torch.distributed or gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return once(tmp_path_factory, "trainer", lambda directory: run_workers(WORKER, 2, directory))


@pytest.mark.exhaustive
@pytest.mark.parametrize("check", checks_of(WORKER))
def test_distributed(check: str, results: list[dict[str, str]]) -> None:
    for rank, found in enumerate(results):
        assert not found[check], f"process {rank} of 2:\n{found[check]}"
