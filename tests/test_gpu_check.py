"""`bench/gpu_check.py`: rehearsed on this CPU, cut in the middle, repeated; what it compiles ahead; its section."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for package in ("smart_pytorch", "transformers", "rich"):
    pytest.importorskip(package, reason=f"the bench needs {package}")

from bench import gpu_check, readme  # noqa: E402
from bench.gpu import chosen_tests, lines, prepare, rivals, section, stages, summary  # noqa: E402
from bench.gpu.stages import STAGES, SWEEP, Stage  # noqa: E402
from tests.helpers import once  # noqa: E402

A_MINUTE = 180  # processor seconds of the dry run: a minute of two cores, which are slower where tests share them


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "GPU_CHECK"))}
    environment |= {"PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


# ---- the dry run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(native, tmp_path_factory):
    """``(what the command printed, the folder, its processor seconds)``."""

    def rehearse(folder: Path) -> tuple[str, str, float, str]:
        before = processor_seconds()
        done = python("bench/gpu_check.py", "--dry-run", "--commit", "abc", OUT=str(folder))
        wrong = "" if done.returncode == 0 else done.stdout[-5000:] + done.stderr
        return done.stdout, str(folder), processor_seconds() - before, wrong

    printed, folder, seconds, wrong = once(tmp_path_factory, "dry-run", rehearse)
    assert not wrong, wrong
    return printed, Path(folder), seconds


@pytest.mark.exhaustive
def test_every_stage_leaves_lines(rehearsed):
    printed, folder, _ = rehearsed
    found = lines.read(folder / "gpu_check.jsonl")
    ended = {line["what"] for line in found if line["kind"] == "stage"}
    assert ended == {stage.name for stage in STAGES}
    for stage in STAGES:
        mine = [line for line in found if line["stage"] == stage.name]
        assert mine[-1]["kind"] == "stage"
        assert mine[-1]["status"] == "ok"
        assert mine[-1]["lines"] == len(mine) - 1 >= 3
        assert any(line["kind"] not in ("stage", "skipped") for line in mine), stage.name
        assert stage.name in printed
    assert all(line["dry_run"] for line in found)
    assert not lines.failed(found)
    assert {line["commit"] for line in found} == {"abc"}
    assert str(ROOT) not in (folder / "gpu_check.jsonl").read_text()


@pytest.mark.exhaustive
def test_the_dry_run_does_what_a_run_does(rehearsed):
    """Near and far rows, both backends, a compiled rival, a whole step: on tiny shapes."""
    found = lines.read(rehearsed[1] / "gpu_check.jsonl")
    kernels = summary.kernel_lines(found)
    pairs = {(line["backend"], line["regime"]) for line in kernels}
    assert pairs == {(name, regime) for name in ("triton", "native") for regime in (None, "near", "far")}
    assert all(line["seconds"] > 0 and line["copy_share"] > 0 and line["bytes"] > 0 for line in kernels)
    calls = [line for line in found if line["kind"] == "rival"]
    assert {line["contestant"] for line in calls} == {
        rivals.EAGER, rivals.COMPILED, "smart-fast triton", "smart-fast native",
    }  # fmt: skip
    assert {line["backend"] for line in found if line["kind"] == "host"} >= {"smart-pytorch", "triton", "native"}
    assert any(line["contestant"] == "smart-fast native" for line in found if line["kind"] == "step")
    assert sum(line["kind"] == "test" and line["ok"] for line in found) == chosen_tests.DRY_TESTS
    assert any(line["kind"] == "build" and line["what"].endswith("_kernel") for line in found)


@pytest.mark.exhaustive
def test_the_dry_run_takes_a_minute_and_few_files(rehearsed):
    _, folder, seconds = rehearsed
    assert seconds < A_MINUTE
    files = [each for each in folder.rglob("*") if each.is_file()]
    assert len(files) <= 8
    assert {each.name for each in files} == {"gpu_check.jsonl", "output.txt", "summary.txt", "junit.xml"}
    assert "share of a copy" in (folder / "summary.txt").read_text()


# ---- the runner ------------------------------------------------------------------------------------------------------


def script(name: str, code: str, seconds: int = 30) -> Stage:
    return Stage(name, seconds, ("-c", code), "")


WRITES = (
    "import os; from bench.gpu import lines; "
    "lines.write({'kind': 'x', 'stage': %r, 'what': %r}, os.environ[lines.FILE])"
)


def test_a_stage_that_is_cut_leaves_its_lines(tmp_path):
    first, then = WRITES % ("slow", "before"), WRITES % ("slow", "never")
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    slow = script("slow", f"{first}; {child}; print('so far', flush=True); import time; time.sleep(99); {then}", 4)
    after = script("after", WRITES % ("after", "still run"))
    found = list(stages.run([slow, after], tmp_path, limit=100))
    assert [(line["status"], line["ok"]) for line in found] == [("cut", False), ("ok", True)]
    assert "so far" in found[0]["tail"]
    assert 3.5 < found[0]["seconds"] < 20
    written = lines.read(tmp_path / "gpu_check.jsonl")
    assert [line["what"] for line in written] == ["before", "slow", "still run", "after"]
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert "time.sleep(99)" not in alive


def test_a_stage_that_fails_says_why(tmp_path):
    bad = script("bad", "raise SystemExit('no device')")
    (line,) = stages.run([bad], tmp_path, limit=100)
    assert line["status"] == "failed"
    assert "no device" in line["tail"]
    assert "no device" in (tmp_path / "output.txt").read_text()


def test_what_no_time_is_left_for_is_said(tmp_path):
    found = list(stages.run([script("first", "import time; time.sleep(2)"), script("late", "pass")], tmp_path, limit=4))
    assert [line["status"] for line in found] == ["ok", "left out"]
    assert lines.read(tmp_path / "gpu_check.jsonl")[-1]["what"] == "late"


def test_a_line_that_was_cut_in_the_middle_is_passed_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"kind": "x", "what": "whole"}\n{"kind": "x", "wh')
    assert [line["what"] for line in lines.read(path)] == ["whole"]


def test_the_budgets_fit_their_calls():
    assert sum(stage.seconds for stage in STAGES) <= stages.LIMIT == 500
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    build = next(stage.seconds for stage in STAGES if stage.name == "build")
    assert build + SWEEP.seconds < stages.AFTER_LIMIT == 300
    assert max(stage.seconds for stage in STAGES) + build + SWEEP.seconds <= stages.AFTER_LIMIT


def ended(**status: str) -> list[lines.Line]:
    return [{"kind": "stage", "what": name.replace("_", "-"), "status": each} for name, each in status.items()]


def test_after_repeats_what_did_not_end_well():
    well = ended(**{stage.name.replace("-", "_"): "ok" for stage in STAGES})
    assert [stage.name for stage in stages.to_repeat(well)] == ["build", "sweep"]
    previous = well + ended(host="cut", kernels_native="failed", tests="left out", rivals="failed") + ended(rivals="ok")
    assert [stage.name for stage in stages.to_repeat(previous)] == ["build", "kernels-native", "host", "tests", "sweep"]
    never_reached = [line for line in well if line["what"] != "bert"]
    assert [stage.name for stage in stages.to_repeat(never_reached)] == ["build", "bert", "sweep"]


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Calls of `gpu_check.check`, which is not made."""
    seen: list[tuple] = []
    monkeypatch.setattr(gpu_check, "check", lambda *given: seen.append(given) or 0)
    monkeypatch.setenv("OUT", str(tmp_path))
    return seen


