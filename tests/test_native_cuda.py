"""The CUDA kernels of csrc/cuda: compiled for GPUs that are not here, and run on this CPU by an emulation of threads.

Emulated, they are held to the float64 oracle in every layout that they choose between. Tests marked ``gpu`` run what
only a device shows: seeds under graph capture, streams, agreement with Triton.
"""

from __future__ import annotations

import inspect
import itertools
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from smart_fast import inf_norm, l1_norm, l2_norm, sentence_norm
from smart_fast.ascent import fisher
from smart_fast.backends.base import DivergenceSpec, Step
from smart_fast.backends.pytorch import PYTORCH
from tests import compile_cuda, cuda_emulation, oracle
from tests import test_divergence_wide as wide
from tests import test_fisher_kernels as fishers
from tests import test_native_paper as paper
from tests.helpers import exhaustively

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KINDS = ["kl", "sym_kl", "js", "jsd"]
NORMS = {"inf": inf_norm, "l2": l2_norm, "l1": l1_norm}
UPDATES = ["smart-pytorch", "sift"]
SEED = 2**40 + 12345


@pytest.mark.exhaustive
@pytest.mark.compile_only
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(each, marks=[] if each in ("sm_80", "sm_90") else [pytest.mark.sweep])
        for each in compile_cuda.TARGETS
    ],
)
def test_compiles_without_spills(target: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda source: list(compile_cuda.compile_source(source, target)), compile_cuda.SOURCES)
        kernels = [each for report in reports for each in report]
    assert len(kernels) > 50
    assert not [each for each in kernels if each["stack"]]
    assert max(each["registers"] for each in kernels) <= 128


# ---- conversions and noise -------------------------------------------------------------------------------------------


def test_half_precision_conversions(emulated: cuda_emulation.Emulated) -> None:
    bits = torch.arange(65536).to(torch.uint16)
    floats = torch.empty(2, 65536)
    back = torch.empty(2, 65536, dtype=torch.uint16)
    emulated.library.halves(*(ctypes_pointer(each) for each in (*floats, *back)))
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):
        exact = bits.view(dtype).float()
        assert torch.equal(floats[index].isnan(), exact.isnan())
        numbers = ~exact.isnan()
        assert torch.equal(floats[index][numbers], exact[numbers])
        assert torch.equal(back[index][numbers].int(), bits[numbers].int())


def ctypes_pointer(tensor: Tensor) -> object:
    return cuda_emulation.ctypes.c_void_p(tensor.data_ptr())


def expected_noise(shape: tuple[int, ...] | torch.Size, mask: Tensor | None = None, seed: int = SEED) -> Tensor:
    noise = torch.from_numpy(oracle.philox_normal(seed, math.prod(shape))).view(shape)
    return noise if mask is None else torch.where(mask.unsqueeze(-1), noise, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 20), (3, 1001), (5, 4, 1), (2, 2, 2, 768)])
def test_noise(shape: tuple[int, ...], dtype: torch.dtype, emulated: cuda_emulation.Emulated) -> None:
    embed, seed = torch.randn(shape).to(dtype), torch.tensor([SEED])
    for mask in (None, torch.rand(shape[:-1]) < 0.6):
        out, kept = emulated.perturb(embed, seed, 0.5, mask, True)
        noise = 0.5 * expected_noise(shape, mask)
        assert oracle.relative_error(kept, noise) < 1e-6 or not noise.any()
        assert oracle.relative_error(out, embed.double() + noise) < ULP[dtype]
        assert torch.equal(out, emulated.perturb(embed, seed, 0.5, mask)[0])


