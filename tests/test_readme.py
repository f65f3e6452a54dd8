"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == 14


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "lightning" in EXAMPLES[index]:
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(EXAMPLES[index], f"README example {index}", "exec"), names)
    if "smart_loss" in names and "trainer" in names:  # what a training loop has logged
        assert 0 < float(names["smart_loss"]) < float("inf")
        return
    loss = names["loss"]
    assert loss.isfinite()
    assert loss.requires_grad
