"""Profiles of real operators, and the text made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from trainer.config.schema import ProfileConfig
from trainer.profiling import Profiler, summary
from trainer.rundir import RunDirectory

CPU = torch.device("cpu")


def test_the_named_steps_are_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler(ProfileConfig(skip_steps=2, steps=3), RunDirectory(tmp_path), 1, 0, CPU)
    folder = tmp_path / "profile" / "attempt-0001"
    matrix = torch.ones(64, 64)
    for step in range(6):
        with torch.profiler.record_function(f"step {step}"):
            matrix @ matrix
        profiler.after_step(0.5, 0.1)
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.trace.json.gz", "rank0.txt"]
    trace = json.loads(gzip.decompress((folder / "rank0.trace.json.gz").read_bytes()))
    steps = sorted(event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("step "))
    assert steps == ["step 2", "step 3", "step 4"]
    text = (folder / "rank0.txt").read_text()
    assert text.startswith("3 steps, 0.5 s each")
    assert "matrix products" in text
    assert text in capsys.readouterr().out


def test_other_ranks_and_no_settings_profile_nothing(tmp_path: Path) -> None:
    for settings, rank in ((None, 0), (ProfileConfig(), 1)):
        profiler = Profiler(settings, RunDirectory(tmp_path), 1, rank, CPU)
        for _ in range(20):
            profiler.after_step(0.5, 0.1)
    assert not (tmp_path / "profile").exists()


def test_every_second_is_in_one_kind() -> None:
    times = [
        ("aten::mm", 4e5),
        ("c10d::_allgather_base_", 2e5),
        ("aten::scaled_dot_product_attention", 1e5),
        ("x", 1e5),
    ]
    text = summary(times, steps=2, seconds=2.0, data_seconds=0.5)
    shares = {line[:34].strip(): float(line.split()[-1].rstrip("%")) for line in text.splitlines()[1:] if "%" in line}
    assert shares == {
        "none of these (Python, waiting)": 35.0,
        "waiting for data": 25.0,
        "matrix products": 20.0,
        "communication": 10.0,
        "attention": 5.0,
        "other operators": 5.0,
    }
