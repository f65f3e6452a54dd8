"""Whether a device would take the launches of csrc/cuda: limits, shared memory, alignment, 2**31 elements.

The emulation refuses what a device refuses. Of large tensors only the last blocks run: the rest of their memory is
never touched, so that it need not exist.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from smart_fast import inf_norm, l1_norm, l2_norm
from smart_fast.backends.base import DivergenceSpec, Step
from tests import cuda_emulation, oracle
from tests.cuda_emulation import A100, B200, DEVICE, H100, L40, CudaError, Emulated
from tests.helpers import exhaustively

INVALID_VALUE, INVALID_CONFIGURATION, MISALIGNED, INVALID_CLUSTER = 1, 9, 716, 912
STATIC = 544  # bytes of cuda::Shared
DEFAULT = 48 * 1024
ONE_ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
SEED = 2**40 + 12345
NEW = itertools.count(1000)  # multiprocessors, so that a device is a new one: attributes stay once they are set


@pytest.fixture(autouse=True)
def _restored(emulated: Emulated) -> Iterator[None]:
    yield
    emulated.set_device(*DEVICE)
    emulated.run_only(0)


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs whose last rows alone are filled with NaN first: the others are not touched."""

    def lazy(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        if out.dim() > 0 and out.numel() > 0:
            out.view(-1)[-(out.shape[-1] if out.dim() > 1 else 1) :] = math.nan
        return out

    monkeypatch.setattr(cuda_emulation, "new_output", lazy)
    monkeypatch.setattr(cuda_emulation, "check_guards", lambda *outputs: None)


# ---- the emulation refuses what a device refuses ---------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("launch", "error"),
    [
        ({}, 0),
        ({"y": 65535}, 0),
        ({"x": 0}, INVALID_CONFIGURATION),
        ({"x": 2**31}, INVALID_CONFIGURATION),
        ({"y": 65536}, INVALID_CONFIGURATION),
        ({"z": 65536}, INVALID_CONFIGURATION),
        ({"threads": 0}, INVALID_CONFIGURATION),
        ({"threads": 1056}, INVALID_CONFIGURATION),
        ({"shared": DEFAULT - STATIC}, 0),
        ({"shared": DEFAULT - STATIC + 1}, INVALID_VALUE),
        ({"shared": DEFAULT}, INVALID_VALUE),
        ({"shared": DEFAULT, "opt_in": DEFAULT}, 0),
        ({"shared": DEFAULT + 16, "opt_in": DEFAULT}, INVALID_VALUE),
        ({"shared": 64, "opt_in": 227 * 1024 - STATIC}, 0),
        ({"shared": 64, "opt_in": 227 * 1024}, INVALID_VALUE),
        ({"x": 4, "cluster": 2}, 0),
        ({"x": 3, "cluster": 2}, INVALID_CLUSTER),
        ({"x": 16, "cluster": 16}, INVALID_CLUSTER),
    ],
    ids=str,
)
def test_limits(launch: dict[str, int], error: int, emulated: Emulated) -> None:
    emulated.set_device(H100[0], next(NEW), *H100[2:])
    emulated.run_only(1)
    asked = {"x": 1, "y": 1, "z": 1, "threads": 32, "shared": 64, "opt_in": 0, "cluster": 1} | launch
    out = torch.full((4,), math.nan)
    assert emulated.library.probe(out.data_ptr(), *asked.values()) == error
    assert (out == 1).all() or error


def test_clusters_need_a_device_that_has_them(emulated: Emulated) -> None:
    emulated.set_device(*A100)
    out = torch.zeros(4)
    assert emulated.library.probe(out.data_ptr(), 4, 1, 1, 32, 64, 0, 2) == INVALID_CLUSTER


def test_misaligned_vectors(emulated: Emulated) -> None:
    out = torch.zeros(8)
    skip = -out.data_ptr() // 4 % 4
    for offset, error in ((skip, 0), (skip + 1, MISALIGNED), (skip + 2, MISALIGNED)):
        assert emulated.library.probe(out[offset:].data_ptr(), 1, 1, 1, 32, 64, 0, 1) == error


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize(
    "call", ["cudaGetDevice(&id)", "cuda::current_device(device)", "launch(nullptr)", "cuda::perturb({}, nullptr)"]
)
def test_unchecked_return_codes_do_not_compile(call: str) -> None:
    """What nobody checks does not get past the compiler of the emulation."""
    source = """
        #include "cuda/launch.h"
        using namespace smart_fast;
        [[nodiscard]] inline cudaError_t launch(void (*kernel)(int)) {
          return cuda::launch(kernel, cuda::Config{dim3(1), dim3(1)}, nullptr, 1);
        }
        void use(int id, cuda::Device device) { CALL; (void)id; (void)device; }
    """
    for statement, works in ((f"(void)({call} == cudaSuccess)", True), (call, False)):
        done = subprocess.run(
            ["g++", *cuda_emulation.FLAGS, "-fsyntax-only", "-x", "c++", "-"],
            input=source.replace("CALL", statement), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode == 0) == works, done.stderr
        assert works or "unused-result" in done.stderr


