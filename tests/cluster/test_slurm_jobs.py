"""Real jobs on a real cluster: what reaches the ranks, how they find each other, and what ends them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from simulated import Cluster, read_json_lines

from launcher.backends.slurm import submit
from launcher.jobs import cancel_job, refuse_second_job
from launcher.state import run_state
from slurm import client
from slurm.hostlist import expand
from slurm.job import Job
from trainer.config.schema import SlurmCluster
from trainer.failures import UserError
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "reduced.py"
HOSTILE = " a,b 'c' \"d\" $(id) `id` ${HOME} \\n \t#!\n#SBATCH --nodes=1\r\n;& ü漢\u200b\x1b[0m %j *"


@pytest.fixture(autouse=True)
def _commands(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


def start(run: RunDirectory, processes: int = 1, seconds: float = 0.3, **values: object) -> str:
    """Submit a job whose ranks all-reduce for so many seconds; returns its id."""
    config = SlurmCluster.model_validate({"backend": "slurm", "nodes": 3, **values})
    command = [sys.executable, "-P", str(PROGRAM), str(run.path), "3", str(processes), str(seconds)]
    environment = {"PYTHONPATH": str(PROGRAM.parent), **config.environment}
    config = config.model_copy(update={"environment": environment})
    return submit(Job("reduced", run.path, command, str(ROOT)), config)


def notes(run: RunDirectory, rank: int) -> list[dict[str, object]]:
    return read_json_lines(run.path / f"notes{rank}.jsonl")


def wait_for_rounds(cluster: Cluster, run: RunDirectory, attempt: int = 1) -> None:
    def stepped() -> bool:
        return any(e["event"] == "first_step" and e["attempt"] == attempt for e in run.merged_events())

    cluster.wait(stepped, f"first step of attempt {attempt}")


def log(run: RunDirectory) -> str:
    return (run.path / "job.log").read_text()


def test_six_ranks_on_three_nodes_reduce(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a difficult name; the environment reaches every rank unchanged, secrets unwritten."""
    monkeypatch.setenv("PASSED_TOKEN", "s3cret")
    run = RunDirectory(tmp_path / "a dir,with 'ü' 50%j")
    job = start(run, processes=2, environment={"HOSTILE": HOSTILE}, pass_environment=["PASSED_TOKEN"])
    cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    assert cluster.state(job) == "COMPLETED", log(run)
    found: list[dict[str, Any]] = [notes(run, rank)[0] for rank in range(6)]
    assert [note["node"] for note in found] == ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert {note["interface"] for note in found} == {"eth0"}
    assert {note["MASTER_ADDR"] for note in found} == {"10.77.0.11"}
    assert {note["HOSTILE"] for note in found} == {HOSTILE}
    assert {note["PASSED_TOKEN"] for note in found} == {"s3cret"}
    if len(os.sched_getaffinity(0)) > 1:  # a rank has its share of the node's CPUs
        assert all(not {*one["cpus"]} & {*two["cpus"]} for one, two in zip(found[::2], found[1::2], strict=True))
    for path in run.path.rglob("*"):
        if path.is_file() and not path.name.startswith("notes"):
            assert b"s3cret" not in path.read_bytes(), path
    verdict = json.loads(run.verdict_path(1).read_text())
    assert (verdict["outcome"], verdict["exit_code"]) == ("finished", 0)


def test_a_chain_of_jobs_goes_on_where_a_signal_stopped_one(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=3, array="0-1%1", requeue=False)
    wait_for_rounds(cluster, run)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    cluster.wait(lambda: bool(run.verdicts()), "a verdict")
    assert (run.stop_request(1) or {})["reason"] == "time_limit"
    assert run.verdicts()[0]["exit_code"] == 75
    cluster.wait_for_state(f"{job}_1", "COMPLETED", "FAILED", seconds=90)
    assert (cluster.state(f"{job}_0"), cluster.state(f"{job}_1")) == ("FAILED", "COMPLETED"), log(run)
    first, second = notes(run, 0)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert log(run).count('["') == 2  # the output of both