def views(base: Tensor) -> list[Tensor]:
    return [
        base.transpose(0, 1), base.permute(2, 1, 0, 3), base[:, 1:, ::2, 2:9], base[..., 1:], base[..., ::2],
        base[:1].expand(base.shape), base[0, 0, 0], base.transpose(1, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_views(dtype: torch.dtype, emulated: cuda_emulation.Emulated) -> None:
    for view in views(torch.randn(4, 5, 6, 24).to(dtype)):
        out, _ = emulated.perturb(view, torch.tensor([SEED]), 0.5, None)
        assert oracle.relative_error(out, view.double() + 0.5 * expected_noise(view.shape)) < ULP[dtype]


def test_seeds_from_generator_states(emulated: cuda_emulation.Emulated) -> None:
    """By value, and by pointer as in a captured graph: the same seed, which reproduces the noise; all differ."""
    embed = torch.zeros(3, 17)
    seeds = set()
    for generator_seed, offset in itertools.product((0, 1, 2**63 + 5), (0, 4, 2**40)):
        out, seed = emulated.perturb_fresh(embed, 1.0, generator_seed=generator_seed, offset=offset)
        assert int(seed) >= 0
        assert int(seed) == emulated.library.seed_from(
            cuda_emulation.ctypes.c_uint64(generator_seed), cuda_emulation.ctypes.c_uint64(offset)
        )
        assert torch.equal(out, emulated.perturb(embed, seed, 1.0, None)[0])
        signed = generator_seed - 2**64 if generator_seed >= 2**63 else generator_seed
        state = torch.tensor([signed]), torch.tensor([offset - 4])
        captured = emulated.perturb_fresh(
            embed, 1.0, generator_seed_ptr=state[0].data_ptr(), offset_ptr=state[1].data_ptr(), offset=4
        )
        assert torch.equal(captured[1], seed)
        assert torch.equal(captured[0], out)
        seeds.add(int(seed))
    assert len(seeds) == 9


# ---- ascend ----------------------------------------------------------------------------------------------------------


def two_steps(
    emulated: cuda_emulation.Emulated, embed: Tensor, grad: Tensor, kind: str, scope: str, update: str,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """From the seed and then from the kept noise, each against the oracle."""
    norm = NORMS[kind] if scope == "row" else sentence_norm(NORMS[kind])
    step = Step(norm, 1e-2, 0.5, 1e-6, update)
    noise = 1e-2 * expected_noise(embed.shape)
    state = torch.tensor([SEED])
    for _ in range(2):
        perturbed, state = emulated.ascend(embed, grad, state, step, mask, True)
        noise = oracle.ascend(noise, grad, update, kind, scope, 0.5, 1e-6, mask)
        assert oracle.relative_error(state, noise) < 3e-6
        assert oracle.relative_error(perturbed, embed.double() + noise) < ULP[embed.dtype]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scope", ["row", "group"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", NORMS)
def test_ascend(kind: str, update: str, scope: str, masked: bool, emulated: cuda_emulation.Emulated) -> None:
    for shape in ((2, 3, 20), (3, 7), (2, 2, 2, 5), (2, 3, 1), (2, 5, 200)):
        embed, grad = torch.randn(shape), torch.randn(shape)
        mask = torch.rand(shape[:-1]) < 0.7 if masked else None
        if mask is not None:
            mask.view(-1)[0] = True
            grad = torch.where(mask.unsqueeze(-1), grad, math.nan)
        two_steps(emulated, embed, grad, kind, scope, update, mask)


@pytest.mark.parametrize("width", [20, *exhaustively(1001, 8200)])
def test_signs(width: int, emulated: cuda_emulation.Emulated) -> None:
    """Along the signs of gradients that are zero, or not finite, or masked, and to the corners exactly."""
    embed, grad, unit = torch.randn(2, 3, width), torch.randn(2, 3, width), torch.rand(2, 3, 1)
    grad[..., 2], grad[1, 1, 4] = 0.0, math.inf
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for rows, each_unit, step_size in itertools.product((None, mask), (None, unit), (7e-3, 1.0)):
        step = Step(inf_norm, 1e-2, step_size, 1.2e-2, "sign")
        noise = 1e-2 * expected_noise(embed.shape) * (1.0 if each_unit is None else unit.double())
        state = torch.tensor([SEED])
        for _ in range(2):
            perturbed, state = emulated.ascend(embed, grad, state, step, rows, True, each_unit)
            noise = oracle.ascend(noise, grad, "sign", "inf", "row", step_size, 1.2e-2, rows, each_unit)
            assert oracle.relative_error(state, noise) < 3e-6
            assert oracle.relative_error(perturbed, embed.double() + noise) < 1e-6
        if rows is None and step_size == 1.0:
            corner = torch.tensor(1.2e-2) * (1.0 if each_unit is None else unit) * grad.sign()
            moves = torch.ones(2, 3, dtype=torch.bool)
            moves[1, 1] = False
            assert torch.equal(state[moves][:, 3:], corner[moves][:, 3:])


def test_uniform_noise(emulated: cuda_emulation.Emulated) -> None:
    """The same bits as on a CPU, in `perturb` and again in the first step."""
    want = torch.from_numpy(oracle.philox_uniform(SEED, 2 * 3 * 21) * (2**31 / math.sqrt(3))).round().float()
    want = (want * torch.tensor(math.sqrt(3) / 2**31)).view(2, 3, 21)
    zeros, seed = torch.zeros(2, 3, 21), torch.tensor([SEED])
    out, kept = emulated.perturb(zeros, seed, 1.0, None, True, None, "uniform")
    assert torch.equal(out, want)
    assert torch.equal(kept, want)
    step = Step(inf_norm, 1.0, 0.0, 10.0, "sign", (), "uniform")
    assert torch.equal(emulated.ascend(zeros, zeros, seed, step, None, True)[1], want)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1001, 8192, 8193])
