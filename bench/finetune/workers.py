"""``python -m bench finetune`` in several processes on one GPU, on a machine that can fetch nothing.

    python -m bench.finetune.workers --pack       here: pack what is carried; prints what to carry and the call
    python bench/gpu_check.py --stage finetune    there: runs until its time is up; more of them go on from its lines

A model of 22M parameters keeps no GPU busy: several share it. Costs are measured by one process alone, at the end.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

from . import data

PROCESSES, COSTS_SECONDS = 8, 60
KEPT = "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"


def pack() -> pathlib.Path:
    """Sentences and tokenizer as they are, weights rounded to float16, laid out as the cache is."""
    import torch
    from safetensors.torch import load_file, save_file

    source, carried = data.encoder_folder(), data.CARRIED
    target = carried / source.relative_to(data.CACHE)
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(source / name, target / name)
    weights = load_file(source / "model.safetensors")
    halves = {name: each.half() if each.dtype == torch.float32 else each for name, each in weights.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(data.fetch(data.SENTENCES), carried / data.SENTENCES.file)
    return carried


def work(processes: int, limit: float) -> int:
    """As many runs as start within ``limit`` seconds."""
    folder = pathlib.Path(os.environ.get("OUT") or data.CACHE.with_name("gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    lines = ["--json", str(folder / "finetune.jsonl")]
    command = [sys.executable, "-m", "bench", "finetune", *lines]
    working = [*command, "--cases", '"stage"', "--limit", str(max(limit - COSTS_SECONDS, 1))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(working, env=environment) for _ in range(processes)]
    codes = [each.wait() for each in running]
    if end - time.monotonic() > COSTS_SECONDS / 4:
        codes.append(subprocess.run([*command, "--cases", "costs"], env=environment).returncode)
    return max(codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--limit", type=float, default=440, help="seconds; the stage has a few more")
    options = parser.parse_args()
    if not options.pack:
        return work(options.processes, options.limit)
    carried = pack()
    size = sum(each.stat().st_size for each in carried.rglob("*") if each.is_file())
    name = carried.relative_to(data.CACHE.parents[2])
    print(f"carry: ['{name}'] ({size / 2**20:.1f} MiB)\ncommand: python3 bench/gpu_check.py --stage finetune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
