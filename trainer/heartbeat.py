"""What a rank is doing, published for the supervisor: where its main thread is, and how far its collectives are.

The main thread only sets marks, which costs about a microsecond; a thread of its own writes them every 2 s to
`attempts/NNNN/heartbeats/rank<k>`, and at once where a slow phase begins or ends, since the limit for hangs depends on
that: a rank that is suspended right after an evaluation must not seem to be in it still. So storage that stands still
never holds up training, and three things can be told apart: a rank that works (its marks change), one that waits (its
file is written, its marks stay) and one that is suspended (its file is not written any more). Torch-free, so that the
launcher can read what is written here.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer.failures import node_name

T = TypeVar("T")
R = TypeVar("R")
Phase = Literal["setup", "data", "step", "checkpoint", "evaluation", "export", "ending", "ended"]

INTERVAL_SECONDS = 2.0
_WRITES_PER_SECOND = 256  # of all ranks together: a shared file system has one metadata server for everybody
PHASES_OF_STEPS: frozenset[Phase] = frozenset({"data", "step"})  # all others may take long
# On this signal a rank writes the stack of each of its threads, and its agent passes it on to all ranks of the node
STACK_SIGNAL = signal.SIGUSR2
_RECENT_STEPS = 100
_MAX_GROUPS = 32
_BYTES = 2048


def interval_seconds(world_size: int) -> float:
    """How often a rank writes: every 2 s in runs of up to 512 ranks, less often in larger ones."""
    return max(INTERVAL_SECONDS, world_size / _WRITES_PER_SECOND)


@dataclass(frozen=True)
class Heartbeat:
    """What a rank has published last. Times are lengths in seconds: the clocks of two hosts are never compared."""

    rank: int
    node: str
    beats: int  # how often it was written
    phase: Phase
    step: int  # the step under way
    progress: int  # marks that the main thread has set
    phase_seconds: float  # since the last mark
    # of the process groups of all ranks, in the order of their creation: collectives that this rank has entered
    collectives: tuple[int, ...] = ()
    step_seconds: float = 0.0  # of the last step, with its wait for data
    data_seconds: float = 0.0  # of which waiting for data
    longest_step_seconds: float = 0.0  # among the last 100; 0: no step is done yet
    probe_seconds: float = 0.0  # see trainer.stragglers
    probes: int = 0  # how often that was measured
    own_data_seconds: float = 0.0  # making batches, without waiting for other ranks; since the start of the attempt

    def signs(self) -> tuple[object, ...]:
        """What changes as long as the rank gets on."""
        return self.phase, self.step, self.progress, self.collectives


@dataclass
class _State:
    """The marks of this process, set by its main thread and read by the one that publishes."""

    phase: Phase = "setup"
    step: int = 0
    progress: int = 0
    since: float = 0.0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    probe_seconds: float = 0.0
    probes: int = 0
    own_data_seconds: float = 0.0


_state = _State(since=time.monotonic())
_recent: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)
_over = threading.Event()
_publish_now = threading.Event()
_publisher: threading.Thread | None = None
_kept_open: list[Any] = []
_passed_over: list[Any] = []


def enter(phase: Phase, step: int | None = None) -> float:
    """The main thread begins `phase` (of `step`, else of the step before); returns time.monotonic()."""
    now = time.monotonic()
    changed = (phase in PHASES_OF_STEPS) != (_state.phase in PHASES_OF_STEPS)
    _state.phase, _state.since = phase, now
    if step is not None:
        _state.step = step
    _state.progress += 1
    if changed:
        _publish_now.set()
    return now


def step_done(began: float, data_seconds: float) -> float:
    """A step that began at `began` (time.monotonic()) is done; returns its seconds."""
    seconds = time.monotonic() - began
    _state.step_seconds, _state.data_seconds = seconds, data_seconds
    _state.progress += 1
    _recent.append(seconds)
    return seconds


def step_under_way() -> int | None:
    """The step that this process works at, or has done last; None before the first."""
    return _state.step or None


def note_probe(seconds: float) -> None:
    """The straggler probe took so long."""
    _state.probe_seconds = seconds
    _state.probes += 1


def noting_own_time(gather: Callable[[T], R]) -> Callable[[T], R]:
    """`gather`, a collective of the thread that makes batches; the time between its calls is published as own."""
    ended: float | None = None

    def noting(array: T) -> R:
        nonlocal ended
        if ended is not None:
            _state.own_data_seconds += time.monotonic() - ended
        result = gather(array)
        ended = time.monotonic()
        return result

    return noting


def pass_over(group: object) -> None:
    """No longer count the collectives of a process group: ranks have left it at different ones."""
    _passed_over.append(group)


def start(path: Path, rank: int, world_size: int = 1) -> None:
    """Publish this process's marks in `path` from now on until it ends."""
    global _publisher
    _publisher = threading.Thread(
        target=_publish, args=(path, rank, interval_seconds(world_size)), name="heartbeat", daemon=True
    )
    _publisher.start()


