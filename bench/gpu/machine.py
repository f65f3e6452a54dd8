"""Stage "machine": versions, clocks, and the two ceilings that every other figure is held against."""

from __future__ import annotations

import shutil
import subprocess

import torch

from bench.measure import copy_bandwidth, gemm_rate
from bench.report import environment

from .lines import device, dry_run, emit

CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,memory.total"


def main() -> int:
    where = device()
    emit("machine", "versions", ok=True, environment=environment(where))
    if not dry_run():
        emit("machine", "device", ok=True, **_properties())
    emit("machine", "tools", ok=True, **{tool: bool(shutil.which(tool)) for tool in ("nvcc", "compute-sanitizer")})
    _clocks("before")
    size = 1 << (22 if dry_run() else 32)
    emit("machine", "copy", ok=True, bytes_per_second=copy_bandwidth(where, size), size=size)
    for dtype in (torch.bfloat16, torch.float32)[: 1 if dry_run() else 2]:
        emit(
            "machine",
            f"GEMM {str(dtype).removeprefix('torch.')}",
            ok=True,
            flops_per_second=gemm_rate(where, dtype, 64 if dry_run() else None),
        )
    _clocks("after")
    return 0


def _properties() -> dict[str, object]:
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "shared_memory": found.shared_memory_per_block_optin,
        "cuda": torch.version.cuda,
    }


def _clocks(when: str) -> None:
    """As nvidia-smi reads them; nothing is set."""
    try:
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        read = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        emit("skipped", f"clocks {when}", error="nvidia-smi does not answer")
        return
    emit("machine", f"clocks {when}", ok=True, **dict(zip(CLOCKS.split(","), read.split(", "), strict=False)))


if __name__ == "__main__":
    raise SystemExit(main())
