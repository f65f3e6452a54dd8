"""What is particular to the compiled operators: threads, instruction sets, memory, gradients given with the loss."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import smart_fast
from smart_fast import build as native_build
from smart_fast import norms
from smart_fast.backends import base, select
from smart_fast.backends.base import STATISTICS, Step
from tests import cuda_emulation, oracle
from tests.helpers import exhaustively

LOSSES = [smart_fast.kl_loss, smart_fast.sym_kl_loss, smart_fast.js_loss]
MIB = 2**20


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request, native):
    if not native.extension.use_instruction_set(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    yield request.param
    native.extension.use_instruction_set("auto")


def pair(*shape, apart=1.0, dtype=torch.float32):
    t = torch.randn(shape)
    return tuple(each.to(dtype).requires_grad_() for each in (t + apart * torch.randn(shape), t))


def test_auto_prefers_what_is_built(native):
    assert select("auto", torch.zeros(2, 2)) is native
    assert select("auto", torch.zeros(2, 2, dtype=torch.float64)).name == "torch"


def test_how_it_was_built(native):
    about = native_build.report(native.extension)
    assert about["torch"] == torch.__version__.split("+")[0]
    assert about["compiler"].startswith(("gcc", "clang"))
    if (only := native_build.instruction_set()) is None:
        assert about["instruction_sets"][-1] == "portable"
    else:
        assert about["instruction_sets"] == [only]
    assert about["instruction_set"] == about["instruction_sets"][0]
    assert isinstance(about["cuda"], bool)
    assert "march" not in about["flags"]
    assert "fast-math" not in about["flags"]
    assert not native.extension.use_instruction_set("sse9")


def test_knows_what_the_tables_name(native):
    about = native.extension.built_with()
    assert native.kinds == set(about["divergences"]) == set(base.DIVERGENCES)
    assert set(about["updates"]) == set(base.UPDATES)
    kinds = {norms.known_norm(each).kind for each in (smart_fast.inf_norm, smart_fast.l2_norm, smart_fast.l1_norm)}
    assert set(about["norms"]) == {*kinds, "opaque"}


@pytest.mark.parametrize("width", [768, 30, 7])
def test_noise_of_the_triton_kernels(native, width):
    triton_backend = pytest.importorskip("smart_fast.backends.triton").TRITON
    if triton_backend.cannot_serve(torch.device("cpu")):
        pytest.skip("the Triton kernels are not interpreted here")
    embed = torch.zeros(50, width)
    for seed in (0, 2**40 + 3, 2**63 - 2):
        seeds = torch.tensor([seed])
        ours = native.perturb(embed, seeds, 1.0, None, False)[0]
        theirs = triton_backend.perturb(embed, seeds, 1.0, None, False, None)[0]
        assert (ours - theirs).abs().max() < 2e-6


def test_noise_is_kept_as_it_was_added(native, instruction_set):
    embed, seed = torch.zeros(33, 100), torch.tensor([5])
    perturbed, noise = native.perturb(embed, seed, 0.5, None, True)
    assert torch.equal(perturbed, noise)
    mask = torch.rand(33) < 0.5
    perturbed, noise = native.perturb(embed, seed, 0.5, mask, True)
    assert torch.equal(perturbed, noise)
    assert not noise[~mask].any()
    assert noise[mask].all()
    assert torch.equal(native.perturb(embed, seed, 0.5, None, False)[1], seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5000), (300, 100), (1000, 3), (2, 70000)])
def test_results_do_not_depend_on_threads(native, shape, dtype, instruction_set):
    embed, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x, t = pair(*shape, dtype=dtype)
    step = Step(smart_fast.sentence_norm(smart_fast.l2_norm), 0.1, 0.1, 1e-6, "smart-pytorch")

    def everything():
        seed = torch.tensor([9])
        perturbed, noise = native.perturb(embed, seed, 0.1, None, True)
        yield from (perturbed, noise, *native.ascend(embed, grad, noise, step, None, True))
        for loss_fn in LOSSES:
            for reduction in ("sum", "none"):
                loss = loss_fn(x, t, reduction, backend="native")
                yield from (loss, *torch.autograd.grad(loss, (x, t), torch.ones_like(loss)))

    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(list(everything()))
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_large_outputs_are_used_again(native):
    embed, seed = torch.zeros(MIB), torch.tensor([1])
    smart_fast.empty_cache()
    first = native.perturb(embed, seed, 1.0, None, False)[0]
    assert native.extension.cached_bytes() == 0
    values, address = first.clone(), first.data_ptr()
    del first
    assert native.extension.cached_bytes() == 4 * MIB
    again = native.perturb(embed, seed, 1.0, None, False)[0]
    assert again.data_ptr() == address
    assert torch.equal(again, values)
    other = native.perturb(embed, seed, 1.0, None, False)[0]
    assert other.data_ptr() != address
    del again, other
    assert smart_fast.empty_cache() == 8 * MIB
    assert smart_fast.empty_cache() == 0
    assert native.extension.cached_bytes() == 0


def test_kept_memory_is_bounded(native):
    smart_fast.empty_cache()
    seed = torch.tensor([1])
    outputs = [native.perturb(torch.zeros(MIB // 4 + 1024 * i), seed, 1.0, None, False)[0] for i in range(100)]
    del outputs
    assert 0 < native.extension.cached_bytes() <= 64 * 2 * MIB
    smart_fast.empty_cache()


def test_outputs_are_ordinary_tensors(native):
    out = native.perturb(torch.zeros(MIB), torch.tensor([1]), 1.0, None, False)[0]
    assert out.is_contiguous()
    assert out.untyped_storage().resizable()
    out.resize_(2 * MIB).zero_()
    assert out[:10].clone().share_memory_().is_shared()


# ---- gradients given with the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (4, 1000)])
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_second_backward_pass(native, loss_fn, shape):
    """The first one hands its gradients over: whatever becomes of them, the second is right."""
    x, t = pair(*shape)
    loss = loss_fn(x, t, backend="native")
    first = torch.autograd.grad(loss, (x, t), retain_graph=True)
    kept = [each.clone() for each in first]
    for each in first:
        each.fill_(math.nan)
    second = torch.autograd.grad(loss, (x, t), torch.tensor(3.0), retain_graph=True)
    third = torch.autograd.grad(loss, (x, t))
    for one, two, three in zip(kept, second, third, strict=True):
        assert torch.equal(two, 3 * one)
        assert torch.equal(three, one)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_scaled_losses(native, loss_fn):
    """As torch.nn weighs its losses: a factor, a sum of two uses, accumulation into .grad."""
    x, t = pair(4, 50)
    loss = loss_fn(x, t, backend="native")
    (0.25 * loss + loss / 2).backward()
    x2, t2 = (each.detach().clone().requires_grad_() for each in (x, t))
    for factor in (0.25, 0.5):
        (factor * loss_fn(x2, t2, backend="native")).backward()
    for one, two in ((x, x2), (t, t2)):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=0)


def test_fp16_gradients_survive_a_loss_scale(native):
    """A gradient that underflows in fp16 until it is scaled, as torch.amp.GradScaler does."""
    x, t = pair(4096, 20, apart=1e-2, dtype=torch.float16)
    scale = 2.0**16
    (smart_fast.kl_loss(x, t, backend="native") * scale).backward()
    exact = oracle.divergence_grads("kl", x.detach(), t.detach(), 1.0, torch.tensor([scale / 4096]))
    assert oracle.relative_error(x.grad, exact[0]) < 2**-9


def test_no_gradient_no_memory(native):
    x, t = (each.detach() for each in pair(MIB // 4, 8))
    smart_fast.empty_cache()
    with torch.no_grad():
        smart_fast.sym_kl_loss(x, t, backend="native")
    smart_fast.sym_kl_loss(x, t, backend="native")
    assert smart_fast.empty_cache() == 0


# ---- sanitizers ------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("instructions", ["portable", "widest"])
def test_kernels_under_address_and_undefined_behavior_sanitizer(instructions, tmp_path, monkeypatch):
    csrc = native_build.sources()
    if reason := native_build.missing():
        pytest.skip(reason)
    monkeypatch.delenv("SMART_FAST_INSTRUCTION_SETS", raising=False)
    chosen = native_build.instruction_set() if instructions == "widest" else instructions
    flags = [flag for flag in native_build.FLAGS if flag not in ("-O3", "-fopenmp")]
    flags += ["-O1", "-g1", "-fno-inline-functions", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = os.environ.get("CXX", "c++").split()
    program = tmp_path / "test_kernels"
    units = [csrc / f"cpu/{chosen}.cpp", csrc / "cpu/dispatch.cpp", Path(__file__).parent / "native/test_kernels.cpp"]
    command = [*compiler, *flags, f"-I{csrc}", f"-DSMART_FAST_ONLY={chosen}", *units, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and "asan" in built.stderr:
        pytest.skip("this compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "1 instruction sets, 0 failures" in done.stdout


# ---- names that stand for nothing ------------------------------------------------------------------------------------


def refused_names():
    x, t, stats, row = torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, STATISTICS), torch.ones(2)
    unknown_kind, unknown_output = ("nonsense", "sum"), ("kl", "nonsense")
    numbers = 1.0, 1.0, 1.0, False
    kinds, outputs, updates = (
        "kinds: kl, sym_kl, js, jsd",
        "terms, rows, sum",
        "updates: smart-pytorch, sift, paper, sign",
    )
    step, seed, noises = (0.1, 0.1), torch.tensor([1]), "noises: normal, uniform"
    nothing = (None,) * 4
    return {
        "forward": ("divergence_forward", (x, t, None, *unknown_kind, *numbers, True, False, False), kinds),
        "backward": ("divergence_backward", (row[0], x, t, stats, None, *unknown_kind, *numbers, True, True), kinds),
        "finish": ("divergence_finish", (x, t, stats, None, *unknown_kind, *numbers), kinds),
        "output": ("divergence_forward", (x, t, None, *unknown_output, *numbers, True, False, False), outputs),
        "update": ("ascend", (x, t, seed, *nothing, "l2", "row", *step, "nonsense", 0.1, True), updates),
        "norm": ("ascend", (x, t, seed, *nothing, "nonsense", "row", *step, "sift", 0.1, True), "inf, l2, l1, opaque"),
        "noise": ("ascend", (x, t, seed, *nothing, "inf", "row", *step, "sift", 0.1, True, "nonsense"), noises),
        "drawn noise": ("perturb", (x, seed, 0.1, None, True, None, "nonsense"), noises),
        "measured update": ("ascend_norm", (x, seed, None, None, None, "l2", *step, "nonsense"), updates),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused_names())
def test_unknown_names_are_refused(native, case):
    """Never taken for another: the error says which there are."""
    operator, arguments, known = refused_names()[case]
    with pytest.raises(ValueError, match=rf"unknown \w+ 'nonsense'; .*{known}"):
        getattr(torch.ops.smart_fast, f"native_{operator}")(*arguments)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize("kind", ["Kind::jsd", "Kind(99)"])
def test_a_divergence_without_formulas_does_not_compile(kind):
    """In C++, whose kernels are templates over these formulas, and in CUDA, which takes the same ones."""
    for source in ("cpu/divergence_kernels.h", "cuda/divergence.h"):
        cpu = source.startswith("cpu")
        code = """
            CHOICES
            #include "SOURCE"
            using namespace smart_fast;
            float use(float r) {
              using M = ARITHMETIC;
              M::F sums[2] = {};
              RowFormulas<M, KIND>::template add_row_terms<false>(M::splat(1), M::splat(1), M::splat(r), 0.5f, sums);
              (void)with_kind(KIND, [](auto kind) { return int(kind.value); }, [] { return -1; });
              return r;
            }
        """
        choices = "#define SMART_FAST_ISA portable\n#define SMART_FAST_LANES 4" if cpu else ""
        code = code.replace("CHOICES", choices).replace("SOURCE", source).replace("KIND", kind)
        code = code.replace("ARITHMETIC", "Simd" if cpu else "Scalar")
        flags = ["-std=c++20", "-Wno-psabi", f"-I{cuda_emulation.CSRC}"] if cpu else cuda_emulation.FLAGS
        command = ["g++", *flags, "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == (kind == "Kind::jsd"), done.stderr
        assert kind == "Kind::jsd" or "a divergence without formulas" in done.stderr


# ---- the upstream gradient that is expected --------------------------------------------------------------------------


def weighed_gradients(kind, pair, weight):
    x, t = (each.detach().clone().requires_grad_() for each in pair)
    (weight * kind(x, t, reduction="batchmean", backend="native")).backward()
    return x.grad, t.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (40, 40), (5, 1000), *exhaustively(((3, 4099),), ((64, 7000),))])
@pytest.mark.parametrize("kind", [*LOSSES, smart_fast.jsd_loss])
def test_gradients_do_not_depend_on_what_was_expected(kind, shape, dtype, native):
    """Weights that repeat are expected, and multiplied by as gradients are written: with the bits of a second pass."""
    logits = pair(*shape, apart=0.3, dtype=dtype)
    plain = weighed_gradients(kind, logits, torch.tensor(1.0))
    for weight in (0.3, 0.3, 0.3, 0.3, 0.3, 0.3, -2.7, 0.3, 0.3, float("inf"), 1.0):
        weight = torch.tensor(weight)
        for got, one in zip(weighed_gradients(kind, logits, weight), plain, strict=True):
            torch.testing.assert_close(got, one * weight, rtol=0, atol=0, equal_nan=True)


def test_expected_or_not_a_second_backward_pass_gives_the_same(native):
    for upstream in (0.3, 0.3, 0.3, 0.3, 0.3, 0.7):
        x, t = pair(6, 100)
        loss = upstream * smart_fast.sym_kl_loss(x, t, backend="native")
        first = torch.autograd.grad(loss, (x, t), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, (x, t))))


def test_a_weight_is_not_rounded_to_bf16(native):
    x, t = pair(4, 500, apart=0.3, dtype=torch.bfloat16)
    loss = smart_fast.sym_kl_loss(x, t, reduction="sum", backend="native")
    upstream = torch.tensor(0.3, dtype=loss.dtype)
    loss.backward(upstream)
    wanted = oracle.divergence_grads("sym_kl", x.double(), t.double(), 1.0, upstream.double().expand(4, 500))
    for got, want in zip((x.grad, t.grad), wanted, strict=True):
        assert abs((got * want).sum() / (want * want).sum() - 1) < 5e-4  # rounded to bf16, 0.3 is 2.6e-3 more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (5, 100), (5, 1024)])
def test_the_operator_rescales_as_a_second_pass_would(shape, dtype, native):
    logits = [each.detach() for each in pair(*shape, dtype=dtype)]
    for kind in ("kl", "sym_kl", "jsd"):
        given = (*logits, None, kind, "sum", 0.5, 1.0, 1.0, False, False, True, True)
        loss, _, *plain = torch.ops.smart_fast.native_divergence_forward(*given)
        same, _, *rescaled = torch.ops.smart_fast.native_divergence_forward(*given, 0.3)
        assert torch.equal(loss, same)
        for got, one in zip(rescaled, plain, strict=True):
            assert torch.equal(got, one * torch.tensor(0.3))
