"""States, accounts, names and what may change, from run directories made by hand."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launcher.cli import main
from launcher.commands.resume import _where_it_is
from launcher.consistency import refuse_changes
from launcher.grace import grace_problem
from launcher.registry import find_run, known_runs, register
from launcher.report import report
from launcher.requeue import GivenUpError, attempts_of
from launcher.state import CUT_SHORT, failures, run_state
from launcher.supervisor import AttemptHandle, Result, Supervisor
from launcher.verdict import Verdict
from trainer.config.schema import ResilienceConfig, SlurmCluster
from trainer.failures import UserError
from trainer.lease import acquire
from trainer.rundir import RunDirectory, append_line, write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "runs" / "a")
    run.path.mkdir(parents=True)
    write_json(run.config_path, {"training": {"max_steps": 4}, "data": {"seed": 1, "evaluation": []}})
    return run


def ledger(run: RunDirectory, *events: tuple[float, str, int]) -> None:
    for time, event, attempt in events:
        run.events_dir.mkdir(exist_ok=True)
        append_line(run.events_dir / "supervisor.jsonl", {"time": time, "event": event, "attempt": attempt})


def test_states(run: RunDirectory) -> None:
    assert run_state(run).state == "pending"
    with acquire(run.lock_dir):
        ledger(run, (1, "attempt", 1))
        assert run_state(run).state == "running"
    assert run_state(run).state == "failed"  # nobody runs it, and nobody said how it ended
    ledger(run, (2, "stopped", 1))
    assert run_state(run).state == "stopped"
    ledger(run, (3, "attempt", 2), (4, "failed", 2))
    assert run_state(run).state == "failed"
    ledger(run, (5, "attempt", 3), (2.5, "finished", 3))  # the clock was set back meanwhile
    assert run_state(run).state == "finished"


def test_a_run_moved_to_a_folder_that_names_no_run_says_so(run: RunDirectory) -> None:
    moved = run.path.rename(run.path.with_name("my run"))
    with pytest.raises(UserError, match="rename the folder"):
        _where_it_is(RunDirectory(moved))


def test_a_lock_of_another_host_is_shown_as_dead_after_a_while(run: RunDirectory) -> None:
    ledger(run, (1, "attempt", 1))
    acquire(run.lock_dir).release()
    path = max(run.lock_dir.glob("holder-*"))
    value = json.loads(path.read_text()) | {"host": "elsewhere", "released": False}
    path.write_text(json.dumps(value))
    assert run_state(run).state == "running"
    os.utime(path, (1, 1))
    assert run_state(run).state == "failed"


def test_the_report_accounts_for_the_time_of_launches(run: RunDirectory) -> None:
    ledger(run, (100, "attempt", 1), (110, "failure", 1), (112, "attempt", 2))  # then the launcher was killed
    ledger(run, (1000, "attempt", 3), (1010, "finished", 3))
    for time, attempt, step in ((105, 1, 1), (115, 2, 2), (1005, 3, 4)):
        line = {"time": time, "event": "first_step", "attempt": attempt, "step": step, "seconds": 2.0}
        append_line(run.events_dir / "rank0.jsonl", line)
    for time, step, seconds in ((105, 1, 2.0), (106, 2, 1.0), (115, 2, 2.0), (120, 3, 5.0), (1005, 4, 2.0)):
        append_line(run.metrics_path, {"time": time, "step": step, "loss": 1.0, "step_seconds": seconds})
    value = report(run)
    parts = {name: seconds for name, seconds in value["goodput"]["seconds"].items() if seconds}
    useful = {"useful": 2.0 + 2.0 + 5.0 + 2.0, "repeated": 1.0}
    assert parts == useful | {"start": 3.0 + 1.0 + 3.0, "recovery": 4.0 + 2.0, "idle": 880.0, "shutdown": 5.0}
    assert value["goodput"]["ettr"] == pytest.approx(11 / 30)
    assert (value["state"], value["steps"]) == ("finished", 4)


class Backend:
    """Attempts whose agents fail, the first at once and the others after a while."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal

    def start(self, attempt: int) -> AttemptHandle:
        if self.refusal:
            raise UserError(self.refusal)
        handle: Any = Mock()
        handle.poll.side_effect = [*([None] * 40 if attempt > 1 else []), {"n1": 1}]
        handle.kill.return_value = []
        handle.is_failing.return_value = False
        return handle


