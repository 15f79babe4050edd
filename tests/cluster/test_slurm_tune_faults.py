"""An array of `dsft tune` whose jobs are preempted, requeued by hand, and lose their node: each trial goes on, and
ends as an undisturbed run does, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launched import DSFT, set_variables
from simulated import Cluster
from tune_inputs import KEY, write_inputs

from launcher.jobs import job_id
from trainer.lease import read_holder
from trainer.rundir import RunDirectory, read_lines

pytestmark = [pytest.mark.cluster, pytest.mark.matrix, pytest.mark.faults, pytest.mark.timeout(900)]

CHOICES = [1e-3, 3e-2, 3e-3]
STEPS = 500


def test_trials_outlive_preemption_a_requeue_by_hand_and_a_lost_node(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(cluster, tmp_path, monkeypatch)
    config = write_inputs(
        tmp_path,
        space={KEY: {"type": "categorical", "choices": CHOICES}},
        parallel=2,
        array=True,
        keep_checkpoints=True,
    )
    sets = ["--set", f"training.max_steps={STEPS}"]
    slurm = ["--set", 'cluster={"backend": "slurm", "nodes": 1, "cpus_per_task": 1, "time": "30:00"}']
    study = tmp_path / "runs/words"
    runs = [RunDirectory(study / "trials" / f"{number:04d}") for number in range(len(CHOICES))]

    def log() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(study.glob("job.log.*")))

    def steps(number: int) -> int:
        lines = runs[number].step_lines()
        return int(lines[-1]["step"]) if lines else 0

    def learning(number: int, attempts: int, least: int = 1) -> None:
        """The trial has made so many steps in its attempt of that number."""

        def does() -> bool:
            first = [e for e in runs[number].merged_events() if e["event"] == "first_step"]
            return bool(first) and first[-1]["attempt"] >= attempts and steps(number) >= first[-1]["step"] + least

        cluster.wait(does, f"trial {number}, attempt {attempts}:\n{log()}", 240)

    def place(number: int) -> tuple[str, str]:
        """(node, job as `12_3`) of a trial."""
        holder = read_holder(study / "tuners" / f"{number:04d}")
        assert holder is not None
        variables = cluster("exec", holder.node, "cat", f"/proc/{holder.pid}/environ").split("\0")
        found = dict(variable.split("=", 1) for variable in variables if "=" in variable)
        return holder.node, f"{found['SLURM_ARRAY_JOB_ID']}_{found['SLURM_ARRAY_TASK_ID']}"

    cluster.run(*DSFT, "tune", str(config), *sets, *slurm, seconds=120)
    array = job_id(read_lines(study / "events/submission.jsonl"))
    assert array
    for number in (0, 1):
        learning(number, 1, 12)
    cluster.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    for number in (0, 1):
        learning(number, 2, 12)
    assert all(run.verdicts()[0]["reason"] == "stopped on request (preemption)" for run in runs[:2]), log()
    cluster.run("scontrol", "requeue", place(0)[1])
    learning(0, 3, 12)
    node, _ = place(0)
    cluster("fail", node)
    try:
        cluster.wait(lambda: not cluster.run("squeue", "--noheader").stdout, "the end of the array", 300)
    finally:
        cluster("boot", node)
    assert set(cluster.state(array).split()) == {"COMPLETED"}, log()
    value = json.loads(cluster.run(*DSFT, "tune", str(config), *sets, *slurm, "--json", seconds=120).stdout)
    assert [trial["state"] for trial in value["trials"]] == ["finished"] * len(CHOICES), log()
    assert len(runs[0].attempts()) >= 4
    local = ["--set", 'cluster={"backend": "local"}', "--set", "tune=null"]
    for number, rate in enumerate(CHOICES[:2]):
        alone = RunDirectory(tmp_path / f"alone{number}" / "words")
        names = ["--set", f"output_dir={alone.path.parent}"]
        values = ["--set", f"{KEY}={rate}", "--set", "export.enabled=false"]
        cluster.run(*DSFT, "launch", str(config), *sets, *local, *names, *values, seconds=200)
        keys = ("step", "loss", "grad_norm", "batch_digest")
        mine, expected = ([[line[key] for key in keys] for line in run.step_lines()] for run in (runs[number], alone))
        assert mine == expected, number
