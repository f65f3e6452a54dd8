"""What the plans and nodes of csrc/triton.cpp do, on a stub of the CUDA driver: run by test_triton_native.py.

    python tests/plan_native_checks.py     one JSON line a check: its name, and what is wrong or null

The machinery, and the calls whose launches are compared with the launchers' own, are those of plan_checks.py.
"""

from __future__ import annotations

import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from smart_fast.kernels import tuning
from torch import Tensor

from smart_fast import SMARTLoss, build, sym_kl_loss
from smart_fast.backends import registry, triton_launch, triton_plan
from smart_fast.backends.triton import TRITON, Triton
from tests.helpers import report_checks
from tests.plan_checks import CALLS, STUB, described, launched, number, without_bodies

EXTENSION: Any = build.load()
OURS = EXTENSION.triton
PLAIN = "kl", "sum", 1.0, 1.0, 1.0, False
ANY = "kl", "rows", 1.0, 1.0, 1.0, False


def fresh() -> Triton:
    """The backend without a plan."""
    return Triton(EXTENSION)


def same(ours: Callable[..., Any], theirs: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What ``ours`` returns, whose launches are those of ``theirs``."""
    found, result = launched(ours, args)
    expected, plain = launched(theirs, args)
    assert found
    assert found == expected, f"{args}\n{found}\n{expected}"
    assert described(result) == described(plain)
    return result


def calls_of(launcher: Any) -> list[tuple[Any, ...]]:
    """The calls of plan_checks.py, each three times over with other tensors: to record, to run, to run again."""
    return [make() for _ in range(3) for make in CALLS[launcher]()]


def check_launches_of_perturb() -> None:
    fresh()
    for embed, _, *rest in calls_of(triton_launch.perturb):
        seed = torch.zeros(1, dtype=torch.int64)
        same(
            lambda embed, *rest: OURS.perturb(embed, None, *rest),
            lambda embed, *rest, seed=seed: (triton_launch.perturb(embed, seed, *rest), seed),
            (embed, *rest),
        )
    assert OURS.plans("perturb") > 10


def check_launches_of_ascend() -> None:
    fresh()
    for args in calls_of(triton_launch.ascend):
        same(OURS.ascend, triton_launch.ascend, args)
    assert OURS.plans("ascend") > 10


def check_launches_of_divergence_forward() -> None:
    fresh()
    for input, target, mask, *spec, keep in calls_of(triton_launch.divergence_forward):
        input.requires_grad_(keep)
        same(
            lambda *args: OURS.divergence(*args).detach(),
            lambda *args, keep=keep: triton_launch.divergence_forward(*args, keep)[0],
            (input, target, mask, *spec),
        )
    assert OURS.plans("divergence_forward") > 10


def check_launches_of_divergence_backward() -> None:
    fresh()
    for grad, input, target, stats, mask, *spec, want_input, want_target in calls_of(triton_launch.divergence_backward):
        loss = OURS.divergence(input.requires_grad_(want_input), target.requires_grad_(want_target), mask, *spec)
        wanted = [each for each in (input, target) if each.requires_grad]

        def ours(grad: Tensor, *_: Tensor, loss: Tensor = loss, wanted: Any = wanted) -> Any:
            return torch.autograd.grad(loss, wanted, grad)

        def theirs(*tensors: Any, rest: Any = (stats, mask, *spec, want_input, want_target)) -> Any:
            return tuple(each for each in triton_launch.divergence_backward(*tensors, *rest) if each.numel())

        same(ours, theirs, (grad, input, target))
    assert OURS.plans("divergence_backward") > 5


def check_launches_of_a_step() -> None:
    """Those of the backend without the extension, numbers and all, where plans are recorded and where they run."""
    state = torch.randn(4, 3)

    def step(backend: Triton, mask: Tensor | None) -> Any:
        smart = SMARTLoss(torch.nn.Linear(8, 3), sym_kl_loss, backend="triton", num_steps=2)
        with mock.patch.dict(registry.state.found, triton=backend):
            embed = torch.zeros(4, 8, requires_grad=True)
            for _ in range(3):
                STUB.record()
                (0.3 * smart(embed, state, mask=mask)).backward()
            found = STUB.launches()
        STUB.record(False)
        return [(each.name, each.grid, [p for p in each.parameters if p < 1 << 40]) for each in found]

    for mask in (None, torch.ones(4, dtype=torch.bool)):
        found = step(fresh(), mask)
        assert found == step(TRITON, mask)
        assert len(found) == 9 if mask is None else len(found) >= 9, len(found)


def check_numbers_are_passed_on() -> None:
    fresh()
    for count in range(20):
        input, target = torch.zeros(2, 8), torch.zeros(2, 8)
        args = input, target, None, "kl", "sum", number(), number(), 1.0, False
        same(OURS.divergence, lambda *args: triton_launch.divergence_forward(*args, False)[0], args)
        assert OURS.plans("divergence_forward") == 1, count


def check_one_tensor_twice() -> None:
    fresh()
    both = torch.zeros(2, 8)
    for pair in ((both, both), (torch.zeros(2, 8), torch.zeros(2, 8)), (both, both)):
        same(OURS.divergence, lambda *args: triton_launch.divergence_forward(*args, False)[0], (*pair, None, *PLAIN))


def check_streams() -> None:
    fresh()
    OURS.perturb(torch.zeros(2, 8), None, 1.0, None, None, "normal")
    for stream in (7, 11, 0):
        STUB.stream = stream
        launches, _ = launched(OURS.perturb, (torch.zeros(2, 8), None, 1.0, None, None, "normal"))
        assert [each.stream for each in launches] == [stream]


def check_hooks_see_every_launch() -> None:
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    fresh()
    args = torch.zeros(2, 8), None, 1.0, None, None, "normal"
    OURS.perturb(*args)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(triton.knobs.runtime, name)
        chain.add(hook)
        OURS.perturb(*args)
        chain.remove(hook)
        with mock.patch.object(triton.knobs.runtime, name, hook):  # as Triton once had it
            OURS.perturb(*args)
        OURS.perturb(*args)
    assert seen == ["perturb_kernel"] * 4, seen


def check_choices_under_test_are_launched() -> None:
    fresh()
    args = torch.zeros(2, 8), None, 1.0, None, None, "normal"
    OURS.perturb(*args)
    with mock.patch.dict(tuning.overriding, perturb=None):
        OURS.perturb(torch.zeros(3, 8), *args[1:])
        assert OURS.plans("perturb") == 1
    OURS.perturb(torch.zeros(3, 8), *args[1:])
    assert OURS.plans("perturb") == 2


def check_few_are_kept_and_threads_share_them() -> None:
    wrong = []

    def work(seed: int) -> None:
        try:
            for count in range(100):
                x = torch.zeros(1 + (seed + count) % 5, 8, requires_grad=True)
                loss = OURS.divergence(x, torch.zeros_like(x), None, *PLAIN)
                (grad,) = torch.autograd.grad(loss, x)
                assert grad.shape == x.shape
        except Exception:
            wrong.append(traceback.format_exc())

    with mock.patch.object(triton_plan, "MOST", 3):
        fresh()
    work(0)  # compiles: Python 3.11's ast.parse, which Triton calls for that, is not made for threads
    assert not wrong, wrong[0]
    STUB.record(False)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong, wrong[0]
    assert STUB.count() == 800
    assert OURS.plans("divergence_forward") <= 3
    assert OURS.plans("divergence_backward") <= 3


def check_another_launcher_is_called_whole() -> None:
    """One whose inmost call is not plain to see, since it allocates, say."""
    calls = []

    class Allocates:
        def launch(self, *args: Any) -> None:
            calls.append(args)

        def __call__(self, *args: Any) -> None:
            self.launch(*args, torch.zeros(1))

    place, run = triton_plan.Place(3), Allocates()
    assert triton_plan.inmost(run, (1, place)) == (run, (1, place))
    assert triton_plan.inmost(len, (1, place)) == (len, (1, place))
    assert not calls


def check_graphs() -> None:
    """Nodes, frozen sides, and a graph that is used twice, or changed under it."""
    fresh()
    for wanted in ((True, True), (True, False), (False, True)):
        x, t = (torch.zeros(2, 8, requires_grad=each) for each in wanted)
        loss = OURS.divergence(x, t, None, *PLAIN)
        assert loss.grad_fn is not None
        assert loss.grad_fn.name() == "SmartFastDivergence"
        loss.backward(retain_graph=True)
        loss.backward()
        assert [each.grad is not None for each in (x, t)] == list(wanted)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    x, t = torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8)
    for _ in range(2):
        loss = OURS.divergence(x, t, torch.ones(2, dtype=torch.bool), *ANY)
        t.add_(1.0)
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.sum().backward()
        (grad,) = torch.autograd.grad(OURS.divergence(x, t, None, *PLAIN), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            grad.sum().backward()
    embed = torch.zeros(2, 8, requires_grad=True)
    moved, _ = OURS.perturb(embed, None, 1.0, torch.tensor([True, False]), None, "normal")
    assert moved.grad_fn.name() == "SmartFastShift"
    moved.mul_(2.0).sum().backward()
    assert embed.grad is not None
    assert embed.grad[:, 0].tolist() == [2.0, 0.0]


def check_without_graphs() -> None:
    fresh()
    x = torch.zeros(2, 8, requires_grad=True)
    args = x, torch.zeros(2, 8), None, *PLAIN
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not OURS.divergence(*args).requires_grad
            assert not OURS.perturb(x, None, 1.0, None, None, "normal")[0].requires_grad
    assert OURS.divergence(*args).requires_grad


def check_the_short_way_takes_what_was_planned() -> None:
    """Else Python is to say whether, and how."""
    backend = fresh()
    assert backend.plain_divergence is not None
    x, t = torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8)
    args = x, t, "kl", "sum", 1.0
    assert backend.plain_divergence(*args) is None
    assert backend.divergence is not None
    OURS.divergence(x, t, None, *PLAIN)
    assert backend.plain_divergence(*args).requires_grad
    with torch.no_grad():
        assert backend.plain_divergence(*args) is None
    assert backend.plain_divergence(torch.zeros(3, 8), torch.zeros(3, 8), "kl", "sum", 1.0) is None


def check_errors_keep_their_type() -> None:
    """Those of a launch in a backward pass too, on whatever thread."""
    fresh()
    x = torch.zeros(2, 8, requires_grad=True)
    refuses = mock.Mock(side_effect=LookupError("refused"))
    with mock.patch.object(triton_launch, "new_output", refuses), pytest.raises(LookupError, match="refused"):
        OURS.perturb(x, None, 1.0, None, None, "normal")
    loss = OURS.divergence(x, torch.zeros(2, 8), None, *PLAIN)
    with mock.patch.object(triton_launch, "new_output", refuses), pytest.raises(LookupError, match="refused"):
        loss.backward()


def check_copies_are_not_planned() -> None:
    fresh()
    for _ in range(3):
        x = torch.zeros(2, 16)[:, ::2]
        same(OURS.divergence, lambda *args: triton_launch.divergence_forward(*args, False)[0], (x, x + 1, None, *PLAIN))


def check_tensors_without_memory_are_not_planned() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fresh()
    with FakeTensorMode() as mode, warnings.catch_warnings(action="ignore"):  # there are pointers that warn
        fake = mode.from_tensor(torch.zeros(2, 8))
        assert type(OURS.divergence(fake, fake, None, *PLAIN)) is type(fake)
    assert OURS.plans("divergence_forward") == 0


def main() -> None:
    checks: dict[str, Callable[[], None]] = {
        name.removeprefix("check_").replace("_", " "): check
        for name, check in globals().items()
        if name.startswith("check_")
    }
    serves = mock.patch.object(Triton, "cannot_serve", return_value=None)
    with (
        tempfile.TemporaryDirectory() as directory,
        STUB,
        serves,
        mock.patch.multiple(triton_launch, **without_bodies(directory)),
    ):
        report_checks(checks)


if __name__ == "__main__":
    main()
