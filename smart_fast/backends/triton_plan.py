"""Launch plans: what a launcher of `triton_launch` did for one call, done again for calls that are like it.

Triton's own launch of a compiled kernel binds, specializes and hashes some thirty arguments, which costs the host more
than all else together. A plan keeps what came of that: the compiled kernels and their grids, the outputs that were
allocated, and where each argument of a kernel came from: a tensor of the call, an output, a number of the call, or a
constant. To run it takes the allocations and one call into each compiled kernel. Where the native extension is loaded,
the launchers of an ordinary step have their plans in C++ (csrc/plans.h), which asks this file to record them.

A plan is found by everything that launchers and Triton's specialization look at: of each tensor dtype, shape, strides,
device and alignment (all integers that kernels see are functions of these), and every other argument but the numbers,
which are passed on at each call. `KEYED` numbers decide what is compiled and count among the others.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..kernels import tuning
from .base import new_output as allocate

ALIGNMENT = 16  # bytes: what Triton's specialization asks about a pointer
allocate_strided = torch.empty_strided  # of strides, as allocate: a shape alone takes torch twice as long to read
MOST = 2048  # plans of a launcher; when there are more, they are forgotten
KEYED = ("scale",)


# ---- what launchers call ---------------------------------------------------------------------------------------------


class _Recording(threading.local):
    def __init__(self) -> None:
        #: What the launcher that is being recorded on this thread allocated, and the sums that it took of that.
        self.outputs: list[Tensor] | None = None
        self.totals: list[tuple[Tensor, Tensor]] = []


_recording = _Recording()


def new_output(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`base.new_output`."""
    out = allocate(tuple(shape), dtype, device)
    if _recording.outputs is not None:
        _recording.outputs.append(out)
    return out


def total(losses: Tensor) -> Tensor:
    """The sum of an output."""
    summed = losses.sum()
    if _recording.outputs is not None:
        _recording.totals.append((summed, losses))
    return summed


# ---- recording -------------------------------------------------------------------------------------------------------


class _Number(float):
    """A number of the call that is recorded, or a multiple of it, to be known again among the arguments of a kernel."""

    place: int
    factor: float | None

    def __new__(cls, value: float, place: int, factor: float | None = None) -> _Number:
        made = super().__new__(cls, value)
        made.place, made.factor = place, factor
        return made

    def __mul__(self, constant: float) -> _Number:
        return _Number(float(self) * constant, self.place, constant)

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("launchers pass numbers on, at most times one of KEYED: anything else a plan would not repeat")

    __add__ = __radd__ = __sub__ = __rsub__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __neg__ = __abs__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = float.__hash__


class _Recorded(NamedTuple):
    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


class _Recorder(list[_Recorded]):
    """What a launcher that is recorded wraps its kernels in. They are launched as ever."""

    def __call__(self, kernel: Any) -> Any:
        launched = self

        class Wrapped:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*args: Any, **named: Any) -> None:
                    plain = [float(each) if type(each) is _Number else each for each in args]
                    compiled = kernel[grid](*plain, **named)
                    values = dict(zip(kernel.arg_names, args, strict=False)) | named
                    in_order = [values[name] for name in kernel.arg_names]
                    launched.append(_Recorded(None if kernel.pre_run_hooks else compiled, (*grid, 1, 1)[:3], in_order))

                return launch

        return Wrapped()


class _Launch(NamedTuple):
    """A call of Triton's launcher ``run`` of a compiled kernel, whose arguments are at these places."""

    run: Any
    grid: tuple[int, ...]
    function: Any
    metadata: Any
    places: tuple[int, ...]
    arguments: Callable[[list[Any]], tuple[Any, ...]]


class Place(NamedTuple):
    """What differs from call to call among the arguments of a launch: of a plan's row of values, times a factor."""

    place: int
    factor: float = 1.0


