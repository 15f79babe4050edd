"""SLURM's words: node lists, states, and the difference between no and no answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from slurm_programs import program, program_folder

from slurm import client
from slurm.hostlist import expand
from slurm.states import job_state
from trainer.failures import UserError


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[1,3-4],gpu-2", ["n1", "n3", "n4", "gpu-2"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[1-2]-ib,x[009]", ["n1-ib", "n2-ib", "x009"]),
    ],
)
def test_node_lists(text: str, nodes: list[str]) -> None:
    assert expand(text) == nodes


@pytest.mark.parametrize("text", ["n[1-", "n1]", "n[a-b]", "n[1-x]", "a,,b", "n[[1]]"])
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ValueError, match="node list"):
        expand(text)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("PENDING", "pending"),
        ("CONFIGURING", "pending"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("COMPLETED", "finished"),
        ("NODE_FAIL", "failed"),
        ("OUT_OF_MEMORY", "failed"),
        ("TIMEOUT", "stopped"),
        ("CANCELLED by 1000", "stopped"),
        ("CANCELLED+", "stopped"),
        ("A_STATE_OF_THE_FUTURE", "unknown"),
        ("", "unknown"),
    ],
)
def test_states(text: str, state: str) -> None:
    assert job_state(text) == state


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:07", 7), ("59:37", 3577), ("1-02:03:04", 93784), ("UNLIMITED", math.inf), ("", math.inf)]
)
def test_times(text: str, seconds: float) -> None:
    assert client.duration(text) == seconds


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return program_folder(tmp_path, monkeypatch)


NOT_THERE = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


def test_a_job_that_has_left_the_queue_is_found_in_the_accounting(programs: Path) -> None:
    program(programs, "squeue", NOT_THERE)
    program(programs, "sacct", "echo '7|CANCELLED by 0|n[1-2]|2026-01-01T00:00:00'")
    job = client.job("7")
    assert job is not None
    assert (job.state, job.slurm_state, job.node_list) == ("stopped", "CANCELLED by 0", "n[1-2]")


def test_a_job_that_nobody_knows_is_not_there(programs: Path) -> None:
    program(programs, "squeue", NOT_THERE)
    program(programs, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    assert client.job("7") is None


@pytest.mark.parametrize(
    ("squeue", "sacct"),
    [(DOWN, "exit 0"), (NOT_THERE, DOWN), ("exec sleep 30", "exit 0")],
    ids=["queue", "sacct", "mute"],
)
def test_no_answer_is_not_absence(squeue: str, sacct: str, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "QUERY_SECONDS", 0.3)
    program(programs, "squeue", squeue)
    program(programs, "sacct", sacct)
    with pytest.raises(client.SlurmUnavailable):
        client.job("7")


def test_a_job_may_be_there_although_nobody_answered(programs: Path) -> None:
    said = "Batch job submission failed: Socket timed out on send/recv operation"
    program(programs, "sbatch", f'echo "sbatch: error: {said}" >&2; exit 1')
    with pytest.raises(client.SlurmUnavailable, match=f"{said}.*squeue --me"):
        client.submit(programs / "job.sbatch", programs)


@pytest.mark.parametrize("hold", ["exit 0", DOWN, 'echo "Requeue is disabled" >&2; exit 1'], ids=["held", "mute", "no"])
def test_a_job_is_never_left_held(hold: str, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RELEASE_PAUSE", 0.01)
    calls = programs / "calls"
    release = f"[ $(grep -c release {calls}) -gt 2 ] || {{ {DOWN}; }}"  # the controller is away for two calls
    cases = f"case $1 in requeuehold) {hold};; release) {release};; esac"
    program(programs, "scontrol", f"echo $1 >> {calls}\n{cases}")
    if hold == "exit 0":
        client.requeue_excluding("7", ["n1"])
    else:
        with pytest.raises(client.SlurmUnavailable if hold == DOWN else client.SlurmError):
            client.requeue_excluding("7", ["n1"])
    released = calls.read_text().split().count("release")
    assert released == (0 if "disabled" in hold else 3)


def test_without_slurm_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        client.job("7")


def test_variables_that_would_win_over_the_script_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_MEM_PER_CPU", "SLURM_CONF"):
        monkeypatch.setenv(name, "1")
    left = client.submission_environment(["time", "partition"])
    assert {name for name in left if name.startswith(("SBATCH_", "SLURM_"))} == {"SBATCH_ACCOUNT", "SLURM_CONF"}
