"""Where the kernels run: on the GPU if there is one, else interpreted on the CPU.

TRITON_INTERPRET must be set before Triton is first imported, hence here.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # The interpreter computes in numpy; infinities and NaN are inputs here, not accidents.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel test runs: interpreted on the CPU, or compiled on the GPU. A process can only do one of them."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip(
            "kernels are compiled in this process; TRITON_INTERPRET=1 with CUDA_VISIBLE_DEVICES= interprets them"
        )
    return torch.device(request.param)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel outputs start as NaN: whatever is not written shows."""
    from smart_fast.backends import triton_ops

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    monkeypatch.setattr(triton_ops, "new_output", poisoned)
