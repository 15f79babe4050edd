"""A cable that is pulled for a moment or for good, and the loss of the node where a job's supervisor runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from simulated import Cluster
from test_slurm_jobs import PROGRAM, ROOT, log, notes, wait_for_rounds

from launcher.backends.links import LOST_SECONDS
from launcher.backends.slurm import submit
from slurm.job import Job
from trainer.config.schema import SlurmCluster
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _commands(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def start(
    run: RunDirectory, seconds: float, spare_nodes: int = 0, min_nodes: int | None = None, **variables: str
) -> str:
    """Submit a job of two nodes, n1 being the first, whose ranks all-reduce for so many seconds; returns its id.

    `min_nodes`: of three nodes, or so few.
    """
    nodes = 2 if min_nodes is None else 3
    command = [sys.executable, "-P", str(PROGRAM), str(run.path), str(nodes), "1", str(seconds)]
    command += [] if min_nodes is None else [str(min_nodes)]
    environment = {"PYTHONPATH": str(PROGRAM.parent), **variables}
    config = SlurmCluster(
        backend="slurm", nodes=nodes, spare_nodes=spare_nodes, min_nodes=min_nodes, environment=environment
    )
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
def test_after_a_longer_cut_two_of_three_go_on_until_the_third_is_back(cluster: Cluster, tmp_path: Path) -> None:
    """Before SLURM has noticed anything: it never knows that a node was away."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=30, min_nodes=2)
    wait_for_rounds(cluster, run)
    cluster("linkdown", "n3")
    try:
        cluster.wait(lambda: bool(run.verdicts()), "a verdict")
    finally:
        cluster("linkup", "n3")
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=250)
    assert cluster.state(job) == "COMPLETED", log(run)
    failed, grown, finished = run.verdicts()
    assert (failed["class"], failed["node"], failed["action"]) == ("node", "n3", "retry")
    assert (grown["outcome"], grown["action"], grown["reason"]) == ("stopped", "retry", "nodes that were lost are back")
    assert finished["outcome"] == "finished"
    events = run.merged_events()
    assert [(e["attempt"], e["nodes"]) for e in events if e["event"] == "resized"] == [(2, 2), (3, 3)]
    steps = {e["attempt"]: e["step"] for e in events if e["event"] == "first_step"}
    stopped = next(e["rounds"] for e in events if e["event"] == "stopped" and e["attempt"] == 2)
    assert steps[3] == stopped + 1  # nothing was made twice for it
    assert [note["node"] for note in notes(run, 2)] == ["n3"]
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", job).stdout


@pytest.mark.matrix
def test_a_slow_node_is_left_out_and_stays_out(cluster: Cluster, tmp_path: Path) -> None:
    """One whose probes take five times as long; it answers all the time, and is not taken back for that."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=60, min_nodes=2, REDUCED_SLOW_NODE="n2")
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=280)
    assert cluster.state(job) == "COMPLETED", log(run)
    slow, finished = run.verdicts()
    assert (slow["class"], slow["node"], slow["rank"], slow["action"]) == ("node", "n2", 1, "retry")
    assert slow["message"] == "straggler: rank 1 took 5.0 times the median of all ranks (compute)"
    assert finished["outcome"] == "finished"
    assert [note["node"] for note in notes(run, 1)] == ["n2", "n3"]
    events = run.merged_events()
    (bad,) = [e for e in events if e["event"] == "bad_node"]
    assert (bad["node"], bad["why"]) == ("n2", slow["message"])
    stopped = next(e["rounds"] for e in events if e["event"] == "stopped" and e["attempt"] == 1)
    assert next(e["step"] for e in events if e["event"] == "first_step" and e["attempt"] == 2) == stopped + 1


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
