"""The lock of a run: a lease in files, for shared storage, that trusts no clock but each contender's own.

`lock/holder-<generation>` belongs to whoever created it (link(2) fails if it is there, also on NFS); the highest
generation holds the lock. The holder raises a counter in its file every RENEW_SECONDS. A contender that sees the
counter stand still for LEASE_SECONDS on its own monotonic clock, or that the holder's process is gone from this very
host, creates the next generation: of several contenders one wins. A holder that finds a higher generation has lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.failures import EXIT_TEMPORARY, DsftError, node_name
from trainer.processes import host_identity, same_host, start_time
from trainer.rundir import read_json, write_json

LEASE_SECONDS = 10.0
RENEW_SECONDS = 2.0
RUNNING = (
    "this run is running already",
    "Watch it with `dsft status`, stop it with `dsft cancel`, or choose another `name`.",
)


class LockedError(DsftError):
    """Somebody else holds the lock."""

    exit_code = EXIT_TEMPORARY


@dataclass(frozen=True)
class Holder:
    """Who holds, or last held, a lock."""

    generation: int
    node: str
    host: str
    pid: int
    process_start: int
    since: float
    counter: int
    released: bool
    user: int = -1

    def is_gone(self) -> bool:
        """True if it is certain, without waiting, that the holder holds no more: other users' processes may be hidden
        (proc(5), hidepid)."""
        seen = same_host(self.host) and self.user == os.getuid()
        return self.released or (seen and start_time(self.pid) != self.process_start)

    def is_here(self) -> bool:
        """True if the holder is a living process of this host."""
        return not self.released and same_host(self.host) and start_time(self.pid) == self.process_start


def read_holder(folder: Path) -> Holder | None:
    """The holder of the highest generation in `folder`, alive or not; None if there never was one."""
    for _ in range(100):
        generations = _generations(folder)
        if not generations:
            return None
        value: dict[str, Any] | None = read_json(_path(folder, generations[-1]))
        if value is not None:  # else swept by a newer generation since the listing: look again
            return Holder(generation=generations[-1], **value)
    raise OSError(f"{folder}: the lock changes faster than it can be read")


def _generations(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name.removeprefix("holder-")) for name in names if name.startswith("holder-"))


def _path(folder: Path, generation: int) -> Path:
    return folder / f"holder-{generation:08d}"


class Lease:
    """A lock that is held. `lost` is set, once and for good, when another holder has taken over."""

    def __init__(self, folder: Path, generation: int, value: dict[str, Any], renew_seconds: float) -> None:
        self._folder = folder
        self._generation = generation
        self._value = value
        self._renew_seconds = renew_seconds
        self._end = threading.Event()
        self.lost = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(self._renew_seconds):
            try:
                if _generations(self._folder)[-1:] != [self._generation]:
                    self.lost.set()
                    return
                self._value["counter"] += 1
                write_json(_path(self._folder, self._generation), self._value)
            except OSError:  # storage away for a while: whether the lock was lost shows when it is back
                continue

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the next contender in at once."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a full disk: the lock runs out by itself
            if not self.lost.is_set() and _generations(self._folder)[-1:] == [self._generation]:
                write_json(_path(self._folder, self._generation), self._value | {"released": True})


def acquire(
    folder: Path,
    on_wait: Callable[[Holder], None] | None = None,
    lease_seconds: float = LEASE_SECONDS,
    renew_seconds: float = RENEW_SECONDS,
    held: tuple[str, str] = RUNNING,
) -> Lease:
    """Take the lock in `folder`, waiting out a holder that may be dead for at most about `lease_seconds`.

    `on_wait` is called once if there is something to wait for. Raises LockedError, naming the holder, if it lives;
    `held` is what it then says is going on, and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        holder = read_holder(folder)
        if holder is not None and not holder.is_gone():
            _wait_out(folder, holder, on_wait, lease_seconds, held)
        generation = holder.generation + 1 if holder else 1
        value = {
            "node": node_name(),
            "host": host_identity(),
            "pid": os.getpid(),
            "user": os.getuid(),
            "process_start": start_time(os.getpid()) or 0,
            "since": time.time(),
            "counter": 0,
            "released": False,
        }
        if _create(folder, generation, value):
            return Lease(folder, generation, value, renew_seconds)


def _wait_out(
    folder: Path,
    holder: Holder,
    on_wait: Callable[[Holder], None] | None,
    lease_seconds: float,
    held: tuple[str, str],
) -> None:
    """Return when `holder` is taken for dead; raise LockedError as soon as anybody is seen alive."""
    deadline = time.monotonic() + lease_seconds
    waited = False
    while time.monotonic() < deadline:
        now = read_holder(folder)
        if now is None or now.is_here() or (now.generation, now.counter) != (holder.generation, holder.counter):
            if now is not None and now.released:
                return
            raise _locked(folder, now or holder, held)
        if now.is_gone():
            return
        if not waited and on_wait is not None:
            on_wait(holder)
        waited = True
        time.sleep(min(0.1, lease_seconds / 10))


def _create(folder: Path, generation: int, value: dict[str, Any]) -> bool:
    """Create the file of `generation` as a whole; False if another contender was first."""
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    write_json(temporary, value)  # on disk before it has its name
    try:
        os.link(temporary, _path(folder, generation))
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    if _generations(folder)[-1] != generation:  # others came, held and swept while this one was thinking
        _path(folder, generation).unlink(missing_ok=True)
        return False
    for old in _generations(folder)[:-1]:
        _path(folder, old).unlink(missing_ok=True)
    return True


def _locked(folder: Path, holder: Holder, held: tuple[str, str]) -> LockedError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    what, advice = held
    return LockedError(
        f"{folder.parent}: {what}: process {holder.pid} on {holder.node} holds its lock since {since}. {advice}"
    )