@dataclass
class _Plan:
    """What takes the place of a launcher. Arguments of kernels are places in one row of values: the pointers of the
    call's tensors, its numbers, the pointers of its outputs, constants."""

    device: torch.device
    #: Of a device's index: the stream that is current there.
    current_stream: Callable[[Any], int]
    #: Shape, strides and dtype of each output; or an empty one itself, which every call shares.
    outputs: list[tuple[Any, Any, torch.dtype] | Tensor]
    constants: list[Any] = field(default_factory=list)
    #: Constants that are a number of the call times a factor: their place, that of the number, the factor.
    multiples: list[tuple[int, int, float]] = field(default_factory=list)
    launches: list[_Launch] = field(default_factory=list)
    #: Of the outputs, what the launcher returned.
    results: tuple[int, ...] = (0,)
    #: The outputs of which their sum is returned.
    totals: tuple[int, ...] = ()

    def __call__(self, values: list[Any]) -> Any:
        """``values``: the pointers of the call's tensors and its numbers."""
        outputs: list[Tensor] = []
        for each in self.outputs:
            if isinstance(each, tuple):
                shape, stride, dtype = each
                each = allocate_strided(shape, stride, dtype=dtype, device=self.device)
            outputs.append(each)
            values.append(each.data_ptr())
        values += self.constants
        for place, number, factor in self.multiples:
            values[place] = values[number] * factor
        stream = self.current_stream(self.device.index)
        for run, grid, function, metadata, _, arguments in self.launches:
            run(*grid, stream, function, metadata, None, None, None, *arguments(values))
        for place in self.totals:
            outputs[place] = outputs[place].sum()
        return operator.itemgetter(*self.results)(outputs)

    def calls(self, first_constant: int) -> list[tuple[Any, tuple[Any, ...]]]:
        """A function and its arguments for each launch, among them `Place`, the first constant's for the stream."""
        numbers = {place: Place(number, factor) for place, number, factor in self.multiples}

        def argument(place: int) -> Any:
            if place < first_constant:
                return Place(place)
            return numbers.get(place, self.constants[place - first_constant])

        return [
            inmost(
                each.run, (*each.grid, Place(first_constant), each.function, each.metadata, None, None, None,
                           *map(argument, each.places)),
            )
            for each in self.launches
        ]  # fmt: skip