def supervised(run: RunDirectory, backend: Backend) -> Result:
    with acquire(run.lock_dir) as lease:
        return Supervisor(run, backend, ResilienceConfig(), lease).supervise()


def test_an_attempt_that_cannot_be_started_says_why(run: RunDirectory) -> None:
    refusal = "the allocation has 1 node(s), the run needs 2"
    result = supervised(run, Backend(refusal))
    assert result.action.exit_code == 2
    assert [(f["class"], f["message"]) for f in failures(run)] == [("user", refusal)]
    assert run_state(run).reason == "a user error is never retried"


def test_a_cancel_of_the_last_attempt_while_the_next_is_made_stops_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = RunDirectory.new_attempt

    def new_attempt(run: RunDirectory) -> int:
        for last in run.attempts():
            run.request_stop(last, "cancel")
        return make(run)

    monkeypatch.setattr(RunDirectory, "new_attempt", new_attempt)
    result = supervised(run, Backend())
    assert (result.verdict.outcome, result.attempts, result.action.exit_code) == ("stopped", 2, 143)


def test_failures_come_from_the_verdicts(run: RunDirectory) -> None:
    failure: dict[str, Any] = {"class": "data", "rank": 1, "node": "n", "step": 3, "message": "m", "victims": [0]}
    write_json(run.verdict_path(run.new_attempt()), {**failure, "outcome": "failed", "action": "stop"})
    write_json(run.verdict_path(run.new_attempt()), {"outcome": "finished", "action": "done"})
    times = dict.fromkeys(("time", "injected", "detection_seconds", "recovery_seconds"))
    assert report(run)["failures"] == [{"attempt": 1, "action": "stop", **failure, **times}]


def test_a_run_is_found_by_path_by_name_here_and_by_name_elsewhere(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_run("runs/a").path == run.path
    assert find_run("a").path == run.path
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserError, match="no run 'a'"):
        find_run("a")
    register(run)
    assert find_run("a").path == run.path
    with pytest.raises(UserError, match="known runs: a"):
        find_run("b")
    (tmp_path / "there" / "config.json").write_text(json.dumps({"output_dir": "mine"}))
    nearer = RunDirectory(tmp_path / "there" / "mine" / "a")
    nearer.path.mkdir(parents=True)
    write_json(nearer.config_path, {})
    assert find_run("a").path == nearer.path


def test_runs_that_one_may_not_look_into(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(run: RunDirectory) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(run.config_path))

    register(run)
    monkeypatch.setattr(RunDirectory, "exists", forbidden)
    assert known_runs() == []
    assert main(["status", str(run.path)]) == 2
    assert capsys.readouterr().err == f"error: {run.config_path}: Permission denied\n"


def test_runs_that_are_gone_are_forgotten(run: RunDirectory) -> None:
    register(run)
    assert [known.path for known in known_runs()] == [run.path]
    run.config_path.unlink()
    assert known_runs() == []