# ---- launches of every kernel ----------------------------------------------------------------------------------------


def operations(emulated: Emulated, x: Tensor, t: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """Every kernel on rows ``[N, width]``."""
    seed, upstream = torch.tensor([SEED]), torch.tensor(1.3)
    stats = torch.zeros(len(x), cuda_emulation.STATISTICS)
    found: dict[str, Callable[[], object]] = {
        "perturb": lambda: emulated.perturb(x, seed, 0.5, mask),
        "perturb, noise kept": lambda: emulated.perturb(x, seed, 0.5, mask, True),
        "fisher": lambda: emulated.fisher_direction(x, False),
        "fisher, wide": lambda: emulated.fisher_direction(x, True),
        "parts of slices": lambda: emulated.divergence_parts(x, t, DivergenceSpec("kl", "rows"), mask),
    }
    for norm, update in itertools.product((inf_norm, l2_norm, l1_norm), ("smart-pytorch", "paper")):
        step = Step(norm, 0.1, 0.5, 0.01, update)
        found[f"ascend {norm.__name__} {update}"] = lambda step=step: emulated.ascend(x, t, seed, step, mask, False)
    for kind, output in itertools.product(("kl", "sym_kl", "js"), ("sum", "rows", "terms")):
        spec = DivergenceSpec(kind, output)
        grad = {"sum": upstream, "rows": upstream.expand(len(x)), "terms": upstream.expand(x.shape)}[output]
        found[f"{kind} {output}"] = lambda spec=spec: emulated.divergence_forward(x, t, spec, mask)
        found[f"{kind} {output} backward"] = lambda spec=spec, grad=grad: emulated.divergence_backward(
            grad, x, t, stats, spec, mask, True, True
        )
        found[f"{kind} {output} finish"] = lambda spec=spec: emulated.divergence_finish(x, t, stats, spec, mask)
    return found


NAMES = list(operations(None, torch.zeros(1, 1), torch.zeros(1, 1), None))  # type: ignore[arg-type]
#: Where csrc/cuda writes one number a row, or one element at a time: nothing there need be aligned.
NO_VECTORS = {"parts of slices"} | {n for n in NAMES if n.endswith("finish") or n.endswith("terms backward")}
NO_VECTORS |= {n for n in NAMES if n.endswith("sum") or n.endswith("rows")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_VECTORS])
def test_misaligned_outputs_are_found(
    name: str, dtype: torch.dtype, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are 16-byte aligned by contract: a kernel that is given others would fault."""
    x, t = (torch.randn(4, 512).to(dtype) for _ in range(2))
    operations(emulated, x, t, None)[name]()

    def misaligned(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        out = torch.empty(math.prod(shape) + 16, dtype=dtype)
        first = -out.data_ptr() % 16 // out.element_size() + 1
        return out[first : first + math.prod(shape)].view(shape)

    monkeypatch.setattr(cuda_emulation, "new_output", misaligned)
    monkeypatch.setattr(cuda_emulation, "check_guards", lambda *outputs: None)
    with pytest.raises(CudaError, match="Misaligned"):
        operations(emulated, x, t, None)[name]()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_misaligned_inputs_are_read_another_way(name: str, emulated: Emulated) -> None:
    for dtype, width in itertools.product((torch.float32, torch.bfloat16), (512, 515)):
        base = torch.randn(2, 3 * width + 9).to(dtype)
        for first in (1, 2, 8):
            x, t = (each[first : first + 3 * width].view(3, width) for each in base)
            operations(emulated, x, t, torch.tensor([True, False, True]))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_launched_for_no_elements(name: str, emulated: Emulated) -> None:
    results = operations(emulated, torch.zeros(0, 40), torch.zeros(0, 40), None)[name]()
    for each in results if isinstance(results, tuple) else (results,):
        assert each is None or each.numel() == 0 or (each.numel() == 1 and float(each) == 0)


DEVICES = [
    pytest.param(H100, id="H100"),
    *(
        pytest.param(device, id=name, marks=pytest.mark.exhaustive)
        for name, device in {"A100": A100, "L40": L40, "B200": B200}.items()
    ),
]
#: Around every change of layout: registers, shared memory (one to three and more chunks of 512 threads), clusters.
FEW_WIDTHS = (4094, 8193, 12289, 32000, 128256)
WIDTHS = (6144, 8192, 9001, 12288, 16384, 24576, 32768, 49152, 65536, 151936)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "widths"), [(64, FEW_WIDTHS), *exhaustively((64, WIDTHS), (8192, FEW_WIDTHS + WIDTHS))]
)
@pytest.mark.usefixtures("lazily")
def test_shared_memory_of_long_rows(
    rows: int, widths: tuple[int, ...], device: tuple[int, int, int, int], emulated: Emulated
) -> None:
    """Static and dynamic shared memory together, by width, dtype and alignment; and the result of the last row."""
    emulated.set_device(*device)
    emulated.run_only(1)
    for width, (left, right, skip) in itertools.product(
        widths, [(torch.bfloat16, torch.bfloat16, 0), (torch.float32, torch.float32, 0),
                 (torch.bfloat16, torch.float32, 0), (torch.float32, torch.float32, 1)],
    ):  # fmt: skip
        x, t = (torch.empty(rows * width + skip, dtype=dtype)[skip:].view(rows, width) for dtype in (left, right))
        t[-1] = torch.randn(width)
        x[-1] = t[-1] + 0.1 * torch.randn(width)
        losses, _ = emulated.divergence_forward(x, t, DivergenceSpec("sym_kl", "rows"), None)
        exact = oracle.divergence_rows("sym_kl", x[-1:], t[-1:], 1.0)
        assert abs(float(losses[-1] / exact) - 1) < 1e-5, (width, left, right, skip)


def test_devices_are_asked_once(emulated: Emulated) -> None:
    x, t = torch.randn(2, 20000), torch.randn(2, 20000)
    spec = DivergenceSpec("kl", "sum")
    emulated.set_device(9, next(NEW), 228 * 1024, 227 * 1024)
    emulated.run_only(1)
    asked = emulated.library.device_queries()
    emulated.divergence_forward(x, t, spec, None)
    assert emulated.library.device_queries() - asked == 4
    emulated.divergence_forward(x, t, spec, None)
    assert emulated.library.device_queries() - asked == 4


# ---- more than 2**31 elements ----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [30522, 32768])
@pytest.mark.usefixtures("lazily")
def test_more_than_two_to_the_31_elements(width: int, emulated: Emulated) -> None:
    """The last row of every kernel, whose elements no 32-bit number counts."""
    rows = 2**31 // width + 5
    assert rows * width > 2**31
    emulated.set_device(*H100)
    emulated.run_only(17, rows)  # as many as share the tiles of a row
    x, t = (torch.empty(rows, width, dtype=torch.bfloat16) for _ in range(2))
    t[-1] = torch.randn(width)
    x[-1] = t[-1].float() + 0.1 * torch.randn(width)
    last_x, last_t = x[-1:].double(), t[-1:].double()

    def last(value: Tensor) -> Tensor:
        return value[-1:] if value.dim() > 1 else value.view(-1)[-1:]

    noise = 0.5 * torch.from_numpy(oracle.philox_normal(SEED, width, (rows - 1) * width)).view(1, width)
    seed, mask = torch.tensor([SEED]), torch.ones(rows, dtype=torch.bool)
    for given in (None, mask):
        perturbed, _ = emulated.perturb(x, seed, 0.5, given)
        assert oracle.relative_error(last(perturbed), last_x + noise) < ONE_ULP[torch.bfloat16]
    for update in ("smart-pytorch", "paper"):
        moved, _ = emulated.ascend(x, t, seed, Step(inf_norm, 0.5, 0.1, 0.01, update), mask, False)
        want = last_x + oracle.ascend(noise, last_t, update, "inf", "row", 0.1, 0.01, None)
        assert oracle.relative_error(last(moved), want) < ONE_ULP[torch.bfloat16]
    for kind in ("kl", "sym_kl", "js", "jsd"):
        alpha = 0.3 if kind == "jsd" else 1.0
        spec = DivergenceSpec(kind, "rows", alpha)
        losses, stats = emulated.divergence_forward(x, t, spec, mask)
        exact = oracle.divergence_rows(kind, last_x, last_t, alpha)
        assert oracle.relative_error(last(losses), exact) < 1e-5
        terms, _ = emulated.divergence_forward(x, t, spec._replace(output="terms"), None)
        assert oracle.relative_error(last(terms), oracle.divergence_terms(kind, last_x, last_t, alpha)) < 2**-7
        finished = emulated.divergence_finish(x, t, stats, spec, mask)
        finished = alpha * finished[:, 0] + (1 - alpha) * finished[:, 1] if kind == "jsd" else finished[:, 0]
        assert oracle.relative_error(last(finished), exact) < 1e-5
        want = oracle.divergence_grads(kind, last_x, last_t, alpha, torch.ones(1, width))
        for output, grad in (("rows", torch.ones(1).expand(rows)), ("terms", torch.ones(1, 1).expand(rows, width))):
            arguments = grad, x, t, stats, spec._replace(output=output), mask, True, True
            for value, reference in zip(emulated.divergence_backward(*arguments), want, strict=True):
                assert oracle.relative_error(last(value), reference) < ONE_ULP[torch.bfloat16]
    parts = emulated.divergence_parts(x, t, DivergenceSpec("kl", "rows"), mask)
    assert abs(float(parts[-1, 2]) - float(last_t.max())) <= 1
    direction = emulated.fisher_direction(x, True)
    want = last_x.softmax(-1)
    want[0, int(last_x.argmax())] -= 1
    assert oracle.relative_error(last(direction), want) < 1e-5