def test_stages_by_name(checked, capsys):
    assert gpu_check.main(["--stage", "kernels", "--stage", "bert", "--dry-run"]) == 0
    (todo, *_), *_ = checked
    assert [stage.name for stage in todo] == ["kernels-triton", "kernels-native", "bert"]
    with pytest.raises(SystemExit):
        gpu_check.main(["--stage", "kernel"])
    assert "no stage 'kernel': choose from machine, smoke-triton" in capsys.readouterr().err


def test_after_reads_the_lines_that_it_is_given(checked, tmp_path, capsys):
    path = tmp_path / "earlier.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ended(**{"machine": "ok", "host": "cut"})))
    assert gpu_check.main(["--after", str(path)]) == 0
    todo, _, limit, *_ = checked[0]
    assert [stage.name for stage in todo][-2:] == ["bert", "sweep"]
    assert "machine" not in [stage.name for stage in todo]
    assert limit == 300
    with pytest.raises(SystemExit):
        gpu_check.main(["--after", str(tmp_path / "none.jsonl")])
    assert "no lines of an earlier run" in capsys.readouterr().err


def test_a_backend_whose_smoke_test_went_wrong_is_left_out_of_shared_processes(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    monkeypatch.setenv(lines.FILE, str(path))
    assert lines.not_sound("native") is None
    for line in ended(smoke_native="failed", smoke_triton="ok"):
        lines.write(line, path)
    assert lines.not_sound("native") == "its smoke test was failed"
    assert lines.not_sound("triton") is None


def test_without_a_gpu_a_stage_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = python("bench/gpu_check.py", "--stage", "machine", OUT=str(tmp_path))
    assert done.returncode == 1
    assert "no GPU is visible to torch" in lines.read(tmp_path / "gpu_check.jsonl")[-1]["tail"]


# ---- what is compiled ahead, what is carried, what is chosen ---------------------------------------------------------

SAME_KEYS = """
import os, pathlib, torch
from bench.gpu import launches
from bench.gpu.shapes import FP32, FULL, TINY, BF16
launches.compile_elsewhere(90)
cached = lambda: len(list(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))
pick = lambda found: [each for each in found if each.name in ("perturb_kernel", "divergence_backward_kernel")][:4]
shapes = TINY._replace(logits=((4, 9000),), dtypes=(BF16,))
for device in ("meta", "cpu"):  # addresses, sizes and strides of tensors that hold numbers
    for each in pick(launches.listed(shapes, torch.device(device))):
        launches.compiled(each)
    print(device, cached())
print("listed", len(launches.listed(FULL)))
"""


@pytest.mark.exhaustive
def test_a_launch_finds_what_was_compiled_for_meta_tensors(tmp_path):
    done = python("-c", SAME_KEYS, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    counted = dict(line.split() for line in done.stdout.splitlines())
    assert counted["meta"] == counted["cpu"] == "4"
    assert 60 <= int(counted["listed"]) <= 100


def test_objects_are_carried_for_their_own_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    names = [f"{each.stem}.o" for each in prepare.CUDA.glob("*.cu")]
    assert len(names) > 3
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert prepare.carried_objects() == []  # nothing says of what they were made
    (tmp_path / prepare.DIGEST).write_text(prepare.digest())
    assert sorted(map(os.path.basename, prepare.carried_objects())) == sorted(names)
    (tmp_path / names[0]).unlink()
    assert prepare.carried_objects() == []
    (tmp_path / names[0]).write_bytes(b"")
    (tmp_path / prepare.DIGEST).write_text("other sources")
    assert prepare.carried_objects() == []


def test_carried_objects_take_the_place_of_their_sources(monkeypatch):
    from torch.utils import cpp_extension

    from bench.gpu import build

    seen = {}
    monkeypatch.setattr(cpp_extension, "load", lambda **options: seen.update(options))
    with build._linking(["a.o"]):
        cpp_extension.load(name="x", sources=["a.cu", "b.cpp"], with_cuda=True)
    assert seen == {"name": "x", "sources": ["b.cpp"], "extra_ldflags": ["a.o"], "with_cuda": True}


def test_the_call_is_printed_with_what_it_carries(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "FOLDER", ROOT / "bench" / "gpu")
    monkeypatch.setattr(prepare, "DEPS", tmp_path / "none")
    text = gpu_check.call("abc")
    assert re.search(r"carry: \['bench/gpu'\] \(0\.\d MiB", text)
    assert "command: python3 bench/gpu_check.py --commit abc\n" in text
    assert int(re.search(r"timeout_s: (\d+)", text)[1]) <= 600


def item(name: str, kernels: str | None = None, file: str = "test_x.py") -> SimpleNamespace:
    call = SimpleNamespace(params={} if kernels is None else {"kernels": kernels})
    return SimpleNamespace(originalname=name, name=name, path=Path(file), callspec=call)


def test_of_a_test_function_the_last_parameters_are_chosen():
    first, last, other = item("test_a", "triton-cuda"), item("test_a", "triton-cuda"), item("test_a", "native-cuda")
    alone, left_out = item("test_graph"), item("test_traced", "triton-cuda")
    elsewhere = item("test_a", "triton-cuda", "test_y.py")
    chosen = chosen_tests.choose([first, other, last, alone, left_out, elsewhere], ("native-cuda", "triton-cuda"))
    assert chosen == [alone, other, last, elsewhere]


@pytest.mark.exhaustive
def test_about_120_tests_are_chosen():
    files = [f"tests/{each}.py" for each in chosen_tests.FILES]
    command = ["-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "bench.gpu.chosen_tests", *files]
    done = python(*command)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert 100 <= len(found) <= 140, done.stdout[-2000:]
    assert sum("native-cuda" in each for each in found) == sum("triton-cuda" in each for each in found) > 40
    names = {each.partition("::")[2].partition("[")[0] for each in found}
    assert names >= {"test_device_graph_replays_draw_fresh_noise", "test_no_synchronization", "test_projections"}
    assert not names & set(chosen_tests.LEFT_OUT)
    known = "".join((ROOT / each).read_text() for each in files)
    assert not [each for each in chosen_tests.LEFT_OUT if f"def {each}(" not in known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_is_smart_pytorchs(dtype):
    import smart_pytorch

    results = []
    for loss in (rivals.sym_kl, smart_pytorch.sym_kl_loss):
        torch.manual_seed(0)
        leaves = [torch.randn(7, 50).to(dtype).requires_grad_() for _ in range(2)]
        results.append(rivals.step(loss)(*leaves))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---- the README's section --------------------------------------------------------------------------------------------

RUN = [
    {"kind": "machine", "stage": "machine", "what": "copy", "ok": True, "device": "A GPU", "commit": "abc"},
    *(
        {
            "kind": "kernel", "what": "kl forward", "kernel": "kl forward", "ok": True, "backend": "triton",
            "shape": [8192, 32000], "dtype": "bfloat16", "regime": regime, "seconds": seconds, "copy_share": share,
            "copy_rate": 3e12, "device": "A GPU", "commit": "abc",
        }
        for regime, seconds, share in (("far", 5e-4, 0.7), ("near", 4e-4, 0.875), ("near", 3.5e-4, 0.999))
    ),
    {
        "kind": "rival", "what": "sym_kl, near", "contestant": "formula, eager", "ok": True, "seconds": 2e-2,
        "share": 0.051, "errors": {"loss": 12.0}, "commit": "abc",
    },
    {
        "kind": "rival", "what": "sym_kl, near", "contestant": "smart-fast triton", "ok": True, "seconds": 2e-3,
        "share": 0.51, "speed": 10.0, "errors": {"loss": 1e-7}, "commit": "abc",
    },
    {"kind": "rival", "what": "sym_kl, near", "contestant": "wrong one", "ok": False, "error": "wrong"},
    {"kind": "test", "what": "a", "ok": True}, {"kind": "test", "what": "b", "ok": False},
    *ended(machine="ok", tests="cut"),
]  # fmt: skip


def write_run(folder: Path, **more: object) -> None:
    text = "".join(json.dumps({"stage": None, **line, **more}) + "\n" for line in RUN)
    (folder / "gpu-made-up.jsonl").write_text(text)


def test_the_section_is_made_of_committed_lines(tmp_path):
    write_run(tmp_path)
    made = section.sections(tmp_path)
    assert "A GPU" in made["gpu-status"]
    assert section.NEVER not in made["gpu-status"] + made["gpu"]
    assert "| kl forward | [8192, 32000] | 500.0 us (70%) | 350.0 us (100%) |" in made["gpu"]
    assert "a copy's 3.00 TB/s (A GPU, commit abc)" in made["gpu"]
    assert "| sym_kl, near | smart-fast triton | 2.00 ms |  | 10.00 | 51% of a copy | 1e-07 |" in made["gpu"]
    assert "| sym_kl, near | formula, eager | 20.00 ms |  |  | 5% of a copy | 1e+01 |" in made["gpu"]
    assert "wrong one" not in made["gpu"]
    assert "1 of 2 chosen tests passed" in made["gpu"]
    assert "machine. Not: tests (cut)." in made["gpu"]


def test_a_rehearsal_is_no_result(tmp_path):
    write_run(tmp_path, dry_run=True)
    assert section.sections(tmp_path) == {"gpu-status": section.NO_GPU, "gpu": section.NO_FIGURES}


def test_the_readme_says_in_its_second_paragraph_whether_a_gpu_has_run_it(tmp_path):
    paragraphs = readme.README.read_text().split("\n\n")
    assert paragraphs[0].startswith("# ")
    assert paragraphs[2].startswith("<!-- gpu-status -->\n")
    measured = any(readme.RESULTS.glob("gpu-*.jsonl"))
    assert (section.NEVER in paragraphs[2]) == (not measured)
    for path in readme.RESULTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_run(tmp_path)
    for page in readme.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((readme.ROOT / page).read_text())
    texts = readme.write(tmp_path, tmp_path)
    assert "A GPU" in texts["README.md"].split("\n\n")[2]
    assert "(docs/benchmarks.md#on-a-gpu)" in texts["README.md"]
    assert "(benchmarks.md#on-a-gpu)" in texts["docs/index.md"]
    assert "500.0 us (70%)" in texts["docs/benchmarks.md"]