def test_ascend_on_wide_rows(width: int, dtype: torch.dtype, emulated: cuda_emulation.Emulated) -> None:
    """In a warp, in a block, beyond one: rows that begin anywhere in a chunk."""
    for kind, update, scope in (("inf", "smart-pytorch", "row"), ("l2", "sift", "row"), ("l1", "sift", "group")):
        embed, grad = (torch.randn(3, 2, width).to(dtype) for _ in range(2))
        two_steps(emulated, embed, grad, kind, scope, update)


def test_ascend_on_views_and_mixed_dtypes(emulated: cuda_emulation.Emulated) -> None:
    for view in views(torch.randn(4, 5, 6, 24)):
        if view.dim() < 2:
            continue
        other = torch.randn(view.shape)
        for left, right in ((view, other), (other, view)):
            two_steps(emulated, left, right, "inf", "row", "smart-pytorch")
            two_steps(emulated, left, right, "l2", "group", "sift")
    two_steps(emulated, torch.randn(3, 40).bfloat16(), torch.randn(3, 40), "l2", "row", "smart-pytorch")


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [10, 9000])
@pytest.mark.parametrize("scope", ["row", "group"])
@pytest.mark.parametrize("update", UPDATES)
def test_non_finite_gradients(update: str, scope: str, width: int, emulated: cuda_emulation.Emulated) -> None:
    embed, grad = torch.randn(2, 3, width), torch.randn(2, 3, width)
    for index, value in enumerate((math.nan, math.inf, -math.inf)):
        grad[index % 2, index, width - 1] = value
    for kind in NORMS:
        two_steps(emulated, embed, grad, kind, scope, update)


@pytest.mark.parametrize("width", [8, 8200])
@pytest.mark.parametrize("update", UPDATES)
def test_zero_denominator(update: str, width: int, emulated: cuda_emulation.Emulated) -> None:
    embed, zero = torch.randn(3, width), torch.zeros(3, width)
    step = Step(inf_norm, 0.0, 0.5, 0.0, update)
    assert torch.equal(emulated.ascend(embed, zero, torch.tensor([1]), step, None, False)[0], embed)


@pytest.mark.parametrize("update", UPDATES)
def test_opaque_norms(update: str, emulated: cuda_emulation.Emulated) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for width, norm_fn in itertools.product((12, 8200), (lambda x: x.abs().mean(-1, keepdim=True), lambda x: x.norm())):
        embed, grad = torch.randn(2, 3, width), torch.randn(2, 3, width)
        grad[1, 1, 1] = math.nan
        step = Step(norm_fn, 1e-2, 0.5, 1e-6, update)
        got, kept = emulated.ascend(embed, grad, torch.tensor([SEED]), step, mask, True)
        noise = 1e-2 * expected_noise(embed.shape, mask)
        clean = torch.where(mask.unsqueeze(-1) & grad.isfinite().all(-1, keepdim=True), grad.double(), 0.0)
        if update == "sift":
            want = noise + 0.5 * clean / (norm_fn(clean) + 1e-6)
        else:
            want = (noise + 0.5 * clean) / (norm_fn(noise + 0.5 * clean) + 1e-6)
        assert oracle.relative_error(kept, torch.where(mask.unsqueeze(-1), want, 0.0)) < 3e-6
        assert oracle.relative_error(got, embed.double() + torch.where(mask.unsqueeze(-1), want, 0.0)) < 1e-6


