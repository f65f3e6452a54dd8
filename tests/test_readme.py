"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index: int) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(EXAMPLES[index], f"README example {index}", "exec"), names)
    loss = names["loss"]
    assert loss.isfinite()
    assert loss.requires_grad