@pytest.mark.faults
def test_a_preempted_job_saves_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=3, exclusive=True)
    wait_for_rounds(cluster, run)
    cluster.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=90)
    assert cluster.state(job) == "COMPLETED", log(run)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job).stdout
    assert run.verdicts()[0]["reason"] == "stopped on request (preemption)"  # not the time limit, whose signal it had
    ends = [(e["event"], e["attempt"]) for e in run.merged_events() if "rounds" in e]
    assert ends == [("stopped", 1)] * 3 + [("trained", 2)] * 3
    assert log(run).count('["') == 2


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.faults
def test_a_time_limit_is_met_with_time_to_spare(cluster: Cluster, tmp_path: Path) -> None:
    """Two minutes, the shortest limit with a signal a minute before; no output is lost."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=100, time="2", grace_seconds=60)
    cluster.wait(lambda: bool(run.verdicts()), "a verdict", seconds=150)
    assert run.verdicts()[0]["reason"] == "stopped on request (time_limit)"
    cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=200)
    assert cluster.state(job) == "COMPLETED", log(run)
    ends = [(e["event"], e["attempt"]) for e in run.merged_events() if "rounds" in e]
    assert ends[:3] == [("stopped", 1)] * 3
    assert ends[-3:] == [("trained", len(run.attempts()))] * 3
    assert log(run).count('["') == len(run.attempts()) >= 2


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=60)
    wait_for_rounds(cluster, run)
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    # also where SLURM's KillWait (5 s here) is over before the supervisor has written its verdict
    cluster.wait(lambda: run_state(run).state != "running", "the end")
    assert run_state(run).state == "stopped"
    text = cluster.run("scontrol", "show", "job", job).stdout
    assert "JobState=CANCELLED" in text
    assert "Restarts=0" in text


@pytest.mark.faults
def test_a_user_error_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """Three nodes are asked for, and the allocation has two."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, nodes=2)
    cluster.wait_for_state(job, "FAILED", "COMPLETED")
    text = cluster.run("scontrol", "show", "job", job).stdout
    assert "JobState=FAILED" in text
    assert "Restarts=0" in text


@pytest.mark.faults
def test_a_lost_node_ends_the_attempt_and_a_spare_takes_its_place(cluster: Cluster, tmp_path: Path) -> None:
    """Two nodes and a spare; the processes of one node are killed all at once."""
    run = RunDirectory(tmp_path / "run")
    command = [sys.executable, "-P", str(PROGRAM), str(run.path), "2", "1", "2"]
    config = SlurmCluster(backend="slurm", nodes=2, spare_nodes=1, environment={"PYTHONPATH": str(PROGRAM.parent)})
    job = submit(Job("reduced", run.path, command, str(ROOT)), config)
    wait_for_rounds(cluster, run)
    cluster("kill", "n2")  # the power goes: nothing says goodbye
    failed = time.time()
    try:
        cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
        assert cluster.state(job) == "COMPLETED", log(run)
        assert run.verdicts()[0]["outcome"] == "failed"
        assert (run.verdicts()[0]["class"], run.verdicts()[0]["node"]) == ("node", "n2")
        assert "node n2 is gone" in run.verdicts()[0]["message"]
        assert run.verdicts()[0]["time"] - failed < 5 + 5  # noticed within 5 s, then the rest is ended
        assert [note["node"] for note in notes(run, 1)] == ["n3"]
        assert "Restarts=0" in cluster.run("scontrol", "show", "job", job).stdout
    finally:
        cluster("boot", "n2")


@pytest.mark.faults
def test_a_node_that_fails_every_time_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """Twice in the allocation, then the job is requeued on others."""
    run = RunDirectory(tmp_path / "run")
    command = [sys.executable, "-P", str(PROGRAM), str(run.path), "2", "1", "1"]
    environment = {"PYTHONPATH": str(PROGRAM.parent), "REDUCED_BAD_NODE": "n1"}
    config = SlurmCluster(backend="slurm", nodes=2, environment=environment)
    job = submit(Job("reduced", run.path, command, str(ROOT)), config)
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
    assert cluster.state(job) == "COMPLETED", log(run)
    verdicts = run.verdicts()
    assert [(v["class"], v["node"], v["action"]) for v in verdicts[:2]] == [
        ("node", "n1", "retry"),
        ("node", "n1", "stop"),
    ]
    assert [v["outcome"] for v in verdicts] == ["failed", "failed", "finished"]
    assert [note["node"] for note in notes(run, 0)] == ["n2"]
    text = cluster.run("scontrol", "show", "job", job).stdout
    assert "Restarts=1" in text
    assert "ExcNodeList=n1" in text


@pytest.mark.faults
def test_a_killed_supervisor_is_counted_and_its_job_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=4)
    wait_for_rounds(cluster, run)
    cluster("exec", "n1", "pkill", "-KILL", "-f", f"[r]educed.py {run.path}")
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=120)
    assert cluster.state(job) == "COMPLETED", log(run)
    first, second = run.verdicts()
    assert (first["outcome"], first["class"], second["outcome"]) == ("failed", "node", "finished")
    assert "the supervisor on n1 was killed" in first["message"]


@pytest.mark.matrix
@pytest.mark.faults
def test_a_supervisor_that_dies_every_time_ends_the_run(cluster: Cluster, tmp_path: Path) -> None:
    """max_restarts of these jobs is 2: the third death is the last, requeues or not."""
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=60)
    for attempt in (1, 2, 3):
        wait_for_rounds(cluster, run, attempt)
        cluster("exec", "n1", "pkill", "-KILL", "-f", f"[r]educed.py {run.path}")
    cluster.wait_for_state(job, "FAILED", seconds=120)
    assert "max_restarts (2) is used up" in run.verdicts()[-1]["reason"]