PAPER = [
    (paper.test_noise_in_units, {"width": [1, 3, 32, 1000], "dtype": DTYPES}),
    (paper.test_units_of_one_change_nothing, {}),
    (paper.test_paper, {"width": [1, 3, 768, 1000], "kind": NORMS, "scope": paper.SCOPES}),
    (paper.test_long_rows, {"kind": NORMS, "scope": paper.SCOPES}),
    (paper.test_other_updates_in_units, {"kind": NORMS, "update": UPDATES, "scope": paper.SCOPES}),
    (paper.test_gradients_of_any_size, {"size": [1e-30, 1e30], "kind": NORMS, "scope": paper.SCOPES}),
    (paper.test_rows_without_a_direction, {"kind": NORMS, "scope": paper.SCOPES}),
    (paper.test_balls_of_nothing, {"kind": NORMS, "scope": paper.SCOPES}),
    (paper.test_ties, {"kind": NORMS}),
    (paper.test_views_and_mixed_dtypes, {"update": paper.UPDATES}),
    (paper.test_norms_of_the_user, {"update": paper.UPDATES}),
]


def cases(contract: list) -> list:
    return [
        pytest.param(test, dict(zip(choices, values, strict=True)), id="-".join(map(str, (test.__name__[5:], *values))))
        for test, choices in contract
        for values in itertools.product(*choices.values())
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("test", "arguments"), cases(PAPER))
def test_balls_and_units(
    test: Callable[..., None], arguments: dict[str, object], emulated: cuda_emulation.Emulated
) -> None:
    """What the CPU kernels are held to."""
    test(**arguments, native=emulated)


