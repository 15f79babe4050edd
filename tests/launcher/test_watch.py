"""Progress in a log and on a terminal, read from a run directory that grows."""

from __future__ import annotations

import contextlib
import io
import os
import pty
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launcher import place
from launcher import watch as module
from launcher.commands import launch
from launcher.watch import Progress, Watch, describe_failure, duration
from trainer.failures import UserError
from trainer.rundir import LineReader, RunDirectory, append_line


def step(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": number,
        "loss": 2.0 / number,
        "learning_rate": 5e-4,
        "grad_norm": 1.25,
        "target_tokens": 500,
        "tokens": 800,
        "padded_tokens": 1000,
        "step_seconds": 0.5,
        "batch_digest": "00",
        "memory_bytes": 3 << 30,
        "total_steps": 10,
        "progress": number / 10,
    }
    return line | changes


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture(autouse=True)
def _read_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(module, "_READ_FOR_LOG_SECONDS", 0.0)


def test_rates_are_real_tokens_over_time() -> None:
    progress = Progress()
    progress.add(step(1, step_seconds=1.0))
    progress.add(step(2, step_seconds=3.0, target_tokens=100, tokens=200))
    assert progress.rate("target_tokens") == 600 / 4
    assert progress.rate("tokens") == 1000 / 4
    assert progress.eta_seconds() == pytest.approx(2.0 * 8)


def test_with_epochs_the_eta_follows_the_documents() -> None:
    progress = Progress(epochs=2.0)
    progress.add(step(5, total_steps=None, progress=0.5))
    assert progress.position() == "step 5 (25 %)"
    assert progress.eta_seconds() == pytest.approx(0.5 * 15)


def test_a_log_gets_plain_lines_not_too_many_and_always_the_last(run: RunDirectory) -> None:
    stream = io.StringIO()
    watch = Watch(run, stream)
    for number in range(1, 11):
        append_line(run.metrics_path, step(number))
        watch.tick()
    append_line(run.metrics_path, {"step": 10, "evaluation": {"loss": 0.25, "perplexity": 1.284}})
    run.event_writer("rank0", 1).write("checkpoint", step=10, seconds=0.5, bytes=5 << 20)
    watch.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ") and "/" in line] == [
        "step 1/10",
        "step 10/10",
    ]
    assert "loss 2  lr 0.0005  grad norm 1.25  target tokens/s 1,000  tokens/s 1,600  memory 3.0 GiB" in lines[0]
    assert "step 10: evaluation loss 0.25, perplexity 1.284" in lines
    assert "checkpoint of step 10 written (5.0 MiB in 0.5 s)" in lines
    assert "\x1b" not in stream.getvalue()


def test_how_far_an_attempt_came_is_told_before_the_next_one(run: RunDirectory) -> None:
    stream = io.StringIO()
    watch = Watch(run, stream)
    for number in (1, 2, 3):
        append_line(run.metrics_path, step(number))
        watch.tick()
    supervisor = run.event_writer("supervisor")
    supervisor.write("failure", attempt=1, action="retry", **{"class": "node", "message": "gone"})
    supervisor.write("attempt", attempt=2)
    watch.tick()
    watch.close()
    told = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
    assert told == ["step 1/10", "step 3/10", "failure: node error: gone; trying again", "attempt 2 starts"]


def test_nan_is_shown(run: RunDirectory) -> None:
    stream = io.StringIO()
    watch = Watch(run, stream)
    append_line(run.metrics_path, step(1, loss=float("nan"), grad_norm=float("inf")))
    watch.close()
    assert "loss nan" in stream.getvalue()
    assert "grad norm inf" in stream.getvalue()


def test_the_past_of_a_resumed_run_is_not_told_again(run: RunDirectory) -> None:
    append_line(run.metrics_path, step(4))
    run.event_writer("supervisor").write("failure", attempt=1, **{"class": "node", "message": "gone"})
    stream = io.StringIO()
    watch = Watch(run, stream)
    watch.tick()
    assert stream.getvalue() == ""
    append_line(run.metrics_path, step(5))
    watch.close()
    assert stream.getvalue().startswith("step 5/10")


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty])
def test_a_closed_pipe_or_terminal_does_not_stop_anything(
    run: RunDirectory, opened: Callable[[], tuple[int, int]]
) -> None:
    read, write = opened()
    watch = Watch(run, os.fdopen(write, "w"))
    os.close(read)
    append_line(run.metrics_path, step(1))
    watch.tick()
    watch.say("more")
    watch.close()


def test_storage_that_is_away_for_a_moment_stops_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(_reader: LineReader) -> list[Any]:
        raise OSError(116, "Stale file handle")

    output = io.StringIO()
    watch = Watch(run, output)
    run.event_writer("launch").write("warning", message="so it is")
    with monkeypatch.context() as patch:
        patch.setattr(LineReader, "read", away)
        watch.tick()
        assert output.getvalue() == ""
    watch.tick()
    assert output.getvalue() == "warning: so it is\n"


def shown(leader: int) -> bytes:
    """All that was written to a terminal whose other end is closed; a single read may get a part."""
    output = b""
    with contextlib.suppress(OSError):  # there is no more
        while part := os.read(leader, 65536):
            output += part
    os.close(leader)
    return output


def test_a_terminal_shows_a_live_view(run: RunDirectory) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        watch = Watch(run, terminal)
        append_line(run.metrics_path, step(3))
        watch.tick()
        watch.say("checkpoint written")
        watch.close()
    output = shown(leader).decode()
    assert "step 3/10" in output
    assert "grad norm" in output
    assert "checkpoint written" in output
    assert "\x1b[" in output


def test_a_terminal_that_moves_no_cursor_gets_plain_lines(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        watch = Watch(run, terminal)
        append_line(run.metrics_path, step(3))
        watch.close()
    assert shown(leader).startswith(b"step 3/10")


def test_a_launch_that_is_refused_leaves_the_terminal_as_it_was(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(place, "open_place", Mock(side_effect=UserError("n1 does not answer")))
    config = Mock()
    config.resilience.notify = ()
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, pytest.raises(UserError):
        launch._supervise(config, {"world_size": 1}, run, Mock(), Mock(), {}, terminal, None)
    output = shown(leader)
    assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h") == 1  # the cursor


def test_words() -> None:
    assert [duration(seconds) for seconds in (5, 3661, 90061)] == ["0:00:05", "1:01:01", "1 d 1:01:01"]
    failure = {"class": "out_of_memory", "rank": 3, "node": "n1", "step": 12, "message": "full"}
    assert describe_failure(failure) == "out of memory error on rank 3 (node n1), step 12: full"
    assert describe_failure({"class": "user", "message": "x\x1b[2J"}) == "user error: x\ufffd[2J"
