"""`dsft tune` on the cluster: eight trials, each a job of its own; the best one's job is killed, another cancelled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import Cluster
from tune_inputs import KEY, write_inputs

from launcher.jobs import job_id
from launcher.state import ledger, run_state
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.matrix, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CHOICES = [1e-5, 3e-2, 1e-4, 3e-4, 1e-3, 3e-3, 1e-6, 3e-5]
BEST, CANCELLED = 1, 2


def test_eight_trials_on_slurm_find_the_best_although_jobs_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    space = {KEY: {"type": "categorical", "choices": CHOICES}}
    config = write_inputs(tmp_path, space=space, parallel=3)
    slurm = 'cluster={"backend": "slurm", "nodes": 1, "cpus_per_task": 1, "time": "30:00"}'
    sets = ["--set", slurm, "--set", "training.max_steps=150", "--set", "training.schedule.type=constant"]
    runs = [RunDirectory(tmp_path / "runs/words/trials" / f"{number:04d}") for number in range(8)]
    output = tmp_path / "tune.log"
    with open(output, "wb") as file:
        tuner = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", "tune", str(config), *sets],
            env=cluster.environment
            | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"},
            stdout=file,
            stderr=file,
        )
    try:
        cluster.wait(lambda: len(runs[BEST].step_lines()) >= 5, output.read_text(), 180)
        killed = job_id(ledger(runs[BEST]))
        cluster.run("scancel", "--signal=KILL", "--full", str(killed))
        cluster.wait(lambda: len(runs[CANCELLED].step_lines()) >= 5, output.read_text(), 180)
        cluster.run("scancel", str(job_id(ledger(runs[CANCELLED]))))
        assert tuner.wait(700) == 0, output.read_text()
    finally:
        tuner.kill()
        tuner.wait()
    said = output.read_text()
    for number in (BEST, CANCELLED):
        assert re.search(rf"^trial {number}: .*; it is launched again", said, re.MULTILINE), said
    assert [run_state(run).state for run in runs] == ["finished"] * 8, said
    assert job_id(ledger(runs[BEST])) != killed
    losses = [run.evaluation_lines()[-1]["evaluation"]["loss"] for run in runs]
    assert min(range(8), key=lambda number: losses[number]) == BEST
    best = json.loads((tmp_path / "runs/words/best.json").read_text())
    assert best["training"]["optimizer"]["learning_rate"] == CHOICES[BEST]
    assert best["cluster"]["backend"] == "slurm"
    assert os.access(tmp_path / "runs/words/tune.html", os.R_OK)