@pytest.mark.parametrize("update", paper.UPDATES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_long_groups(
    kind: str, update: str, emulated: cuda_emulation.Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added up before the kernel."""
    monkeypatch.setattr(emulated, "most_in_kernel", 2)
    embed, grad, unit = torch.randn(2, 3, 40), torch.randn(2, 3, 40), torch.rand(2, 3, 1)
    step = paper.step_of(kind, "group", update, 2e-3, paper.radius_of(kind, 120))
    paper.check(emulated, embed, grad, step, kind, "group", None, unit)


# ---- divergences -----------------------------------------------------------------------------------------------------


def both_passes(
    emulated: cuda_emulation.Emulated, kind: str, x: Tensor, t: Tensor, elementwise: bool, mask: Tensor | None = None,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if grad is None:
        grad = torch.rand(x.shape) if elementwise else torch.tensor(1.7)
    spec = DivergenceSpec(kind, "terms" if elementwise else "sum", 0.7, 0.3)
    loss, stats = emulated.divergence_forward(x, t, spec, mask)
    return loss, *emulated.divergence_backward(grad, x, t, stats, spec, mask, True, True)


def check_divergence(
    emulated: cuda_emulation.Emulated, kind: str, x: Tensor, t: Tensor, elementwise: bool, mask: Tensor | None = None,
    grad: Tensor | None = None, tolerance: float = 1.0,
) -> None:  # fmt: skip
    """Loss and gradients against float64, within ``tolerance`` roundings of what is written."""
    if grad is None:
        grad = torch.rand(x.shape) if elementwise else torch.tensor(1.7)
    got = both_passes(emulated, kind, x, t, elementwise, mask, grad)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    rows = keep.unsqueeze(-1)
    x, t = (torch.where(rows, each, 0.0) for each in (x, t))
    if elementwise:
        loss = torch.where(rows, oracle.divergence_terms(kind, x, t, 0.7), 0.0)
    else:
        loss = 0.3 * torch.where(keep, oracle.divergence_rows(kind, x, t, 0.7), 0.0).sum()
    upstream = grad.double() if elementwise else 0.3 * grad.double()
    want = (loss, *(torch.where(rows, g, 0.0) for g in oracle.divergence_grads(kind, x, t, 0.7, upstream)))
    scales = (None, *oracle.gradient_scales(kind, x, t, 0.7, upstream))
    for name, value, reference, scale in zip(("loss", "dx", "dt"), got, want, scales, strict=True):
        error = oracle.relative_error(value, reference, scale)
        assert error <= tolerance * ULP[value.dtype], f"{name}: {error:.1e}"


def pair(*shape: int, apart: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    t = torch.randn(shape)
    return (t + apart * torch.randn(shape)).to(dtype), t.to(dtype)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(5,), (3, 2), (300, 3), (2, 3, 17), (3, 128), (3, 129), (5, 1000), (2, 8192), (2, 8193)]
)
def test_divergences(shape: tuple[int, ...], kind: str, elementwise: bool, emulated: cuda_emulation.Emulated) -> None:
    check_divergence(emulated, kind, *pair(*shape), elementwise)
    mask = torch.rand(shape[:-1]) < 0.6
    x, t = pair(*shape)
    check_divergence(emulated, kind, torch.where(mask.unsqueeze(-1), x, math.nan), t, elementwise, mask)


@pytest.mark.exhaustive
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_halves(
    kind: str, dtype: torch.dtype, elementwise: bool, emulated: cuda_emulation.Emulated
) -> None:
    for width in (3, 1000, 1001, 9001):
        check_divergence(emulated, kind, *pair(3, width, dtype=dtype), elementwise)
    x, t = pair(3, 300)
    check_divergence(emulated, kind, x.to(dtype), t, elementwise)
    check_divergence(emulated, kind, x, t.to(dtype), elementwise)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "device",
    [
        (8, 4, 4096, 4096),
        (8, 4, 40 * 1024, 40 * 1024),
        cuda_emulation.A100,
        (9, 2, 40 * 1024, 40 * 1024),
        (9, 16, 228 * 1024, 227 * 1024),
    ],
    ids=["no shared memory", "some", "enough", "clusters of a row that is too long", "clusters for few rows"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(kind: str, device: tuple[int, int, int, int], emulated: cuda_emulation.Emulated) -> None:
    """None, some or all of the row in shared memory; several blocks of a cluster on a row."""
    emulated.set_device(*device)
    mask = torch.tensor([True, False])
    check_divergence(emulated, kind, *pair(2, 30522, apart=1e-4), False)
    check_divergence(emulated, kind, *pair(2, 30521, dtype=torch.bfloat16), False, mask)
    check_divergence(emulated, kind, *pair(2, 20000), True, mask)
    emulated.set_device(*cuda_emulation.DEVICE)


@pytest.mark.parametrize("apart", [1e-4, *exhaustively(1e-6, 1e-2, 20.0)])
@pytest.mark.parametrize("width", [9001, *exhaustively(50, 1000)])
@pytest.mark.parametrize("kind", ["jsd", *exhaustively("kl", "sym_kl", "js")])
def test_near_and_far(kind: str, width: int, apart: float, emulated: cuda_emulation.Emulated) -> None:
    for elementwise in (False, True):
        check_divergence(emulated, kind, *pair(3, width, apart=apart), elementwise)
        constant = torch.rand(3, 1).expand(3, width)
        if elementwise and apart < 1:
            check_divergence(emulated, kind, *pair(3, width, apart=apart), True, grad=constant, tolerance=3.0)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("width", [1, 300, 8200])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_zeros(kind: str, width: int, elementwise: bool, emulated: cuda_emulation.Emulated) -> None:
    t = torch.randn(5, width)
    x = torch.randn(5, 1) if width == 1 else t.clone()
    grad = torch.ones_like(x) if elementwise else None
    assert all(not each.any() for each in both_passes(emulated, kind, x, t, elementwise, None, grad))


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [40, 400, 8400])
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_logits(kind: str, width: int, emulated: cuda_emulation.Emulated) -> None:
    x, t = pair(3, width, apart=0.5)
    some = torch.arange(width) % 3 == 0
    for elementwise in (False, True):
        upstream = torch.rand(x.shape) if elementwise else torch.tensor(1.7)
        got = both_passes(
            emulated, kind, x.masked_fill(some, -math.inf), t.masked_fill(some, -math.inf), elementwise, None, upstream
        )
        dense = upstream[:, ~some].contiguous() if elementwise else upstream
        want = both_passes(emulated, kind, x[:, ~some].contiguous(), t[:, ~some].contiguous(), elementwise, None, dense)
        for value, reference in zip(got, want, strict=True):
            if value.dim():
                assert not value[:, some].any()
                value = value[:, ~some]
            assert oracle.relative_error(value, reference) < 2e-6
    one_sided, dead = x.clone(), x.clone()
    one_sided[1, 4], dead[1] = -math.inf, -math.inf
    loss = both_passes(emulated, kind, one_sided, t, False)[0]
    assert loss.isfinite() if kind == "jsd" else loss == math.inf
    assert both_passes(emulated, kind, dead, t, False)[0].isnan()
    assert both_passes(emulated, kind, dead, dead, False)[0].isnan()


@pytest.mark.exhaustive
@pytest.mark.parametrize("elementwise", [False, True])
def test_divergences_of_views(elementwise: bool, emulated: cuda_emulation.Emulated) -> None:
    for left, right in zip(views(torch.randn(4, 5, 6, 24)), views(torch.randn(4, 5, 6, 24)), strict=True):
        for x, t in ((left, right), (left, right.contiguous()), (left.contiguous(), right)):
            check_divergence(emulated, "sym_kl", x, t, elementwise)
    wide = torch.randn(6, 4, 304)
    for view in (wide.transpose(0, 1), wide[..., 1:], wide[..., ::2], wide[:, ::2]):
        check_divergence(emulated, "kl", view, torch.randn(view.shape), elementwise)
        if elementwise:
            grad = torch.rand(*reversed(view.shape)).permute(2, 1, 0)
            check_divergence(emulated, "kl", view, torch.randn(view.shape), True, grad=grad)


def test_one_sided_gradients(emulated: cuda_emulation.Emulated) -> None:
    x, t = pair(3, 200)
    for elementwise, kind in itertools.product((False, True), KINDS):
        grad = torch.rand(x.shape) if elementwise else torch.tensor(1.0)
        spec = DivergenceSpec(kind, "terms" if elementwise else "sum")
        _, stats = emulated.divergence_forward(x, t, spec, None)
        arguments = grad, x, t, stats, spec, None
        both = emulated.divergence_backward(*arguments, True, True)
        for side, want in enumerate(((True, False), (False, True))):
            one = emulated.divergence_backward(*arguments, *want)
            assert torch.equal(one[side], both[side])
            assert one[1 - side] is None


def test_sums_do_not_depend_on_chance(emulated: cuda_emulation.Emulated) -> None:
    """Sums over thousands of rows are made in one order."""
    x, t = pair(5000, 2)
    losses = {float(emulated.divergence_forward(x, t, DivergenceSpec("kl", "sum"), None)[0]) for _ in range(2)}
    assert len(losses) == 1
    assert abs(losses.pop() - float(oracle.divergence_rows("kl", x, t, 1.0).sum())) < 1e-3


CONTRACT = [
    (wide.test_both_paths_are_exact, {"kind": KINDS, "width": [33, 9000], "apart": [1e-5, 1.0, 20.0]}),
    (
        wide.test_scaled_and_relative,
        {"kind": KINDS, "scale": [0.5], "relative": [False, True], "output": list(wide.OUTPUTS)},
    ),
    (wide.test_relative_bfloat16, {"kind": KINDS}),
    (wide.test_classes_that_are_masked, {"kind": KINDS, "relative": [False, True]}),
    (wide.test_extreme_rows, {"kind": KINDS}),
    (wide.test_row_gradients, {"kind": KINDS, "width": [5, 2100]}),
    (wide.test_loss_alone, {}),
    (wide.test_one_dimension, {}),
    (wide.test_slices_of_the_vocabulary, {"kind": KINDS, "relative": [False, True], "apart": [1e-5, 0.2, 3.0]}),
    (wide.test_nothing_is_read_of_masked_rows, {"width": [2, 3, 9000]}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("test", "arguments"), cases(CONTRACT))
def test_contract_of_the_divergences(
    test: Callable[..., None], arguments: dict[str, object], emulated: cuda_emulation.Emulated
) -> None:
    """What the other backends are held to: rows, scales, differences in place of logits, slices of a vocabulary."""
    surroundings = {"backend": emulated, "device": torch.device("cpu"), "path": None, "poison": None}
    taken = inspect.signature(test).parameters
    test(**arguments, **{name: value for name, value in surroundings.items() if name in taken})


# ---- the Fisher direction --------------------------------------------------------------------------------------------


FISHER = [
    (fishers.test_float64_agreement, {"width": fishers.WIDTHS, "dtype": DTYPES}),
    (fishers.test_nothing_cancels, {"spread": [1e-6, 60.0], "width": [2, 40, 1000, 9000]}),
    (fishers.test_the_first_of_equal_ones, {"width": [2, 5, 100, 300, 9000], "places": [(0,), (0, 1), (1, -1), (-1,)]}),
    (fishers.test_one_class_is_zero, {}),
    (fishers.test_excluded_classes, {"width": [3, 200, 9000], "dtype": DTYPES}),
    (
        fishers.test_rows_without_a_softmax_are_nan,
        {"width": [2, 3, 200, 9000], "value": fishers.WITHOUT_A_SOFTMAX, "place": [0, -1]},
    ),
    (fishers.test_huge_logits, {"width": [3, 130, 9000]}),
    (fishers.test_shapes_and_strides, {"width": [3, 100, 700, 9000], "dtype": DTYPES}),
    (fishers.test_many_rows, {}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("test", "arguments"), cases(FISHER))
def test_fisher_direction(
    test: Callable[..., None], arguments: dict[str, object], emulated: cuda_emulation.Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the other backends are held to."""
    monkeypatch.setattr(fisher, "select", lambda backend, *_: PYTORCH if backend == "torch" else emulated)
    test(**arguments, backend=emulated, device=torch.device("cpu"), poison=None)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def operators() -> Callable[..., object]:
    from smart_fast.backends import build_native

    module = build_native()
    reason = module.cannot_serve(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    return torch.ops.smart_fast


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 768), (3, 5, 1001), (2, 9001)])
def test_device_agrees_with_triton(shape: tuple[int, ...], dtype: torch.dtype, operators) -> None:
    from smart_fast.backends import triton_launch as triton_ops

    embed, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    seed = torch.tensor([SEED], device="cuda")
    ours, noise = operators.native_perturb(embed, seed, 1.0, None, True)
    assert oracle.relative_error(ours, triton_ops.perturb(embed, seed, 1.0, None, None)) <= ULP[dtype]
    assert oracle.relative_error(noise, expected_noise(shape)) < 1e-5
    for kind, update in itertools.product(NORMS, UPDATES):
        rest = kind, "row", 1e-2, 0.5, update, 1e-6, True
        arguments = embed, grad, seed, None, None, None, None, *rest
        ours, theirs = operators.native_ascend(*arguments), triton_ops.ascend(*arguments)
        for left, right in zip(ours, theirs, strict=True):
            assert oracle.relative_error(left, right) <= max(1e-5, ULP[left.dtype])
    upstream = torch.tensor(1.3, device="cuda")
    for kind in KINDS:
        spec = DivergenceSpec(kind, "sum", 0.7, 0.3, 0.5)
        loss, stats, _, _ = operators.native_divergence_forward(embed, grad, None, *spec, True, False, False)
        theirs, their_stats = triton_ops.divergence_forward(embed, grad, None, *spec, True)
        assert oracle.relative_error(loss, theirs) < 1e-5
        assert oracle.relative_error(stats, their_stats) < 1e-4
        arguments = None, *spec, True, True
        for left, right in zip(
            operators.native_divergence_backward(upstream, embed, grad, stats, *arguments),
            triton_ops.divergence_backward(upstream, embed, grad, their_stats, *arguments),
            strict=True,
        ):
            assert oracle.relative_error(left, right) <= max(1e-5, ULP[dtype])


