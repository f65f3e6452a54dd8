"""The table of cases under pytest-benchmark: ``pytest bench --benchmark-only``.

Every contestant is checked first, as by ``python -m bench``; a wrong one fails without a time. Times here are of whole
calls on the host's clock, the device synchronized, one contestant after the other: for ratios use ``python -m bench``.
"""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from . import cases, peers
from .measure import input_sets, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = cases.select(DEVICE, quick=True)
WAYS = [
    f"{peers.OURS}{name}, {way}"
    for name in peers.default_backends()
    for way in ("whole logits", "hidden states", "compiled", "CUDA graph")
]
CONTESTANTS = [*(peer.name for peer in peers.roster(DEVICE, peers.default_backends())), *WAYS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case_and_task(request):
    case = request.param
    if case.needs is not None and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"{case.needs} is not installed")
    return case, case.build(DEVICE)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_case(benchmark, case_and_task, name):
    case, task = case_and_task
    field = {each.name: each for each in peers.contestants(task, DEVICE, peers.default_backends())}
    if name not in field:
        pytest.skip("this case has no such contestant")
    contestant = field[name]
    if contestant.run is None:
        pytest.skip(contestant.skipped)
    with torch._inductor.config.patch(fallback_random=case.needs_same_noise):
        inputs = task.inputs(0)
        if contestant.check is None:
            findings = task.check(contestant.run, inputs, contestant.backend)
        else:
            findings = contestant.check(contestant.run, inputs)
    assert not [found for found in findings if found.wrong]

    turn = itertools.cycle(input_sets(task.inputs, DEVICE))

    def call(*arguments):
        contestant.run(*arguments)
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, error=max(found.error for found in findings))
    benchmark.pedantic(call, setup=lambda: (next(turn), {}), rounds=10, warmup_rounds=1)
