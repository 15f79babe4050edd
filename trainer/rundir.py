"""The run directory: where everything about one run lives (the table in docs/architecture.md). Torch-free."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.retry import retried

Json = dict[str, Any]

_LINE_BYTES = 4096  # more than a step's line and an evaluation beside it usually take
# In the folder of an export: {"step", "config": what decided its training}
EXPORT_ABOUT = "dsft.json"
_BOOT = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_time() -> float:
    """Unix seconds, which only rise within a process, however the system's clock is set meanwhile."""
    return _BOOT + time.clock_gettime(time.CLOCK_BOOTTIME)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Replace `path` by `value` as JSON in one step."""
    write_text(path, json.dumps(value, indent=indent))


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BrokenFile(ValueError):
    """A file that is to hold JSON does not."""


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None if there is no such file. Raises BrokenFile."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BrokenFile(f"{path} is not valid JSON: {error}") from None


def _whole(paths: Iterable[Path]) -> list[Json]:
    """The objects in files, without those that a node has left half written, losing its power."""
    found = []
    for path in paths:
        with contextlib.suppress(ValueError):
            found.append(read_json(path))
    return [value for value in found if value]


def append_line(path: Path, value: Json) -> None:
    """Append `value` as one line of JSON in a single write(), so that lines of several writers never mix.

    Where storage fails for a moment, it is tried again for up to 15 s.
    """
    line = json.dumps(value).encode() + b"\n"
    tries = itertools.count()
    retried(lambda: _append(path, line, again=next(tries) > 0), str(path))


def _append(path: Path, line: bytes, again: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if again:  # although its write failed, it may be there, as a whole or in part
            end = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, len(line), max(0, end - len(line)))
            if tail == line:
                return
            if tail and not tail.endswith(b"\n"):
                line = b"\n" + line
        if (written := os.write(descriptor, line)) != len(line):
            # or the next line would be lost as well, being taken for the rest of this one
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            if os.fstat(descriptor).st_size == end:
                os.ftruncate(descriptor, end - written)
            raise OSError(f"{path}: only a part of a line could be written; is the disk full?")
    finally:
        os.close(descriptor)


@dataclass
class LineReader:
    """Reads the lines of JSON appended to `path` since the last call; survives the file being cut shorter."""

    path: Path
    offset: int = 0

    def skip(self) -> None:
        """Pass over the lines that are there. Raises OSError, but for a file that is not there."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            self.offset = _end_of_lines(file)

    def read(self) -> list[Json]:
        """New whole lines as objects. A torn tail is left for the next call; a broken line is passed over."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return list(_objects(whole))


def _objects(data: bytes) -> Iterator[Json]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # what a full disk or a power failure left of a line
            continue
        if isinstance(value, dict):
            yield value


def read_lines(path: Path) -> list[Json]:
    """All whole lines of a JSON-lines file; empty if there is none. A torn tail is not read."""
    return LineReader(path).read()


def merged(paths: Iterable[Path]) -> list[Json]:
    """The lines of several writers' files in the order of their times; each writer's own order is kept, also where the
    clock was set back between its lines."""
    told: list[tuple[float, Json]] = []
    for path in paths:
        latest = 0.0
        for line in read_lines(path):
            latest = max(latest, float(line.get("time", 0)))
            told.append((latest, line))
    return [line for _, line in sorted(told, key=lambda entry: entry[0])]


def cut_torn_tail(path: Path) -> int:
    """Cut what follows the last newline (a write that a kill interrupted); returns the bytes cut."""
    try:
        file = open(path, "rb+")  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        end, size = _end_of_lines(file), os.fstat(file.fileno()).st_size
        if end < size:
            file.truncate(end)
        return size - end


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last newline ends; 0 without one."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class EventWriter:
    """Appends to one file of the ledger. Each file has one writer at a time, so a torn tail in it can be cut."""

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self._path = path
        self._attempt = attempt
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)

    def write(self, event: str, **fields: Any) -> Json:
        """Append `{"time": unix seconds, "event": event, "attempt": n, **fields}`; returns it."""
        line: Json = {"time": wall_time(), "event": event}
        if self._attempt is not None:
            line["attempt"] = self._attempt
        line |= fields
        append_line(self._path, line)
        return line


class RunDirectory:
    """Paths and records of the run in `path`. Creating the object touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path = Path(os.path.abspath(path))
        self.name = path.name
        self.config_path = path / "config.json"
        self.plan_path = path / "plan.json"
        self.environment_path = path / "environment.json"
        self.events_dir = path / "events"
        self.metrics_path = path / "metrics.jsonl"
        self.tensorboard_dir = path / "tensorboard"
        self.checkpoints_dir = path / "checkpoints"
        self.export_dir = path / "export"
        self.lock_dir = path / "lock"

    def exists(self) -> bool:
        """True if this folder is a run (has its config)."""
        return self.config_path.is_file()

    # -- attempts

    def attempts(self) -> list[int]:
        """Numbers of the attempts made, rising; the first is 1."""
        try:
            names = os.listdir(self.path / "attempts")
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def new_attempt(self) -> int:
        """Create the folder of the next attempt; returns its number."""
        (self.path / "attempts").mkdir(parents=True, exist_ok=True)
        attempt = max(self.attempts(), default=0) + 1
        self.attempt_dir(attempt).mkdir()
        return attempt

    def attempt_dir(self, attempt: int) -> Path:
        return self.path / "attempts" / f"{attempt:04d}"

    def log_dir(self, attempt: int, node: str) -> Path:
        return self.attempt_dir(attempt) / "logs" / node

    def log_path(self, attempt: int, node: str, rank: int) -> Path:
        return self.log_dir(attempt, node) / f"rank{rank}.log"

    def agent_log_path(self, attempt: int, node: str) -> Path:
        return self.log_dir(attempt, node) / "agent.log"

    def agent_report_path(self, attempt: int, node: str) -> Path:
        return self.attempt_dir(attempt) / "agents" / f"{node}.json"

    def heartbeat_path(self, attempt: int, rank: int) -> Path:
        return self.attempt_dir(attempt) / "heartbeats" / f"rank{rank}"

    def stack_path(self, attempt: int, rank: int) -> Path:
        """Where a rank writes its threads' Python stacks when it is asked to."""
        return self.attempt_dir(attempt) / "stacks" / f"rank{rank}.txt"

    def verdict_path(self, attempt: int) -> Path:
        return self.attempt_dir(attempt) / "verdict.json"

    def failure_records(self, attempt: int) -> list[Json]:
        """What failing ranks wrote (`trainer.failures.write_failure`), in the order of their own times."""
        records = _whole((self.attempt_dir(attempt) / "failures").glob("rank*.json"))
        return sorted(records, key=lambda record: float(record["time"]))

    def agent_reports(self, attempt: int) -> list[Json]:
        """What the agents of an attempt wrote when their ranks had ended, by node name."""
        return _whole(sorted((self.attempt_dir(attempt) / "agents").glob("*.json")))

    def verdicts(self) -> list[Json]:
        """The verdicts of all attempts that have one, in order, each with its `attempt`."""
        found = ((attempt, read_json(self.verdict_path(attempt))) for attempt in self.attempts())
        return [{"attempt": attempt, **verdict} for attempt, verdict in found if verdict]

    # -- stop requests

    def stop_path(self, attempt: int) -> Path:
        return self.attempt_dir(attempt) / "stop"

    def request_stop(self, attempt: int, reason: str, now: bool = False) -> None:
        """Ask the ranks to save and exit at the next step (`now`: the supervisor kills them instead)."""
        write_json(self.stop_path(attempt), {"reason": reason, "now": now, "time": time.time()})

    def stop_request(self, attempt: int) -> Json | None:
        """The stop request of this attempt, if somebody has made one; None too while the storage does not answer."""
        try:
            request: Json | None = read_json(self.stop_path(attempt))
        except OSError:  # whoever asks will ask again
            return None
        except ValueError:  # made by hand
            return {"reason": "cancel"}
        return request

    def save_request_path(self, attempt: int) -> Path:
        """While this file is there, a checkpoint has been asked for (`dsft checkpoint save`)."""
        return self.attempt_dir(attempt) / "save"

    # -- ledger and metrics

    def event_writer(self, writer: str, attempt: int | None = None) -> EventWriter:
        """A writer of `events/<writer>.jsonl`; only one process may hold a given name at a time."""
        return EventWriter(self.events_dir / f"{writer}.jsonl", attempt)

    def merged_events(self) -> list[Json]:
        """The ledger of all writers, oldest first."""
        lines = merged(sorted(self.events_dir.glob("*.jsonl")))
        return [line for line in lines if "event" in line]  # others are nobody's of dsft

    def step_lines(self) -> list[Json]:
        """Logged steps in rising order, the last line of each step alone (a step recurs after a restart)."""
        last = {line["step"]: line for line in read_lines(self.metrics_path) if "loss" in line and "step" in line}
        return [last[step] for step in sorted(last)]

    def last_steps(self, count: int) -> list[Json]:
        """Up to `count` of the newest step lines, the newest last, found from the end of the file."""
        try:
            with open(self.metrics_path, "rb") as file:
                end, size = os.fstat(file.fileno()).st_size, count * _LINE_BYTES
                while True:
                    file.seek(max(0, end - size))
                    lines = file.read(min(end, size)).splitlines(keepends=True)
                    found: list[Json] = []
                    for line in reversed(lines[int(size < end) :]):  # the first may be cut, the last torn
                        if line.endswith(b"\n"):
                            found += [value for value in _objects(line) if "loss" in value and "step" in value]
                        if len(found) == count:
                            break
                    if len(found) == count or size >= end:
                        return found[::-1]
                    size *= 4
        except (FileNotFoundError, NotADirectoryError):
            return []

    def evaluation_lines(self) -> list[Json]:
        """Evaluations in rising order of step, without those that the run has gone back behind since."""
        kept: list[Json] = []
        for line in read_lines(self.metrics_path):
            if "evaluation" in line and "step" in line:
                while kept and kept[-1]["step"] >= line["step"]:
                    kept.pop()
                kept.append(line)
        return kept

    def published_checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are whole (their manifest is there), rising."""
        found = self.checkpoints_dir.glob("step-*/manifest.json")
        names = (path.parent.name.removeprefix("step-") for path in found)
        return sorted(int(name) for name in names if name.isdecimal())