@pytest.mark.gpu
def test_device_seeds_follow_the_generator(operators) -> None:
    embed = torch.zeros(3, 17, device="cuda")

    def draw(generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return operators.native_perturb_fresh(embed, generator, 1.0, None, True)

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    again = draw()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], operators.native_perturb(embed, first[1], 1.0, None, False)[0])
    state = torch.cuda.get_rng_state()
    own = torch.Generator("cuda").manual_seed(9)
    assert not torch.equal(draw(own)[0], draw(own)[0])
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
def test_device_graph_replays_draw_fresh_noise(operators) -> None:
    embed, grad = torch.zeros(4, 100, device="cuda"), torch.randn(4, 100, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up, and not on the default stream
        operators.native_perturb_fresh(embed, None, 1.0, None, True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perturbed, seed = operators.native_perturb_fresh(embed, None, 1.0, None, True)
        moved, _ = operators.native_ascend(
            embed, grad, seed, None, None, None, None, "inf", "row", 1.0, 0.0, "smart-pytorch", 0.0, False
        )
    seen = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seen.append(perturbed.clone())
        assert torch.equal(perturbed, operators.native_perturb(embed, seed, 1.0, None, False)[0])
        assert oracle.relative_error(moved, perturbed / perturbed.abs().amax(-1, keepdim=True)) < 1e-5
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_another_device_than_the_current_one(operators) -> None:
    embed = torch.zeros(3, 17, device="cuda:1")
    perturbed, seed = operators.native_perturb_fresh(embed, None, 1.0, None, True)
    assert perturbed.device == seed.device == embed.device
    assert perturbed.any()
