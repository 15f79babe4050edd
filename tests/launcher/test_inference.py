"""What `dsft predict` and `dsft eval` share."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

from launcher import inference


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    times = iter((0.0, 0.5, 2.0, 2.5, 4.0))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    progress = inference._Progress(tmp_path)
    for part, lines in ((0, 1), (0, 1200), (1, 9), (1, 5)):
        with (tmp_path / f"part-{part}.jsonl").open("a") as file:
            file.write("{}\n" * lines)
        progress.tick()
    progress.close()
    assert terminal.getvalue() == "\r0:00:02, 1,201 records\r0:00:04, 1,215 records\r\033[K"
