"""What `dsft predict` and `dsft eval` share."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import inference
from launcher.cli import main


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


def test_a_folder_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be found out after the last answer."""
    assert main(["predict", "no-run", "--input", "q.jsonl", "--output", str(tmp_path)]) == 2
    assert f"--output: {tmp_path} is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("generation", [None, {"max_new_tokens": 5}])
def test_predictions_are_written_whether_evaluations_write_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: dict[str, Any] | None
) -> None:
    config = {
        "name": "a",
        "task": {"type": "causal-lm", "generation": generation},
        "model": {"path": str(tmp_path)},
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 8},
        "training": {"global_batch_size": 1, "max_steps": 1},
    }
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        inference, "find_trained", lambda *arguments: inference.Trained(tmp_path, config, 1, 1, 8, environment={})
    )
    monkeypatch.setattr(inference, "run_ranks", lambda module, config, *rest: asked.update(config.model_dump()))
    assert main(["predict", "a", "--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]) == 0
    assert asked["task"]["generation"]["max_new_tokens"] == (128 if generation is None else 5)
