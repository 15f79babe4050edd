"""`dsft status` over many runs: what SLURM says and what the ledger says, and what the question costs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from config_samples import runnable
from slurm_programs import program, program_folder

from launcher import follow, jobs
from launcher.cli import main
from launcher.registry import register, registry_dir
from launcher.reporting import render_status, status, statuses
from launcher.state import RunState
from slurm import client
from slurm.client import Job
from slurm.states import job_state
from trainer.failures import UserError
from trainer.lease import acquire
from trainer.rundir import RunDirectory, append_line, write_json

ROOT = Path(__file__).resolve().parents[2]
DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
HOLD = """
import sys, time
from pathlib import Path
from trainer import lease
lease.node_name, lease.host_identity, lease.os.getpid = lambda: "compute7", lambda: "elsewhere", lambda: 1
lease.acquire(Path(sys.argv[1]), renew_seconds=0.2)
print("held", flush=True)
time.sleep(60)
"""
NO_ACCOUNTING = 'echo "Slurm accounting storage is disabled" >&2; exit 1'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs in the place of SLURM's, each of which notes its calls."""
    folder = program_folder(tmp_path, monkeypatch)
    program(folder, "sacct", NO_ACCOUNTING)
    return folder


def make_run(folder: Path, name: str, *events: tuple[float, str], job: str = "") -> RunDirectory:
    run = RunDirectory(folder / "runs" / name)
    run.events_dir.mkdir(parents=True)
    write_json(run.config_path, {"training": {"max_steps": 4}})
    if job:
        append_line(run.events_dir / "submission.jsonl", {"time": 1.0, "event": "submitted", "job_id": job})
    for time, event in events:
        append_line(run.events_dir / "supervisor.jsonl", {"time": time, "event": event, "attempt": 1})
    return run


def test_one_call_of_squeue_and_one_of_sacct_for_all_runs(slurm: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "waits", job="7"),
        make_run(tmp_path, "requeued", (2, "attempt"), (3, "stopped"), job="8"),
        make_run(tmp_path, "gone", job="9"),
        make_run(tmp_path, "killed", (2, "attempt"), job="10"),
        make_run(tmp_path, "done", (2, "attempt"), (3, "finished"), job="11"),
        make_run(tmp_path, "chain", job="12"),
        make_run(tmp_path, "local", (2, "attempt"), (3, "failed")),
    ]
    queue = ["7|PENDING|Priority||1:00|N/A", "8|PENDING|BeginTime||1:00|N/A", "12_0|COMPLETED|None|n1|0:00|N/A"]
    queue.append("12_1|PENDING|JobArrayTaskLimit||1:00|N/A")
    program(slurm, "squeue", "".join(f"echo '{line}'\n" for line in queue))
    accounts = ["9|CANCELLED by 0|n1|N/A", "10|NODE_FAIL|n[1-2]|N/A"]
    program(slurm, "sacct", "".join(f"echo '{line}'\n" for line in accounts))
    found = {value["name"]: (value["state"], value["reason"]) for value in statuses(runs)}
    assert found["waits"] == ("pending", "job 7: PENDING (Priority)")
    assert found["requeued"] == ("pending", "job 8: PENDING (BeginTime)")
    assert found["gone"] == ("stopped", "job 9: CANCELLED by 0")
    assert found["killed"][0] == "failed"
    assert "died without a word" in found["killed"][1]
    assert "NODE_FAIL" in found["killed"][1]
    assert found["done"] == ("finished", "")
    assert found["chain"] == ("pending", "job 12_1: PENDING (JobArrayTaskLimit)")
    assert found["local"] == ("failed", "")
    assert (slurm / "calls").read_text().split() == ["squeue", "sacct"]


