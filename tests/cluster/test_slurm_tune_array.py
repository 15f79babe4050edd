"""`tune.array` on the cluster: eight trials as an array, two at a time. A worker is killed, a job told that its time
is over, another cancelled; each trial goes on, and the best values are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from simulated import Cluster
from tune_inputs import KEY, write_inputs

from launcher.jobs import job_id
from launcher.state import run_state
from trainer.lease import read_holder
from trainer.rundir import RunDirectory, read_lines

pytestmark = [pytest.mark.cluster, pytest.mark.matrix, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CHOICES = [1e-5, 3e-2, 1e-4, 3e-4, 1e-3, 3e-3, 1e-6, 3e-5]
TOLD, BEST, CANCELLED = 0, 1, 2  # trials


def test_eight_trials_as_an_array_find_the_best_although_jobs_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    space = {KEY: {"type": "categorical", "choices": CHOICES}}
    config = write_inputs(tmp_path, space=space, parallel=2, array=True)
    slurm = 'cluster={"backend": "slurm", "nodes": 1, "cpus_per_task": 1, "time": "30:00"}'
    sets = ["--set", slurm, "--set", "training.max_steps=150", "--set", "training.schedule.type=constant"]
    study = tmp_path / "runs/words"
    runs = [RunDirectory(study / "trials" / f"{number:04d}") for number in range(8)]

    def tune(*options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-P", "-m", "launcher", "tune", str(config), *sets, *options]
        variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"}
        done = cluster.run(*words, check=False, seconds=600, **variables)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def log() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(study.glob("job.log.*")))

    def worker_of(number: int) -> tuple[str, int]:
        holder = read_holder(study / "tuners" / f"{number:04d}")
        assert holder is not None
        return holder.node, holder.pid

    def task_of(number: int) -> str:
        """The job, as `12_3`, that a trial runs in."""
        node, pid = worker_of(number)
        variables = cluster("exec", node, "cat", f"/proc/{pid}/environ").split("\0")
        found = dict(variable.split("=", 1) for variable in variables if "=" in variable)
        return f"{found['SLURM_ARRAY_JOB_ID']}_{found['SLURM_ARRAY_TASK_ID']}"

    def learning(number: int, steps: int = 5) -> None:
        cluster.wait(lambda: len(runs[number].step_lines()) >= steps, log(), 240)

    assert "submitted array" in tune().stdout
    array = job_id(read_lines(study / "events/submission.jsonl"))
    learning(TOLD, 12)
    node, pid = worker_of(TOLD)
    script = cluster("exec", node, "ps", "-o", "ppid=", "-p", str(pid)).strip()
    cluster("exec", node, "kill", "-USR1", script)  # scancel --signal never ends for a job of an array
    learning(BEST)
    node, pid = worker_of(BEST)
    cluster("exec", node, "kill", "-9", str(pid))
    again = tune("--json")
    assert f"array {array} of this study is in the queue" in again.stderr
    assert json.loads(again.stdout)["job_id"] == array
    learning(CANCELLED)
    cluster.run("scancel", task_of(CANCELLED))

    # follows what is there: another job takes the trial of the cancelled one over, so that the last one is missing
    followed = tune("--watch", code=75)
    assert "submitted" not in followed.stdout
    assert "submits what is missing" in followed.stdout
    assert "submitted array" in tune("--watch").stdout
    value = json.loads(tune("--json").stdout)
    assert [trial["state"] for trial in value["trials"]] == ["finished"] * 8, log()
    assert value["finished"]
    for number in (TOLD, BEST, CANCELLED):
        assert len(runs[number].attempts()) >= 2, log()
        assert [line["step"] for line in runs[number].step_lines()] == list(range(1, 151))
    assert [run_state(run).state for run in runs] == ["finished"] * 8
    assert sum(len(run.attempts()) for run in runs) <= 8 + 4
    losses = [run.evaluation_lines()[-1]["evaluation"]["loss"] for run in runs]
    assert value["best"]["number"] == BEST == min(range(8), key=lambda number: losses[number])
    best = json.loads((study / "best.json").read_text())
    assert best["training"]["optimizer"]["learning_rate"] == CHOICES[BEST]