def inmost(run: Any, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """What Triton's launcher ``run`` calls of these arguments, and with which; where that is not plain to see, itself.

    A copy of it tells. Its Python is a tenth of the host time of a small step (``python -m bench host``).
    """
    calls: list[tuple[Any, ...]] = []
    try:
        copied = copy.copy(run)
        launch, copied.launch = copied.launch, lambda *args: calls.append(args)
        copied(*given)
        (arguments,) = calls
    except Exception:  # another kind of launcher, or one that allocates
        return run, given
    tuples = [each for each in arguments if type(each) is tuple and any(isinstance(item, Place) for item in each)]
    flat = [item for each in arguments for item in (each if each in tuples else (each,))]
    differing = [id(item) for item in flat if isinstance(item, Place)]
    passed_on = differing == [id(item) for item in given if isinstance(item, Place)] and len(tuples) <= 1
    if not passed_on or any(isinstance(item, Tensor) for item in flat):
        return run, given
    return launch, arguments


def _plan(
    launched: _Recorder, pointers: list[int | None], numbers: int, outputs: list[Tensor],
    totals: list[tuple[Tensor, Tensor]], result: Any,
) -> _Plan | None:  # fmt: skip
    """The plan of what was recorded; None where it cannot be done again like that: a kernel took a tensor that is
    neither the call's nor an output (a copy), or was not compiled by what is known here."""
    first_output = len(pointers) + numbers
    first_constant = first_output + len(outputs)
    results = [result] if isinstance(result, Tensor) else list(result)
    handed = list(outputs)  # as they are handed out: a view of an output stands for it
    found, summed = [], []
    for each in results:
        source = next((losses for sum_of, losses in totals if sum_of is each), each)
        place = next((k for k, out in enumerate(outputs) if _same(source, out)), None)
        if place is None:
            return None
        if source is each:
            handed[place] = each
        else:
            summed.append(place)
        found.append(place)
    plan = _Plan(
        outputs[0].device,
        driver.active.get_current_stream,
        [(tuple(each.shape), each.stride(), each.dtype) if each.numel() else each for each in handed],
        results=tuple(found),
        totals=tuple(summed),
    )
    for compiled, grid, arguments in launched:
        if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            return None
        places = []
        for value in arguments:
            if isinstance(value, Tensor):
                place = next((first_output + k for k, out in enumerate(outputs) if value is out), None)
                if place is None and value.data_ptr() in pointers:
                    place = pointers.index(value.data_ptr())
                if place is None:
                    return None
            elif type(value) is _Number and value.factor is None:
                place = len(pointers) + value.place
            else:
                place = first_constant + len(plan.constants)
                if type(value) is _Number and value.factor is not None:
                    plan.multiples.append((place, len(pointers) + value.place, value.factor))
                plan.constants.append(value)
            places.append(place)
        plan.launches.append(
            _Launch(
                compiled.run, grid, compiled.function, compiled.packed_metadata, tuple(places),
                operator.itemgetter(*places),
            )
        )  # fmt: skip
    return plan


def _same(result: Tensor, output: Tensor) -> bool:
    """Whether a result is an output, or all of it in another shape."""
    if result is output or output.numel() == 0:
        return result is output
    return result.data_ptr() == output.data_ptr() and result.numel() == output.numel() and result.is_contiguous()


# ---- calling ---------------------------------------------------------------------------------------------------------


class Planned:
    """A launcher that is planned. To be called on the device of its tensors, as the launcher is."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        kinds = {name: each.annotation for name, each in inspect.signature(launcher).parameters.items()}
        order = [name for name in kinds if name != "wrap"]
        self._tensors = [k for k, name in enumerate(order) if kinds[name].startswith("Tensor")]
        self._numbers = [k for k, name in enumerate(order) if kinds[name] == "float" and name not in KEYED]
        others = [k for k in range(len(order)) if k not in {*self._tensors, *self._numbers}]
        self._numbers_of, self._others_of = _getter(self._numbers), _getter(others)
        self._plans: dict[Any, _Plan | None] = {}

    @property
    def plans(self) -> int:
        """How many plans there are now."""
        return sum(each is not None for each in self._plans.values())

    def __call__(self, *args: Any) -> Any:
        key: list[Any] = [self._others_of(args)]
        pointers: list[Any] = []
        for k in self._tensors:
            tensor = args[k]
            if tensor is None:
                key.append(None)
                pointers.append(None)
            else:
                pointer = tensor.data_ptr()
                key += tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device(), pointer % ALIGNMENT
                pointers.append(pointer)
        found = tuple(key)
        plan = self._plans.get(found)
        if plan is None and found not in self._plans:
            return self._record(found, pointers, args)
        if plan is None or tuning.overriding or _hooked():
            return self.launcher(*args)
        return plan([*pointers, *self._numbers_of(args)])

    def _record(self, key: Any, pointers: list[int | None], args: tuple[Any, ...]) -> Any:
        known = [each for each in pointers if each]
        twice = len(set(known)) < len(known)  # of one tensor passed twice nobody can tell which a kernel was given
        if twice or tuning.overriding or _hooked() or driver.active.get_current_target().backend != "cuda":
            return self.launcher(*args)
        result, plan = self.recorded(pointers, args)
        if len(self._plans) >= MOST:
            self._plans.clear()
        self._plans[key] = plan
        return result

    def recorded(self, pointers: list[int | None], args: tuple[Any, ...]) -> tuple[Any, _Plan | None]:
        """Calls the launcher: what it returns, and a plan of what it did, if there can be one."""
        given = list(args)
        for place, k in enumerate(self._numbers):
            given[k] = _Number(args[k], place)
        recorder = _Recorder()
        outputs: list[Tensor] = []
        totals: list[tuple[Tensor, Tensor]] = []
        _recording.outputs, _recording.totals = outputs, totals
        try:
            result = self.launcher(*given, wrap=recorder)
        finally:
            _recording.outputs, _recording.totals = None, []
        return result, _plan(recorder, pointers, len(self._numbers), outputs, totals, result)

    def record(self, *args: Any) -> tuple[tuple[Tensor, ...], _Plan | None]:
        """`recorded` as C++ asks for it, of tensors that are not passed twice."""
        if driver.active.get_current_target().backend != "cuda":
            result, plan = self.launcher(*args), None
        else:
            pointers = [None if args[k] is None else args[k].data_ptr() for k in self._tensors]
            result, plan = self.recorded(pointers, args)
        return (result,) if isinstance(result, Tensor) else tuple(result), plan


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes those of a tuple's elements, as a tuple."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple([values[k] for k in places])


def use(extension: Any, launchers: dict[str, Planned]) -> None:
    """Have these launchers, by name, called and planned by the C++ of ``extension``."""
    given = {name: (each.launcher, each.record) for name, each in launchers.items()}
    extension.triton.use(given, tuning.overriding, knobs.runtime, MOST)


def _hooked() -> bool:
    """Whether somebody, a profiler say, wants to know of every launch by Triton."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
