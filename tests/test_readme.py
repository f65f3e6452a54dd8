"""Every Python code block of README and docs runs as it stands, and README stays one page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "smart_fast" / "METHOD.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A block behind this line runs with the exhaustive tests only.
LATER = "<!-- exhaustive -->\n"


class Block(NamedTuple):
    page: str
    line: int
    code: str
    exhaustive: bool


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for each in re.finditer(rf"^({LATER})?```(?:python|py)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, each.start(2)) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, each[2], each[1] is not None))
    return found


ALL = blocks()
BLOCKS = list({block.code: block for block in reversed(ALL)}.values())[::-1]  # once, where pages repeat one another


def test_blocks_are_found() -> None:
    fences = sum(len(re.findall(r"^ *(?:```|~~~) *py", page.read_text(), flags=re.MULTILINE)) for page in PAGES)
    assert len(ALL) == fences
    assert sum(block.page == "README.md" for block in BLOCKS) == 3
    assert len({block.page for block in BLOCKS}) >= 12


def test_readme_is_one_page() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    headline = README.read_text().split("<!-- headline -->")[1].split("<!-- /headline -->")[0]
    assert 3 <= len(re.findall(r"^\|", headline, flags=re.MULTILINE)) <= 10  # two of them a header


def test_links_of_readme_lead_somewhere() -> None:
    for page in (README, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r'(?:\]\(|src="|srcset=")(?!https?:)([^)#"]+)', page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.exhaustive if block.exhaustive else (), id=f"{block.page}:{block.line}")
        for block in BLOCKS
    ],
)
def test_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "lightning" in block.code:
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
    if "smart_loss" in names and "trainer" in names:  # what a training loop has logged
        assert 0 < float(names["smart_loss"]) < float("inf")
    elif "loss" in names:
        assert names["loss"].isfinite()
        assert names["loss"].requires_grad
    else:
        assert "assert" in block.code  # a block without a loss checks what it says itself
