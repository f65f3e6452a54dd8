"""Vocabularies sharded over 2 and 4 processes (gloo) against one process in float64."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import ROOT, run_python

WORKER = Path(__file__).with_name("parallel_worker.py")
CHECKS = [
    node.name
    for node in ast.parse(WORKER.read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(each, "id", "") == "check" for each in node.decorator_list)
]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without torch.distributed or gloo"
)


@functools.cache
def results(world: int, directory: Path) -> list[dict[str, str]]:
    directory = directory / f"world-{world}"
    directory.mkdir()
    done = run_python([str(WORKER), str(world), str(directory)], cwd=ROOT)
    files = [directory / f"{rank}.json" for rank in range(world)]
    assert all(file.is_file() for file in files), done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_vocabulary(world: int, check: str, directory: Path) -> None:
    for rank, found in enumerate(results(world, directory)):
        assert not found[check], f"process {rank} of {world}:\n{found[check]}"
