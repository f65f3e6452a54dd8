"""Time, memory and bandwidth. Times are seconds of one call, memory and sizes are bytes."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SAMPLE_SECONDS = 2e-3  # short calls are repeated within a sample until the clock no longer matters
MAX_CALLS = 200
MIN_SAMPLES, MAX_SAMPLES = 6, 200  # six: the fewest whose whole range is a 95 % interval
PRECISION = 0.02  # how far from a median its interval may reach
TIGHT_SAMPLES = 20  # what an early end takes: fewer may agree by luck
SLOW_SECONDS = 0.25  # calls this slow need no second warm-up
MAX_SETS = 16
HOST_CALLS = 15
CPU_COLD_BYTES = 256 << 20  # what input sets may take together without a GPU
CUDA_COLD_FACTOR = 4  # input sets fill the L2 cache this many times


@dataclass(frozen=True)
class Timing:
    """Median and quartiles over samples; each sample is the mean of ``calls`` consecutive calls.

    ``low`` and ``high``: the `interval` of the median; None in results of older versions.
    """

    median: float
    q1: float
    q3: float
    samples: int
    calls: int
    low: float | None = None
    high: float | None = None

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.median

    def shared_by(self, count: int) -> Timing:
        """Of one of ``count`` equal parts."""
        low, high = (None if each is None else each / count for each in (self.low, self.high))
        return Timing(self.median / count, self.q1 / count, self.q3 / count, self.samples, self.calls, low, high)


@dataclass(frozen=True)
class Samples:
    """The samples of one run, one a round, in seconds; each is the mean of ``calls`` consecutive calls."""

    seconds: list[float]
    calls: int

    def timing(self) -> Timing:
        q1, median, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return Timing(median, q1, q3, len(self.seconds), self.calls, *interval(self.seconds))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median, whatever the distribution: two of the sorted ``values``.

    The number of values below the median is binomial. Fewer than `MIN_SAMPLES` values give no such interval: then it is
    their whole range, which covers the median less often (one of two values lies on either side half of the time).
    """
    ordered, count = sorted(values), len(values)
    cut, tail = 0, 0.0  # how many to leave out at either end, and the chance that the median is below what remains
    while (tail := tail + math.comb(count, cut) * 0.5**count) <= 0.025:
        cut += 1
    return ordered[max(0, cut - 1)], ordered[count - max(1, cut)]


def within(value: float, low: float, high: float) -> bool:
    """Whether ``low`` and ``high`` are within `PRECISION` of ``value``."""
    return max(high - value, value - low) <= PRECISION * value


def speed_interval(rivals: Sequence[Samples], mine: Samples) -> tuple[float, float]:
    """The interval of the time of the fastest of ``rivals`` over that of ``mine``.

    Made of the ratios of every round, in which what slows both cancels. Any rival may be the fastest in truth: the ends
    are the least of those of all. Widened where need be to hold the ratio of the medians, which is what is printed.
    """
    ends = [interval([r / m for r, m in zip(each.seconds, mine.seconds, strict=True)]) for each in rivals]
    speed = min(statistics.median(each.seconds) for each in rivals) / statistics.median(mine.seconds)
    return min(speed, *(low for low, _ in ends)), max(speed, min(high for _, high in ends))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def size_of(values: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(values) if isinstance(t, Tensor))


def input_sets(make: Callable[[int], tuple[Any, ...]], device: torch.device) -> list[tuple[Any, ...]]:
    """Enough sets of inputs that a set has left the cache when its turn comes again.

    On CPU at least two and at most what `CPU_COLD_BYTES` holds: inputs of a few KiB stay cached there, for everyone.
    """
    first = make(0)
    if device.type == "cuda":
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(MAX_SETS, math.ceil(CUDA_COLD_FACTOR * l2 / size_of(first)))
    else:
        count = max(2, min(MAX_SETS, CPU_COLD_BYTES // size_of(first)))
    return [first, *(make(seed) for seed in range(1, count))]


def interleaved(
    runs: dict[str, Callable[..., Any]], sets: Sequence[tuple[Any, ...]], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """What `interleaved_samples` come to."""
    return {name: each.timing() for name, each in interleaved_samples(runs, sets, device, seconds).items()}


def interleaved_samples(
    runs: dict[str, Callable[..., Any]],
    sets: Sequence[tuple[Any, ...]],
    device: torch.device,
    seconds: float,
) -> dict[str, Samples]:
    """Time every run in turn, one sample each a round, until each median is known to `PRECISION` or ``seconds`` have
    passed.

    Slow calls may take up to four times that to reach `MIN_SAMPLES`, and get two samples at the least.
    Each round starts with another run. Inputs go around over all calls of all runs, so that nobody finds the inputs
    that another has just brought into the cache.
    """
    turn = itertools.cycle(sets)
    calls = {name: _calls_per_sample(run, turn, device) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    start = time.perf_counter()
    for done in range(MAX_SAMPLES):
        spent = time.perf_counter() - start
        if spent > (seconds if done >= MIN_SAMPLES else 4 * seconds) and done >= 2:
            break
        if done >= TIGHT_SAMPLES and all(within(statistics.median(s), *interval(s)) for s in samples.values()):
            break
        for name in order:
            samples[name].append(_sample(runs[name], turn, calls[name], device))
        order.append(order.pop(0))
    return {name: Samples(values, calls[name]) for name, values in samples.items()}


def _calls_per_sample(run: Callable[..., Any], turn: Any, device: torch.device) -> int:
    """How many calls make a sample long enough; warms up on the way."""
    one = _sample(run, turn, 1, device)
    for _ in range(3 if one < SLOW_SECONDS else 0):
        one = min(one, _sample(run, turn, 1, device))
    return max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / one)))


def _sample(run: Callable[..., Any], turn: Any, calls: int, device: torch.device) -> float:
    arguments = [next(turn) for _ in range(calls)]
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        begin.record()
        for each in arguments:
            run(*each)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls
    begin_time = time.perf_counter()
    for each in arguments:
        run(*each)
    return (time.perf_counter() - begin_time) / calls


def host_time(
    run: Callable[..., Any], sets: Sequence[tuple[Any, ...]], device: torch.device, calls: int = HOST_CALLS
) -> float:
    """Seconds until a call returns, the device idle when it starts and not waited for: the median of ``calls``."""
    times = []
    for arguments in itertools.islice(itertools.cycle(sets), calls):
        synchronize(device)
        begin = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - begin)
    synchronize(device)
    return statistics.median(times)


def busy_share() -> float | None:
    """The share of the processors in use while this process sleeps for a third of a second; None without psutil."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    return psutil.cpu_percent(interval=0.3) / 100


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read plus bytes written per second by `Tensor.copy_` of ``size`` bytes: the median of nine copies."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sets = [(target, source), (source, target)]
    turn = itertools.cycle(sets)
    for _ in range(2):
        torch.Tensor.copy_(*next(turn))
    return 2 * size / statistics.median(_sample(torch.Tensor.copy_, turn, 1, device) for _ in range(9))


def gemm_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOPs per second of a square GEMM that keeps the whole device busy: the fastest of five."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    turn = itertools.cycle([(a, b), (b, a)])

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out=out)

    _sample(multiply, turn, 1, device)
    return 2 * side**3 / min(_sample(multiply, turn, 1, device) for _ in range(5))


def peak_memory(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> int:
    """The most memory that one call holds at a time beyond what was allocated before it, results included.

    CUDA: the caching allocator's maximum. CPU: every allocation and release that torch's allocator reports to the
    profiler, summed in order of time; memory that a library takes past that allocator is not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(*arguments)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        results = run(*arguments)
    del results
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)