def test_links_make_no_second_run_and_trials_are_told_apart(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(run.path.parent)
    trial = RunDirectory(tmp_path / "study" / "trials" / "0001")
    trial.path.mkdir(parents=True)
    write_json(trial.config_path, {})
    (tmp_path / "study" / "study.journal").touch()
    for known in (run, trial, RunDirectory(tmp_path / "link" / run.name)):
        register(known)
    assert main(["status"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["a", "study/trials/0001"]
    assert find_run("study/trials/0001").path == trial.path
    with pytest.raises(UserError, match=r"study is a study: .*its trials are runs, study/trials/0000"):
        find_run("study")


def test_what_was_begun_may_not_change_what_was_not_may(run: RunDirectory) -> None:
    longer = {"training": {"max_steps": 9}, "data": {"seed": 1, "evaluation": []}}
    refuse_changes(run, longer)  # nothing was trained yet
    append_line(run.metrics_path, {"step": 1, "loss": 1.0})
    with pytest.raises(UserError, match=r"training\.max_steps: the run has 4, the config 9"):
        refuse_changes(run, longer)
    refuse_changes(
        run, {"training": {"max_steps": 4}, "data": {"seed": 1, "evaluation": [{"path": "x"}]}, "logging": 1}
    )
    refuse_changes(run, {"training": {"max_steps": 4, "micro_batch_size": 2}, "data": {"seed": 1}})


def test_attempts_before_a_requeue_count_and_one_without_a_verdict_is_a_failure(run: RunDirectory) -> None:
    for attempt, job in ((1, "6"), (2, "7"), (3, "7")):
        run.new_attempt()
        line = {"time": attempt, "event": "attempt", "attempt": attempt, "job_id": job, "head": "n1"}
        run.events_dir.mkdir(exist_ok=True)
        append_line(run.events_dir / "supervisor.jsonl", line)
        if attempt < 3:
            verdict = Verdict("failed", "hang", rank=1, step=5, message="m").to_json()
            write_json(run.verdict_path(attempt), verdict | {"action": "retry", "progress": [4, 5]})
    append_line(run.metrics_path, {"step": 5, "loss": 1.0})
    history = attempts_of(run, "7", 100.0, 2)
    assert [(past.verdict.failure_class, past.progress) for past in history] == [("hang", (4, 5)), ("node", (0, 5))]
    assert run.verdicts()[2]["message"].startswith("the supervisor on n1 was killed")
    assert attempts_of(run, "7", 100.0, 2) == history  # read back, not made anew
    run.verdict_path(3).unlink()
    with pytest.raises(GivenUpError, match=r"max_restarts \(1\) is used up"):
        attempts_of(run, "7", 100.0, 1)
    assert (run.verdicts()[2]["action"], run.verdicts()[2]["requeue"]) == ("stop", False)
    run.new_attempt()  # a person has requeued it, and the count begins anew
    append_line(run.events_dir / "supervisor.jsonl", {"time": 4, "event": "attempt", "attempt": 4, "job_id": "7"})
    assert len(attempts_of(run, "7", 100.0, 1)) == 1
    assert run.verdicts()[3]["action"] == "retry"


def test_an_attempt_killed_while_it_was_stopping_is_no_failure(run: RunDirectory) -> None:
    run.new_attempt()
    run.events_dir.mkdir()
    append_line(run.events_dir / "supervisor.jsonl", {"time": 1, "event": "attempt", "attempt": 1, "job_id": "7"})
    assert run_state(run).state == "failed"
    run.request_stop(1, "terminate")
    assert (run_state(run).state, run_state(run).reason) == ("stopped", CUT_SHORT)
    history = attempts_of(run, "7", 100.0, 2)
    assert [past.verdict.outcome for past in history] == ["stopped"]
    assert run.verdicts()[0]["message"] == "stopped on request (terminate)"
    assert (run.events_dir / "supervisor.jsonl").read_text().count("\n") == 1  # nothing counts against the run


def test_the_grace_time_is_held_against_what_was_measured(run: RunDirectory) -> None:
    cluster = SlurmCluster(backend="slurm", grace_seconds=100)  # 75 of which SLURM may be late
    assert grace_problem(run, cluster) is None  # nothing is known
    append_line(run.metrics_path, {"step": 1, "loss": 1.0, "step_seconds": 10.0})
    run.event_writer("rank0", 1).write("checkpoint", step=1, seconds=14.0, bytes=1)
    assert grace_problem(run, cluster) is None
    run.event_writer("rank0", 1).write("checkpoint", step=2, seconds=30.0, bytes=1)
    problem = grace_problem(run, cluster)
    assert problem is not None
    assert "take up to 40 s" in problem
    assert "cluster.grace_seconds=135" in problem
    assert grace_problem(run, cluster.model_copy(update={"grace_seconds": 135})) is None
