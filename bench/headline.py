"""README's one table: what its readers do, in words, timed on one device; and all that was measured on that device."""

from __future__ import annotations

from collections.abc import Sequence

from .peers import COMPILED, EAGER, OURS
from .report import Report, duration
from .run import Row

NATIVE = OURS + "native"
#: At most eight, in README's order.
CASES = {
    "perturb [4096, 768] fp32": "noise added to 4096 embeddings of 768",
    "ascend inf [4096, 768] fp32": "an ascent step of them",
    "sym_kl fwd+bwd far [1024, 30522] fp32": "symmetric KL, 1024 rows of 30522 logits",
    "lm-divergence sym_kl fwd+bwd far [512, 151936] bf16": "symmetric KL, 512 rows of 151936 logits, bfloat16",
    "lm-linear sym_kl far [2048, 512] x [512, 32000] fp32": "symmetric KL from hidden states, 2048 x 512 to 32000",
    "pooled head 768 to 3, [32, 768]": "SMART on a head of three classes",
    "masked LM 2x128, V=30522, [8, 64]": "SMART on a small masked language model",
    "bert-base classifier 12x768, [2, 32]": "SMART on a BERT-base classifier",
}


def report_of(reports: Sequence[Report]) -> Report:
    """Everything from the device that most of `CASES` were timed on, as one report in the environment of the first."""
    timed = {
        device: len({row.case for each in reports if _device(each) == device for row in each.rows} & set(CASES))
        for device in dict.fromkeys(map(_device, reports))
    }
    device = max(timed, key=lambda each: timed[each])
    chosen = [each for each in reports if _device(each) == device]
    return Report(
        chosen[0].environment,
        copy_rate=max((each.copy_rate for each in chosen if each.copy_rate), default=None),
        busy=max((each.busy for each in chosen if each.busy is not None), default=None),
        rows=[row for each in chosen for row in each.rows],
        gemm_rates={dtype: rate for each in chosen for dtype, rate in each.gemm_rates.items()},
    )


def _device(report: Report) -> str:
    return str(report.environment["device"])


def table(report: Report) -> list[list[str]]:
    """Header and rows."""
    lines = [["", "smart-pytorch", "torch.compile of it", "smart-fast", "x smart-pytorch", "x torch.compile", "memory"]]
    for case, words in CASES.items():
        found = {row.contestant: row for row in report.rows if row.case == case and row.timing is not None}
        if NATIVE not in found or EAGER not in found:
            continue
        ours = found[NATIVE]
        rivals = [found.get(name) for name in (EAGER, COMPILED)]
        times = [_time(each) for each in (*rivals, ours)]
        ratios = ["" if each is None else f"{_median(each) / _median(ours):.2f}" for each in rivals]
        eager = found[EAGER].peak
        share = f"{ours.peak / eager:.0%}" if ours.peak and eager else ""
        lines.append([words, *times, *ratios, share])
    return lines


def _median(row: Row) -> float:
    assert row.timing is not None
    return row.timing.median


def _time(row: Row | None) -> str:
    return "" if row is None else duration(_median(row))
