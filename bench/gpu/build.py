"""Stage "build": what later stages run, compiled beforehand by all cores.

Triton kernels: those of launches.py, by processes that never touch the GPU. The native extension beside them: the
CUDA objects that were carried are linked to what needs torch's headers, which is compiled here; where they do not fit
these sources or do not load, everything is compiled here.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from . import lines, prepare
from .lines import dry_run, emit, why
from .shapes import shapes

CAPABILITY = 90  # where nvidia-smi does not say: the GPUs that are lent are of Hopper's generation
DRY_KERNELS = 2
_listed: list[Any] = []  # what the forked processes find here: launches cannot be sent to them


def main(arguments: list[str]) -> int:
    if arguments == ["native"]:
        return native()
    if arguments == ["triton"]:
        return triton()
    # Neither waits for the other, and the interpreter (of the dry run) and the compiler cannot share a process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    both = [
        subprocess.Popen([sys.executable, "-m", "bench.gpu.build", each], env=environment)
        for each in ("native", "triton")
    ]
    return max(abs(process.wait()) for process in both)


def native() -> int:
    from smart_fast import build as native_build

    start, objects = time.monotonic(), prepare.carried_objects()
    if dry_run():
        objects = []  # this extension has no CUDA part
    way, error = "compiled here", None
    if objects:
        try:
            with _linking(objects):
                module = native_build.build()
            way = f"{len(objects)} carried objects linked"
        except Exception as found:
            error, objects = why(found), []
            emit("build", "native, carried objects", backend="native", ok=False, error=error)
    if not objects:
        try:
            module = native_build.build()
        except Exception as found:
            emit("build", "native", backend="native", ok=False, error=why(found))
            return 1
    seconds = time.monotonic() - start
    emit("build", "native", backend="native", ok=True, seconds=seconds, way=way, **_plain(module.built_with()))
    return 0


def _plain(about: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(about).items() if isinstance(value, (bool, int, float, str))}


def _linking(objects: list[str]) -> Any:
    """`smart_fast.build` as it is, but given objects in the place of the sources that they were made of."""
    from torch.utils import cpp_extension

    load = cpp_extension.load

    def link(*, sources: list[str], **options: Any) -> Any:
        kept = [each for each in sources if not each.endswith(".cu")]
        return load(sources=kept, extra_ldflags=objects, **options)

    return mock.patch.object(cpp_extension, "load", link)


def triton() -> int:
    from . import launches

    launches.compile_elsewhere(_capability())
    listed = launches.listed(shapes())
    if dry_run():
        listed = listed[:DRY_KERNELS]
    _listed.extend(listed)
    cores, start = len(os.sched_getaffinity(0)), time.monotonic()
    emit("build", "Triton, to be compiled", backend="triton", ok=True, kernels=len(listed), processes=cores)
    # Forked: torch and Triton are imported once, and no process has touched the GPU.
    with multiprocessing.get_context("fork").Pool(min(cores, len(listed))) as pool:
        errors = list(filter(None, pool.imap_unordered(_compile, range(len(listed)))))
    seconds = time.monotonic() - start
    about = {"seconds": seconds, "kernels": len(listed), "error": "; ".join(errors)}
    emit("build", "Triton", backend="triton", ok=not errors, **about)
    return 1 if errors else 0


def _compile(index: int) -> str | None:
    from . import launches

    launch = _listed[index]
    before = processor_seconds()
    try:
        kernel = launches.compiled(launch)
        _launcher(kernel)
    except Exception as error:
        emit("build", launch.name, backend="triton", ok=False, error=why(error))
        return f"{launch.name}: {why(error)}"
    emit("build", launch.name, backend="triton", ok=True, processor_seconds=processor_seconds() - before)
    return None


def _launcher(kernel: Any) -> None:
    """The C function that packs a kernel's arguments: compiled by gcc at its first launch, cached beside the kernel.
    Where the driver's library is missing there is nothing to link it to, and nothing to launch."""
    if dry_run():
        return
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(kernel.src, kernel.metadata)


def processor_seconds() -> float:
    """Of this process and of the assemblers that it has run."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in used)


def _capability() -> int:
    """Asked of nvidia-smi, since a process that has touched the GPU cannot be forked."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        read = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
        return int(read.replace(".", ""))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return CAPABILITY


def costs() -> Iterator[tuple[str, float]]:
    """(kernel, processor seconds) of the whole list, compiled here and now for sm_90, nothing cached."""
    from . import launches
    from .shapes import FULL

    launches.compile_elsewhere(CAPABILITY)
    for launch in launches.listed(FULL):
        before = processor_seconds()
        launches.compiled(launch)
        yield launch.name, processor_seconds() - before


if __name__ == "__main__":
    if sys.argv[1:] == ["costs"]:
        for name, seconds in costs():
            lines.write({"kind": "cost", "what": name, "processor_seconds": seconds}, None)
        raise SystemExit(0)
    raise SystemExit(main(sys.argv[1:]))