@pytest.mark.parametrize(
    ("squeue", "sacct"),
    [(DOWN, NO_ACCOUNTING), ("exec sleep 30", NO_ACCOUNTING), ("exit 0", DOWN)],
    ids=["queue", "mute", "sacct"],
)
def test_no_answer_changes_no_state_and_is_told(
    squeue: str, sacct: str, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STATUS_SECONDS", 0.3)
    program(slurm, "squeue", squeue)
    program(slurm, "sacct", sacct)
    value = status(make_run(tmp_path, "a", job="7"))
    assert value["state"] == "pending"
    assert "answer" in value["unknown"]
    assert "answer" in render_status(value)


def test_the_nodes_of_a_running_job_and_their_states(slurm: Path, tmp_path: Path) -> None:
    program(slurm, "squeue", "echo '7|RUNNING|None|n[1-2]|0:59:00|N/A'")
    program(slurm, "sinfo", "echo 'n1|allocated'\necho 'n2|down*'")
    value = status(make_run(tmp_path, "a", job="7"))
    assert value["job"]["nodes"] == {"n1": "allocated", "n2": "down*"}
    assert "job 7, 0:59:00 left, on n1, n2 (down*)" in render_status(value)


def test_what_a_job_means_for_a_run() -> None:
    def job(slurm_state: str) -> Job:
        return Job("7", job_state(slurm_state), slurm_state)

    stopped = RunState("stopped", "stopped on request (time_limit)")
    assert jobs.with_job(stopped, job("PENDING")).state == "pending"
    assert jobs.with_job(stopped, job("FAILED")) == stopped
    assert jobs.with_job(stopped, None) == stopped
    assert jobs.with_job(RunState("running"), job("CANCELLED")).state == "running"  # the ledger's lock knows better
    assert jobs.with_job(RunState("running"), job("SUSPENDED")) == RunState("running", "job 7: SUSPENDED")
    assert jobs.with_job(RunState("pending"), job("A_STATE_OF_THE_FUTURE")).state == "pending"


def test_a_job_in_the_queue_forbids_another_only_while_it_is_there(slurm: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", job="7")
    program(slurm, "squeue", "echo '7|RUNNING|None|n1|1:00|N/A'")
    with pytest.raises(UserError, match="job 7 of this run is in the queue"):
        jobs.refuse_second_job(run)
    program(
        slurm, "squeue", f"echo '7|PENDING|None||1:00|N/A|{tmp_path}/elsewhere/a'"
    )  # the run that this was copied of
    jobs.refuse_second_job(run)
    assert jobs.cancel_job(run, running=False) is None
    program(slurm, "squeue", "echo '7|COMPLETED|None|n1|1:00|N/A'")
    jobs.refuse_second_job(run)
    program(slurm, "squeue", DOWN)
    with pytest.raises(client.SlurmUnavailable):
        jobs.refuse_second_job(run)


def test_nothing_is_submitted_or_rewritten_while_another_host_runs_it(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a login node, beside a run in an allocation made by hand."""
    program(slurm, "squeue", "true")
    cluster = {"backend": "slurm", "nodes": 1}
    config = runnable(tmp_path, name="a", cluster=cluster)
    run = make_run(tmp_path, "a")
    command = [sys.executable, "-c", HOLD, str(run.lock_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            before = {path: path.read_bytes() for path in run.path.rglob("*.json*")}
            assert main(["launch", str(config)]) == 75
        finally:
            holder.kill()
    assert "this run is running already: process 1 on compute7" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*.json*") if path.name != "submission.jsonl"} == before


def test_two_launches_at_once_submit_one_job(slurm: Path, tmp_path: Path) -> None:
    """The second waits, sees the first one's job, and says so."""
    run = make_run(tmp_path, "a")
    program(slurm, "squeue", "echo '7|PENDING|None||1:00|N/A'")
    refused = threading.Event()

    def second() -> None:
        with jobs.one_at_a_time(run):
            try:
                jobs.refuse_second_job(run)
            except UserError:
                refused.set()

    other = threading.Thread(target=second)
    with jobs.one_at_a_time(run):
        jobs.refuse_second_job(run)
        other.start()
        other.join(0.3)
        assert other.is_alive()
        run.event_writer("submission").write("submitted", job_id="7", backend="slurm")
    other.join(30)
    assert refused.is_set()


@pytest.mark.parametrize(
    ("queue", "running", "called"),
    [
        (["7|PENDING|None||1:00|N/A"], False, ["7"]),
        (["7|RUNNING|None|n1|1:00|N/A"], False, ["7"]),  # it is about to start the run
        (["7|RUNNING|None|n1|1:00|N/A"], True, []),
        (["7_1|RUNNING|None|n1|1:00|N/A", "7_2|PENDING|None||1:00|N/A"], True, ["--state=PENDING 7"]),
        (["7_1|RUNNING|None|n1|1:00|N/A", "7_2|PENDING|None||1:00|N/A"], False, ["7"]),
    ],
)
def test_what_cancel_takes_out_of_the_queue(
    queue: list[str], running: bool, called: list[str], slurm: Path, tmp_path: Path
) -> None:
    """And the run itself saves and stops where it runs."""
    run = make_run(tmp_path, "a", (2, "attempt"), job="7")
    program(slurm, "squeue", "".join(f"echo '{line}'\n" for line in queue))
    program(slurm, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    with contextlib.ExitStack() as stack:
        if running:
            stack.enter_context(acquire(run.lock_dir))
            run.new_attempt()
        assert main(["cancel", str(run.path)]) == 0
    cancelled = tmp_path / "cancelled"
    assert (cancelled.read_text().splitlines() if cancelled.exists() else []) == called
    assert (run.stop_request(1) is not None) == running


def test_what_is_asked_of_a_launch_before_its_first_attempt_is_not_lost_in_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While hosts and nodes are examined, which can take minutes."""
    run = make_run(tmp_path, "a", (2, "attempt"), (3, "stopped"))
    run.new_attempt()
    run.event_writer("launch").write("launched", started=4.0)
    with acquire(run.lock_dir):
        for command in (["cancel", str(run.path)], ["checkpoint", "save", str(run.path)]):
            assert main(command) == 2
            assert "its first attempt is about to begin" in capsys.readouterr().err
    assert run.stop_request(1) is None


def test_a_followed_run_ends_with_its_own_code_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "a", (2, "stopped"), job="7")
    path = run.events_dir / "supervisor.jsonl"

    def ask(job_ids: dict[Path, str]) -> jobs.Answer:
        if len(path.read_text().splitlines()) > 1:
            return jobs.Answer()
        append_line(path, {"time": 3.0, "event": "failed", "attempt": 1, "exit_code": 2})  # by a clock that is behind
        return jobs.Answer({run.path: Job("7", "running", "RUNNING")})

    monkeypatch.setattr(jobs, "ask", ask)
    monkeypatch.setattr(follow, "_ASK_SECONDS", 0.0)
    output = io.StringIO()
    assert follow.follow(run, "7", output) == 2
    assert "not known" not in output.getvalue()


def test_a_run_whose_launch_was_refused_says_so(tmp_path: Path) -> None:
    shown = render_status(status(make_run(tmp_path, "a")))
    assert "pending" in shown
    assert "never started" in shown


def test_one_broken_run_or_entry_hides_no_other(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path, name) for name in ("fine", "broken")]
    for run in runs:
        register(run)
    for index, entry in enumerate(("[]", '{"path": "/x"}', "{")):
        (registry_dir() / f"{index}.json").write_text(entry)
    runs[1].lock_dir.mkdir()
    (runs[1].lock_dir / "holder-00000001").write_text("{")
    assert main(["status"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("fine: pending")
    assert (captured.out.count("\n"), captured.err.count("\n")) == (1, 1)
    assert f"warning: {runs[1].path}: " in captured.err
    assert main(["status", str(runs[1].path)]) == 2


def test_runs_of_one_name_are_told_apart(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / folder, name) for folder, name in (("a", "same"), ("b", "same"), ("b", "other"))]
    for run in runs:
        register(run)
    assert main(["status"]) == 0
    names = sorted(line.split(": ")[0] for line in capsys.readouterr().out.splitlines())
    assert names == sorted(["other", str(runs[0].path), str(runs[1].path)])


def test_a_thousand_runs_take_half_a_second(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processor time, whoever else uses this machine; benchmarks/status.py has the wall time."""
    program(slurm, "squeue", "exit 0")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    line = json.dumps({"time": 2.0, "step": 200, "loss": 1.0, "step_seconds": 1.0, "total_steps": 200}) + "\n"
    for index in range(1000):
        end = ("finished", "failed", "stopped")[index % 3]
        run = make_run(tmp_path, f"r{index}", (2, "attempt"), (3, end), job=str(index))
        run.metrics_path.write_text(line * 100)
        register(run)
    least = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-P", "-m", "launcher", "status"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert len(done.stdout.splitlines()) == 1000
    assert least < 0.5
