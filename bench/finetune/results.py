"""Runs that were made, a JSON line each: what is there is not made again, wherever the last time was cut short."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from .train import Run


class Results:
    """The lines of ``path`` that are about runs, and those that are about costs. Other processes may add to it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._read_to = 0
        self.refresh()

    def refresh(self) -> None:
        """Take in what was added since. A line without its end, cut by a kill, is none; `add` ends it."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            for line in file:
                if line.endswith(b"\n"):
                    self._read_to += len(line)
                    if (found := _parsed(line)) is not None:
                        self.lines.append(found)

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def of(self, run: Run) -> dict[str, Any] | None:
        """The line of ``run``."""
        key = json.loads(json.dumps(run.key))  # as it is read back
        return next((line for line in self.lines if line.get("run") == key), None)

    @contextlib.contextmanager
    def claimed(self, run: Run) -> Iterator[bool]:
        """Whether no other process is at ``run``; while inside, no other will be. A lock ends with its process."""
        import fcntl  # not there on Windows, where tables can be made all the same

        whole = f"{self.path.resolve()} {json.dumps(run.key, sort_keys=True)}"
        folder = pathlib.Path(tempfile.gettempdir()) / "smart-fast-finetune"
        folder.mkdir(exist_ok=True)
        with open(folder / hashlib.sha256(whole.encode()).hexdigest()[:24], "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self.refresh()  # another may have ended it since
            yield True

    def runs(self, **wanted: Any) -> Iterator[dict[str, Any]]:
        """Lines of runs with these values in their keys."""
        for line in self.lines:
            if "run" in line and all(line["run"][name] == value for name, value in wanted.items()):
                yield line

    @property
    def costs(self) -> dict[str, Any] | None:
        """The last line about costs."""
        return next((line for line in reversed(self.lines) if "costs" in line), None)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