@pytest.mark.faults
def test_a_failed_rank_ends_the_others_on_all_nodes(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    job = start(run, seconds=60)
    wait_for_rounds(cluster, run)
    cluster("exec", "n3", "pkill", "-KILL", "-f", "[r]educed --run-dir")
    cluster.wait(lambda: bool(run.verdicts()), "a verdict")
    verdict = run.verdicts()[0]
    assert (verdict["outcome"], verdict["rank"], verdict["node"]) == ("failed", 2, "n3")
    assert "SIGKILL" in verdict["message"]
    cluster.run("scancel", job)
    cluster.wait_for_state(job, "CANCELLED")
    for node in ("n1", "n2", "n3"):  # the cluster's processes are all there is on its nodes
        gone = ["exec", node, "sh", "-c", "! pgrep -f '[t]rainer.agent|[r]educed --run-dir|[b]ackends.node'"]
        cluster.wait(lambda gone=gone: cluster(*gone) == "", f"nothing left on {node}")  # type: ignore[misc]


def test_what_cannot_run_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Also what sbatch takes, and lets wait for ever."""
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match="would never start it"):
        start(run, nodes=4)
    cluster.run("scontrol", "create", "partition=brief", "nodes=ALL", "maxtime=5")
    with pytest.raises(UserError, match=r"would never start it \(Partition"):
        start(run, partition="brief", time="10")
    cluster.run("scontrol", "delete", "partition=brief")
    with pytest.raises(UserError, match="SLURM refuses"):
        start(run, memory="64G")
    with pytest.raises(UserError, match=r"SLURM refuses: .*partition"):
        start(run, partition="nowhere")
    with pytest.raises(UserError, match="MY_TOKEN"):
        start(run, pass_environment=["MY_TOKEN"])
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_a_job_may_wait_for_nodes_that_are_away(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sbatch --test-only` refuses it, in the words that it has for what can never run."""
    cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=repair")
    run = RunDirectory(tmp_path / "run")
    try:
        job = start(run)
        assert f"job {job} waits for nodes that are down, drained or reserved" in capsys.readouterr().err
        assert cluster.state(job) == "PENDING"
        # a launch that was killed here has written of no job
        with pytest.raises(UserError, match=f"job {job} of this run is in the queue already"):
            refuse_second_job(run)
        assert cancel_job(run, running=False) == job
    finally:
        cluster.run("scontrol", "update", "nodename=n1", "state=resume")


def test_options_reach_slurm(cluster: Cluster, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    comment = "a, 'b' #c $(id) %j ü"
    job = start(run, nodes=1, spare_nodes=1, time="0:30:00", sbatch={"comment": comment, "hold": True}, gpus_per_node=2)
    after = start(RunDirectory(tmp_path / "after"), dependency=f"afterany:{job}")
    assert f"Dependency=afterany:{job}" in cluster.run("scontrol", "show", "job", after).stdout
    text = cluster.run("scontrol", "show", "job", job).stdout
    assert f"Comment={comment}" in text
    for part in ("TimeLimit=00:30:00", "NumNodes=1-2", "Requeue=1", "TresPerNode=gres:gpu:2", "JobState=PENDING"):
        assert part in text
    script = cluster.run("scontrol", "write", "batch_script", job, "-").stdout
    assert script.strip() == (run.path / "job.sbatch").read_text().strip()


@pytest.mark.parametrize(
    "lines",
    [
        ["--gpus=12"],  # of which srun would give the first node one
        ["--ntasks-per-node=4", "--gpus-per-task=1", "--cpus-per-task=2"],
        ["--gpus=12", "--ntasks-per-gpu=1", "--gpu-bind=single:1"],
        ["--gres=gpu:4", "--exclusive"],
    ],
)
def test_an_agent_has_all_gpus_of_its_node(cluster: Cluster, lines: list[str]) -> None:
    """However the batch line asks for them: what dsft would run on each node says what it sees."""
    program = (
        "import pathlib, subprocess; from launcher.backends.slurm import *; nodes = ['n1', 'n2', 'n3']\n"
        "config = SlurmCluster(backend='slurm', nodes=3, gpus_per_node=4)\n"
        "command = step_command(config, nodes, pathlib.Path.cwd())[: -len(node_task(config, pathlib.Path.cwd())[1])]\n"
        "subprocess.run([*command, 'sh', '-c', 'echo $CUDA_VISIBLE_DEVICES'], env=step_environment({}), check=True)"
    )
    salloc = ["salloc", "--nodes=3", *lines, sys.executable, "-P", "-c", program]
    assert cluster.run(*salloc, PYTHONPATH=str(ROOT)).stdout.split() == ["0,1,2,3"] * 3


def test_node_lists_are_those_of_scontrol(cluster: Cluster) -> None:
    for text in ("n[1-3]", "n[08-11],x", "r[1-2]n[1-3]", "a[1,3-4],b[009-011]"):
        assert expand(text) == cluster.run("scontrol", "show", "hostnames", text).stdout.split()


def test_a_job_unknown_to_slurm_is_not_there(cluster: Cluster) -> None:
    assert client.job("999999") is None


def test_a_mute_controller_is_no_answer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "QUERY_SECONDS", 1.0)
    cluster("linkdown", "ctl")
    try:
        with pytest.raises(client.SlurmUnavailable):
            client.job("1")
    finally:
        cluster("linkup", "ctl")
