"""The run directory's files: whole lines, whole JSON, torn tails, the order of the ledger."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import retry
from trainer.failures import write_failure
from trainer.rundir import LineReader, RunDirectory, append_line, cut_torn_tail, read_json, read_lines, write_json


def test_write_json_replaces_whole_files_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2]})
    assert read_json(path) == {"a": [2]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": [2]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_lines_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    code = (
        "import sys; from pathlib import Path; from trainer.rundir import append_line\n"
        "for i in range(300): append_line(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'pad': 'x' * 5000})"
    )
    root = str(Path(__file__).resolve().parents[2])
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(k)], env=os.environ | {"PYTHONPATH": root})
        for k in range(3)
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for who in "012":
        assert [line["i"] for line in lines if line["who"] == who] == list(range(300))


def test_a_torn_tail_is_not_read_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert cut_torn_tail(path) == 15
    assert path.read_bytes() == whole
    assert cut_torn_tail(path) == 0


def test_a_line_that_found_no_room_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"step": 1})
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OSError, match="only a part"):
            append_line(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    append_line(path, {"step": 3})
    assert [line["step"] for line in read_lines(path)] == [1, 3]


@pytest.mark.parametrize("wrote", [0, 5, 12])
def test_a_line_outlives_storage_that_fails_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: int
) -> None:
    """Whatever of it the failing write had put into the file."""
    path, write = tmp_path / "metrics.jsonl", os.write
    failures = iter([errno.EIO, errno.ESTALE])

    def failing(descriptor: int, data: bytes) -> int:
        if (number := next(failures, None)) is not None:
            write(descriptor, data[:wrote])
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    append_line(path, {"step": 1})
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(os, "write", failing)
    append_line(path, {"step": 2})
    append_line(path, {"step": 3})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("length", [1, 65535, 65536, 65537, 200_000])
def test_tails_of_any_length_are_cut(tmp_path: Path, length: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"{}\n" + b"x" * length)
    assert cut_torn_tail(path) == length
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"x" * length)
    assert cut_torn_tail(path) == length
    assert path.read_bytes() == b""
    assert cut_torn_tail(tmp_path / "missing") == 0


def test_a_reader_gets_each_line_once_also_when_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "f"
    reader = LineReader(path)
    assert reader.read() == []
    append_line(path, {"a": 1})
    with open(path, "ab") as file:
        file.write(b'{"a": 2')
    assert reader.read() == [{"a": 1}]
    with open(path, "ab") as file:
        file.write(b"}\nnot json\n")
    assert reader.read() == [{"a": 2}]
    assert reader.read() == []
    path.write_bytes(b'{"a": 9}\n')
    assert reader.read() == [{"a": 9}]


def test_the_ledger_is_merged_by_time_and_survives_torn_writers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    one, two = run.event_writer("supervisor"), run.event_writer("rank0", attempt=1)
    one.write("attempt", attempt=1)
    two.write("first_step", step=1)
    one.write("finished", attempt=1)
    with open(run.events_dir / "rank0.jsonl", "ab") as file:
        file.write(b'{}\n{"time": 1, "ev')
    run.event_writer("rank0", attempt=2).write("first_step", step=7)
    assert [(event["event"], event["attempt"]) for event in run.merged_events()] == [
        ("attempt", 1),
        ("first_step", 1),
        ("finished", 1),
        ("first_step", 2),
    ]


def test_a_clock_that_is_set_back_changes_neither_order_nor_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    writer = run.event_writer("supervisor")
    first = writer.write("attempt", attempt=1)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    assert first["time"] <= writer.write("failure", attempt=1)["time"] < first["time"] + 60
    append_line(run.events_dir / "supervisor.jsonl", {"time": 2.0, "event": "finished"})  # by another process
    append_line(run.events_dir / "rank0.jsonl", {"time": first["time"] - 1, "event": "loaded"})
    assert [event["event"] for event in run.merged_events()] == ["loaded", "attempt", "failure", "finished"]


def test_attempts_are_numbered_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.attempts() == []
    assert [run.new_attempt(), run.new_attempt()] == [1, 2]
    assert run.attempts() == [1, 2]
    assert run.attempt_dir(2).name == "0002"


def test_the_last_line_of_a_step_wins(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)):
        append_line(run.metrics_path, {"step": step, "loss": loss})
    append_line(run.metrics_path, {"step": 2, "evaluation": {"loss": 4.0}})
    assert [(line["step"], line["loss"]) for line in run.step_lines()] == [(1, 3.0), (2, 2.5), (3, 1.0)]
    assert run.evaluation_lines() == [{"step": 2, "evaluation": {"loss": 4.0}}]


def test_the_newest_steps_are_found_from_the_end(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.last_steps(3) == []
    for step in range(1, 60):
        append_line(run.metrics_path, {"step": step, "loss": 1.0, "more": "x" * 200})
    append_line(run.metrics_path, {"step": 59, "evaluation": {f"set{i}/loss": 1.0 for i in range(1000)}})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 60, "loss"')
    assert [line["step"] for line in run.last_steps(1)] == [59]
    assert [line["step"] for line in run.last_steps(3)] == [57, 58, 59]
    assert [line["step"] for line in run.last_steps(100)] == list(range(1, 60))


def test_evaluations_that_a_run_has_gone_back_behind_do_not_count(tmp_path: Path) -> None:
    """Else the next one would be judged as if they followed it."""
    run = RunDirectory(tmp_path)
    for step, loss in ((20, 1.0), (40, 1.1), (60, 1.2), (60, 0.5)):
        append_line(run.metrics_path, {"step": step, "evaluation": {"loss": loss}})
    assert [line["step"] for line in run.evaluation_lines()] == [20, 40, 60]
    append_line(run.metrics_path, {"step": 40, "evaluation": {"loss": 0.9}})
    assert [(line["step"], line["evaluation"]["loss"]) for line in run.evaluation_lines()] == [(20, 1.0), (40, 0.9)]


def test_what_a_node_left_half_written_or_a_person_wrote_ends_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    attempt = run.new_attempt()
    write_failure(run.attempt_dir(attempt), 1, ValueError("why"), 3)
    (run.attempt_dir(attempt) / "failures" / "rank0.json").touch()
    assert [record["rank"] for record in run.failure_records(attempt)] == [1]
    (run.attempt_dir(attempt) / "agents").mkdir()
    run.agent_report_path(attempt, "n1").touch()
    assert run.agent_reports(attempt) == []
    assert run.stop_request(attempt) is None
    run.stop_path(attempt).touch()
    assert run.stop_request(attempt) == {"reason": "cancel"}


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for name in ("step-00000050", "step-00000100", "step-00000020.abandoned-1"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    for name in ("step-00000050", "step-00000020.abandoned-1"):
        (run.checkpoints_dir / name / "manifest.json").write_text("{}")
    assert run.published_checkpoints() == [50]
