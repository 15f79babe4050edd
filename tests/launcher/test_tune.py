"""`dsft tune` with real trials: one killed, the study ended and gone on with, two pruned; and one in vain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tune_inputs import KEY, write_inputs

from launcher.state import run_state
from trainer.processes import processes_of_run
from trainer.rundir import RunDirectory

ROOT = str(Path(__file__).resolve().parents[2])


def start(config: Path, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": ROOT, "XDG_STATE_HOME": str(config.parent / "state")}
    with open(output, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", "tune", str(config), *arguments],
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], object], output: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_a_study_survives_a_killed_trial_and_the_end_of_a_session(tmp_path: Path) -> None:
    choices = [1e-2, 3e-2, 1e-6, 1e-5]
    config = write_inputs(
        tmp_path, parallel=2, pruner="median", space={KEY: {"type": "categorical", "choices": choices}}
    )
    number_of_steps = 500  # of about 10 ms: a trial that is pruned has to be stopped before its end
    steps = ["--set", f"training.max_steps={number_of_steps}", "--set", "training.schedule.type=constant"]
    runs = [RunDirectory(tmp_path / "runs/words/trials" / f"{number:04d}") for number in range(4)]
    output = tmp_path / "first.log"
    tuner = start(config, output, *steps)
    try:
        wait_for(lambda: all(run.published_checkpoints() for run in runs[:2]), output)
        holder = run_state(runs[1]).holder
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
        wait_for(lambda: "trial 1: the launcher died" in output.read_text(), output)
        wait_for(lambda: len(runs[1].attempts()) == 2, output)
        holders = [holder.pid for run in runs if (holder := run_state(run).holder) is not None]
        for number in (signal.SIGTERM, signal.SIGHUP):  # as systemd ends a session, or qdel a job
            for pid in [tuner.pid, *holders, *(pid for run in runs for pid in processes_of_run(run.path))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        assert tuner.wait(60) == 143, output.read_text()
    finally:
        tuner.kill()
    assert runs[0].published_checkpoints()[-1] == runs[0].last_steps(1)[0]["step"], output.read_text()
    assert [pid for run in runs for pid in processes_of_run(run.path)] == []
    assert re.search(r"(?m)^ *1 +interrupted ", output.read_text())

    output = tmp_path / "second.log"
    tuner = start(config, output, *steps)
    try:
        assert tuner.wait(200) == 0, output.read_text()
    finally:
        tuner.kill()
    said = output.read_text()
    assert "trial 1 goes on: training.optimizer.learning_rate 0.03" in said
    assert [run_state(run).state for run in runs] == ["finished", "finished", "stopped", "stopped"]
    lines = runs[1].step_lines()
    assert [line["step"] for line in lines] == list(range(1, number_of_steps + 1))
    assert not [run.path for run in runs if run.published_checkpoints() or run.export_dir.exists()]

    again = subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "tune", str(config), *steps, "--json"],
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert "this study is finished: 4 trials" in again.stderr
    value = json.loads(again.stdout)
    assert [trial["state"] for trial in value["trials"]] == ["finished", "finished", "pruned", "pruned"], said
    assert [trial["values"][KEY] for trial in value["trials"]] == choices
    losses = [run.evaluation_lines()[-1]["evaluation"]["loss"] for run in runs]
    assert value["best"]["number"] == min(range(2), key=lambda number: losses[number])
    assert [trial["value"] for trial in value["trials"][:2]] == losses[:2]
    assert all(trial["step"] < number_of_steps for trial in value["trials"][2:])
    assert (
        json.loads(Path(value["best_config"]).read_text())["training"]["optimizer"]["learning_rate"]
        == (choices[value["best"]["number"]])
    )


def test_a_mistake_of_the_user_ends_the_study_with_its_first_trial(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "w1"}\n')
    output = tmp_path / "output.log"
    assert start(config, output).wait(60) == 2
    assert "trial 0 cannot run" in output.read_text()
    assert "completion" in output.read_text()
    assert sorted(path.name for path in (tmp_path / "runs/words/trials").iterdir()) == ["0000"]
