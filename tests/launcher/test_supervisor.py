"""The supervisor with real agents and real ranks that fail, hang and are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.state import run_state
from launcher.supervisor import stop_signals
from trainer.processes import kill_run, processes_of_run, start_time
from trainer.rundir import RunDirectory, read_json

pytestmark = pytest.mark.faults

PROGRAM = Path(__file__).with_name("supervised.py")
ROOT = Path(__file__).resolve().parents[2]


class Launch:
    """A supervising process."""

    def __init__(self, run: RunDirectory, mode: str, resilience: dict[str, Any] | None = None) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "supervise", str(run.path), mode, json.dumps(resilience or {})],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, Any]:
        """Exit code and what it printed; asserts that nothing of the run is left."""
        output, _ = self.process.communicate(timeout=60)
        assert processes_of_run(self.run.path) == []
        return self.process.returncode, json.loads(output) if output.startswith("{") else output

    def pid_of(self, name: str, attempt: int = 1) -> int:
        """A pid that a rank has written down."""
        path = self.run.attempt_dir(attempt) / name
        wait_for(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def told(run: RunDirectory) -> list[str]:
    """What the attempts wrote to the ledger; without `setup`, for a rank may or may not come so far."""
    return [event["event"] for event in run.merged_events() if event["event"] not in ("launched", "setup")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    run = RunDirectory(tmp_path / "runs" / "r")
    yield run
    kill_run(run.path)


def agent_of(rank_pid: int) -> int:
    """The parent of a rank."""
    stat = Path(f"/proc/{rank_pid}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[1])


def test_a_data_error_is_named_and_never_retried(run: RunDirectory) -> None:
    code, result = Launch(run, "data").end()
    assert (code, result["class"], result["rank"], result["attempts"]) == (2, "data", 1, 1)
    assert result["message"] == "train.jsonl, line 7: no column `question`"
    assert result["victims"] == [0]
    assert "DataError" in result["traceback"]
    assert run_state(run).state == "failed"


def test_the_same_numeric_failure_twice_stops_the_run(run: RunDirectory) -> None:
    code, result = Launch(run, "numeric").end()
    assert (code, result["class"], result["attempts"]) == (1, "numeric", 2)
    assert "twice" in result["reason"]


def test_a_transient_crash_is_retried_and_told(run: RunDirectory) -> None:
    code, result = Launch(run, "flaky").end()
    assert (code, result["outcome"], result["attempts"]) == (0, "finished", 2)
    first = read_json(run.verdict_path(1))
    assert (first["class"], first["rank"], first["action"]) == ("unknown", 1, "retry")
    assert "SIGSEGV" in first["message"]
    assert told(run) == ["attempt", "failure", "attempt", "trained", "finished"]


@contextlib.contextmanager
def memory_group(limit: str) -> Iterator[Path]:
    """A control group with so much memory; its file of processes. Skips where none can be made."""
    version1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    base = version1.parent if version1.exists() else Path("/sys/fs/cgroup")
    group = base / f"dsft-drill-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups here: {error}")
    try:
        (group / ("memory.limit_in_bytes" if version1.exists() else "memory.max")).write_text(limit)
        yield group / "cgroup.procs"
    finally:
        deadline = time.monotonic() + 30
        while (group / "cgroup.procs").read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_so(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with memory_group("24M") as group:
        monkeypatch.setenv("MEMORY_GROUP", str(group))
        code, _ = Launch(run, "hungry").end()
    first, second = run.verdicts()
    assert (first["class"], first["rank"], first["action"]) == ("out_of_memory", 1, "retry")
    assert any("for memory on" in text for text in first["evidence"])
    assert (code, second["outcome"]) == (0, "finished")


def test_a_rank_that_is_killed_is_named_not_the_one_that_waited_for_it(run: RunDirectory) -> None:
    _, result = Launch(run, "echo").end()
    assert (result["rank"], result["victims"]) == (1, [0])
    assert "SIGKILL" in result["message"]


def test_a_rank_that_exits_without_a_word_is_named_with_its_last_output(run: RunDirectory) -> None:
    _, result = Launch(run, "silent").end()
    assert result["rank"] == 1
    assert "exit code 7" in result["message"]
    assert "a library says goodbye" in result["message"]


@pytest.mark.parametrize(
    ("number", "code", "reason"), [(signal.SIGINT, 130, "interrupt"), (signal.SIGTERM, 143, "terminate")]
)
def test_a_signal_stops_the_ranks_between_steps(run: RunDirectory, number: int, code: int, reason: str) -> None:
    """Also TERM and HUP to every process there is, as batch systems and systemd send them."""
    launch = Launch(run, "stoppable")
    wait_for(lambda: any(event["event"] == "first_step" for event in run.merged_events()))
    launch.process.send_signal(number)
    for pid in processes_of_run(run.path) if number == signal.SIGTERM else ():
        for other in (signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ProcessLookupError):  # it has saved and ended
                os.kill(pid, other)
    assert launch.end()[0] == code
    assert run.stop_request(1)["reason"] == reason  # type: ignore[index]
    assert told(run) == ["attempt", "first_step", "stopped", "stopped"]
    assert run_state(run).state == "stopped"


def test_a_signal_before_the_first_step_stops_at_once(run: RunDirectory) -> None:
    launch = Launch(run, "hang")
    launch.pid_of("pid0")
    begin = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    assert launch.end()[0] == 130
    assert time.monotonic() - begin < 20


def test_the_end_of_a_login_session_is_one_wish_to_stop() -> None:
    """systemd sends TERM and, at once, HUP."""
    with stop_signals() as signals:
        for number, count in ((signal.SIGHUP, 1), (signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGTERM, 2)):
            os.kill(os.getpid(), number)
            assert (signals.reason, signals.count) == ("terminate", count)


@pytest.mark.parametrize("by_signal", [True, False])
def test_whoever_does_not_want_to_wait_for_the_last_checkpoint(run: RunDirectory, by_signal: bool) -> None:
    """By a second Ctrl-C, or by `dsft cancel --now` after `dsft cancel`."""
    launch = Launch(run, "hang")
    launch.pid_of("pid0")
    run.event_writer("rank0", 1).write("first_step", step=1)
    for now in (False, True):
        if by_signal:
            launch.process.send_signal(signal.SIGINT)
        else:
            run.request_stop(1, "cancel", now=now)
        wait_for(lambda: run.stop_request(1))
        time.sleep(0.0 if now else 1.0)  # the supervisor looks every half second
    begin = time.monotonic()
    assert launch.end()[0] == (130 if by_signal else 143)
    assert time.monotonic() - begin < 20


def test_a_cancel_request_stops_the_run(run: RunDirectory) -> None:
    launch = Launch(run, "stoppable")
    wait_for(lambda: any(event["event"] == "first_step" for event in run.merged_events()))
    run.request_stop(1, "cancel")
    code, result = launch.end()
    assert (code, result["outcome"]) == (143, "stopped")


def test_kill_9_of_an_agent_leaves_no_rank_and_is_told(run: RunDirectory) -> None:
    launch = Launch(run, "hang")
    rank = launch.pid_of("pid0")
    os.kill(agent_of(rank), signal.SIGKILL)
    wait_for(lambda: run.verdict_path(1).exists(), 20)
    verdict = read_json(run.verdict_path(1))
    assert (verdict["class"], verdict["action"]) == ("node", "retry")
    assert "SIGKILL" in verdict["message"]
    assert start_time(rank) is None
    launch.pid_of("pid0", attempt=2)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end()[0] == 143


def test_kill_9_of_the_supervisor_leaves_nothing_and_the_lock_passes_on(run: RunDirectory) -> None:
    launch = Launch(run, "grandchild")
    ranks = [launch.pid_of("pid0"), launch.pid_of("pid1")]
    orphan = launch.pid_of("grandchild0")
    assert run_state(run).state == "running"
    launch.process.kill()
    launch.process.wait()
    wait_for(lambda: all(start_time(pid) is None for pid in ranks), 20)
    assert run_state(run).state == "failed"
    code, result = Launch(run, "done").end()
    assert (code, result["outcome"], result["attempts"]) == (0, "finished", 1)  # of its own
    assert start_time(orphan) is None  # what a rank had started is swept by the next launch
    assert run.attempts() == [1, 2]
    assert run_state(run).state == "finished"
    assert read_json(run.verdict_path(2))["outcome"] == "finished"
    assert "rank 1 runs done" in next(run.attempt_dir(2).glob("logs/*/rank1.log")).read_text()


def test_two_launches_of_one_run_cannot_both_run(run: RunDirectory) -> None:
    first = Launch(run, "hang")
    first.pid_of("pid0")
    second = Launch(run, "hang")
    output, _ = second.process.communicate(timeout=60)
    assert second.process.returncode == 75
    assert f"process {first.process.pid}" in output
    assert run.attempts() == [1]
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 143


def test_a_run_whose_folder_is_gone_says_so_and_leaves_nothing(run: RunDirectory, tmp_path: Path) -> None:
    """As when its storage is unmounted: nobody has taken over, and nothing goes on."""
    launch = Launch(run, "hang")
    ranks = [launch.pid_of("pid0"), launch.pid_of("pid1")]
    run.path.rename(tmp_path / "moved")
    output, _ = launch.process.communicate(timeout=60)
    assert launch.process.returncode != 0
    assert f"{run.path} is gone" in output
    wait_for(lambda: all(start_time(pid) is None for pid in ranks), 20)
    assert not run.path.exists()
