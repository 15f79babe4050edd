"""A cable that is pulled for a moment or for good, and the loss of the node where a job's supervisor runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from conftest import Cluster
from test_slurm_jobs import PROGRAM, ROOT, log, notes, wait_for_rounds

from launcher.backends.links import LOST_SECONDS
from launcher.backends.slurm import submit
from slurm.job import Job
from trainer.config.schema import SlurmCluster
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _commands(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def start(run: RunDirectory, seconds: float, spare_nodes: int = 0) -> str:
    """Submit a job of two nodes, n1 being the first, whose ranks all-reduce for so many seconds; returns its id."""
    command = [sys.executable, "-P", str(PROGRAM), str(run.path), "2", "1", str(seconds)]
    environment = {"PYTHONPATH": str(PROGRAM.parent)}
    config = SlurmCluster(backend="slurm", nodes=2, spare_nodes=spare_nodes, environment=environment)
    return submit(Job("reduced", run.path, command, str(ROOT)), config)


def test_a_cut_shorter_than_the_timeout_is_survived(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=6)
    wait_for_rounds(cluster, run)
    cluster("linkdown", "n2")
    time.sleep(LOST_SECONDS / 2)
    cluster("linkup", "n2")
    cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", log(run)
    assert [verdict["outcome"] for verdict in run.verdicts()] == ["finished"]
    assert [note["node"] for note in notes(run, 1)] == ["n2"]


@pytest.mark.matrix
def test_after_a_longer_cut_a_spare_steps_in(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=6, spare_nodes=1)
    wait_for_rounds(cluster, run)
    cluster("linkdown", "n2")
    failed = time.time()
    try:
        cluster.wait(lambda: bool(run.verdicts()), "a verdict")
        cluster.wait(lambda: bool(notes(run, 0) if (run.path / "notes0.jsonl").exists() else []), "the second attempt")
        # n2 has ended its ranks by itself: nobody could tell it to
        gone = ["exec", "n2", "sh", "-c", "pgrep -f '[t]rainer.agent|[r]educed --run-dir|[b]ackends.node' || true"]
        cluster.wait(lambda: cluster(*gone) == "", "nothing left on n2")
    finally:
        cluster("linkup", "n2")
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
    assert cluster.state(job) == "COMPLETED", log(run)
    first, second = run.verdicts()
    assert (first["class"], first["node"], first["action"]) == ("node", "n2", "retry")
    assert first["time"] - failed < LOST_SECONDS + 10
    assert second["outcome"] == "finished"
    assert [note["node"] for note in notes(run, 1)] == ["n3"]
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job).stdout


@pytest.mark.matrix
def test_the_loss_of_the_head_node_requeues_the_job_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    """Nobody is left who could act but SLURM: the batch script and the supervisor went down with n1."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=6)
    wait_for_rounds(cluster, run)
    cluster("kill", "n1")
    try:
        gone = ["exec", "n2", "sh", "-c", "pgrep -f '[t]rainer.agent|[r]educed --run-dir|[b]ackends.node' || true"]
        cluster.wait(lambda: cluster(*gone) == "", "nothing left on n2, long before SLURM has noticed", 20)
        cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=200)
        assert cluster.state(job) == "COMPLETED", log(run)
        first, second = run.verdicts()
        assert (first["outcome"], first["class"]) == ("failed", "node")
        assert "the supervisor on n1 was killed, or its node went down" in first["message"]
        assert second["outcome"] == "finished"
        assert [note["node"] for note in notes(run, 0)] == ["n2"]
        assert "Restarts=1" in cluster.run("scontrol", "show", "job", job).stdout
    finally:
        cluster("boot", "n1")