def finish() -> None:
    """Publish that this rank has ended well, if the storage lets us within the usual time."""
    enter("ended")
    _over.set()
    _publish_now.set()
    if _publisher is not None:
        _publisher.join(INTERVAL_SECONDS)


def write_stacks_on_signal(path: Path) -> None:
    """From now on STACK_SIGNAL writes the Python stack of every thread to `path`, whatever the main thread does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")  # noqa: SIM115  # open as long as the process lives: faulthandler keeps the descriptor only
    _kept_open.append(file)
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)


def read(path: Path) -> Heartbeat | None:
    """The heartbeat in `path`; None if there is none, or one that is being written just now."""
    try:
        value = json.loads(path.read_bytes())
        return Heartbeat(**value | {"collectives": tuple(value["collectives"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _publish(path: Path, rank: int, interval: float) -> None:
    node, beats = node_name(), 0
    while True:
        _publish_now.clear()  # before the marks are read: one set meanwhile is published next
        last = _over.is_set()
        beats += 1
        beat = Heartbeat(
            rank=rank,
            node=node,
            beats=beats,
            phase_seconds=time.monotonic() - _state.since,
            collectives=_collectives(),
            longest_step_seconds=max(tuple(_recent), default=0.0),
            **{name: value for name, value in vars(_state).items() if name in _FIELDS},
        )
        with contextlib.suppress(OSError):  # no storage: nothing is known of this rank meanwhile, and it trains on
            _write(path, beat)
            _flush_stacks()
        if last:
            return
        _publish_now.wait(interval)


_FIELDS = {field.name for field in fields(Heartbeat)}


def _flush_stacks() -> None:
    """NFS keeps what is written to an open file to itself for up to half a minute."""
    for file in _kept_open:
        if os.fstat(file.fileno()).st_size:
            os.fsync(file.fileno())


def _write(path: Path, beat: Heartbeat) -> None:
    """Overwrite in place: NFS shows new names late, new content at the next open; a full disk does not matter."""
    data = json.dumps(asdict(beat)).encode().ljust(_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, data, 0)
    finally:
        os.close(descriptor)


def _collectives() -> tuple[int, ...]:
    """The count that torch keeps for each process group, of gloo and NCCL alike: this rank entered so many."""
    torch_groups = sys.modules.get("torch.distributed.distributed_c10d")
    if torch_groups is None:
        return ()
    try:
        groups = [group for group in list(torch_groups._world.pg_map) if group not in _passed_over]
        largest = max((group.size() for group in groups), default=0)
        whole = [group for group in groups if group.size() == largest][:_MAX_GROUPS]
        return tuple(int(group._get_sequence_number_for_group()) for group in whole)
    except Exception:  # torch's internals: the table changes while it is read, or a backend does not count
        return ()
