"""The whole GPU check in one call of at most 500 seconds on a bare machine, and a second of 300 that repeats.

    python bench/gpu_check.py --prepare          here: compile what is carried; print what to carry and the call
    python bench/gpu_check.py                    there: every stage in turn
    python bench/gpu_check.py --after [LINES]    there: what failed or was cut in an earlier run, and the sweep
    python bench/gpu_check.py --stage NAME ...   there: these stages alone
    python bench/gpu_check.py --dry-run          anywhere: every stage on a CPU, tiny shapes, kernels interpreted
    python bench/gpu_check.py --estimate         here: compile the listed Triton kernels for sm_90, count the seconds

Every result is a JSON line in gpu_check.jsonl the moment it exists, in $OUT or bench/out/gpu; output.txt has what the
stages printed, summary.txt the tables, junit.xml the tests. Lines that are committed as bench/results/gpu-*.jsonl make
the docs' section (`python -m bench report`). A stage that is cut has lost nothing; the line about it says so.
Needs torch, triton and pytest, and nvcc and ninja for the native backend. Exit status: 1 if any stage did not end well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "bench"):  # run as a file: our modules' names are not top-level ones
    sys.path[0] = str(ROOT)

from bench.gpu import lines, prepare, stages, summary  # noqa: E402

FOLDER = ROOT / "bench" / "out" / "gpu"
CALL_SECONDS = 40  # what a call may take beside its stages: unpacking, first reads from the disk


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python bench/gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--stage", action="append", metavar="NAME", help="run this stage alone (may be given again)")
    made.add_argument(
        "--after", nargs="?", type=pathlib.Path, const=FOLDER / "gpu_check.jsonl", metavar="LINES",
        help="the lines of an earlier run: repeat what failed or was cut, then sweep three launch choices",
    )  # fmt: skip
    made.add_argument("--dry-run", action="store_true", help="on a CPU, in a minute: shows that every stage runs")
    made.add_argument("--prepare", action="store_true", help="compile what is carried, print what and the call")
    made.add_argument("--estimate", action="store_true", help="what compiling the listed Triton kernels costs")
    made.add_argument("--commit", help="what the figures are of (default: as git describes it)")
    made.add_argument("--list", action="store_true", help="print the stages and run nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    commit = options.commit or described()
    if options.list:
        print(summary.plain("stages", ["stage", "seconds", ""], [[s.name, str(s.seconds), s.about] for s in _table()]))
        return 0
    if options.prepare:
        print("\n".join([*prepare.prepare(), call(commit)]))
        return 0
    if options.estimate:
        return estimate()
    limit: float = stages.LIMIT
    if options.stage:
        try:
            todo = stages.chosen(options.stage)
        except ValueError as error:
            parse.error(str(error))
    elif options.after is not None:
        previous = lines.read(options.after)
        if not previous:
            parse.error(f"--after {options.after}: no lines of an earlier run are there")
        todo, limit = stages.to_repeat(previous), stages.AFTER_LIMIT
    else:
        todo = list(stages.STAGES)
    folder = pathlib.Path(os.environ.get("OUT") or FOLDER)
    return check(todo, folder, limit, options.dry_run, commit)


def _table() -> tuple[stages.Stage, ...]:
    return (*stages.STAGES, stages.SWEEP, stages.FINETUNE)


def check(todo: list[stages.Stage], folder: pathlib.Path, limit: float, dry_run: bool, commit: str | None) -> int:
    """Run ``todo``, say how each ended, show the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_check.jsonl"
    earlier = len(lines.read(path))
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run with the tables of what was done
    well = True
    try:
        for line in stages.run(todo, folder, limit=limit, dry_run=dry_run, commit=commit):
            well = well and line["status"] == "ok"
            print(
                f"{time.monotonic() - start:6.1f} s  {line['what']}: {line['status']}, {line['seconds']} s", flush=True
            )
            if "tail" in line:
                print(line["tail"][-1200:], flush=True)
    except KeyboardInterrupt:
        well = False
        print("interrupted: what was measured is kept", flush=True)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        summary.show(lines.read(path)[earlier:])
    (folder / "summary.txt").write_text(shown.getvalue())
    print(shown.getvalue(), end="", flush=True)
    return 0 if well else 1


def estimate() -> int:
    """What "build" has to compile, in processor seconds of this machine."""
    import tempfile

    from bench.gpu.launches import seconds_on

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as cache:  # nothing is found in it
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "bench.gpu.build", "costs"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return done.returncode
    costs = [each["processor_seconds"] for each in map(lines.parse, done.stdout.splitlines()) if each]
    print(
        f"{len(costs)} specializations, {sum(costs):.0f} processor seconds here (the longest {max(costs):.1f}); "
        f"{seconds_on(16, costs):.0f} s on 16 such cores, of {_seconds('build')} s that the stage has"
    )
    return 0


def _seconds(name: str) -> int:
    return next(stage.seconds for stage in stages.STAGES if stage.name == name)


def call(commit: str | None) -> str:
    """What to carry and the exact command, for whoever calls the machine with the GPU."""
    given = f" --commit {commit}" if commit else ""
    carry = prepare.carried()
    size = sum(each.stat().st_size for top in carry for each in (ROOT / top).rglob("*") if each.is_file())
    return (
        f"carry: {carry} ({size / 2**20:.1f} MiB; first call)\n"
        f"command: python3 bench/gpu_check.py{given}\n"
        f"timeout_s: {stages.LIMIT + CALL_SECONDS}\n"
        "again, with the lines of the first call copied to bench/out/gpu and carried too:\n"
        f"carry: {[*carry, 'bench/out/gpu']}\n"
        f"command: python3 bench/gpu_check.py --after bench/out/gpu/gpu_check.jsonl{given}\n"
        f"timeout_s: {stages.AFTER_LIMIT + CALL_SECONDS}"
    )


def described() -> str | None:
    """The commit of this checkout; None where there is no git, as on a machine that got the files alone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
