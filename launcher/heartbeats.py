"""Reads the heartbeats of an attempt's ranks while it runs, and has them judged."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.hangs import Hang, Watched, find_hang, limit_seconds
from launcher.stragglers import Straggler, StragglerWatch
from trainer.config.schema import ResilienceConfig
from trainer.heartbeat import Heartbeat, read
from trainer.rundir import RunDirectory

_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 5.0
_PAUSES_A_LIMIT = 20


@dataclass
class _Seen:
    beat: Heartbeat
    quiet_since: float
    stale_since: float


@dataclass
class HeartbeatWatch:
    """Reads `folder` in a thread of its own, which may wait for the storage, until there is a `hang` or `stop`.

    Time counts only as far as heartbeats could be read, so that neither a suspended supervisor nor storage that stood
    still makes a hang. `stragglers` fills up; take them from its left.
    """

    folder: Path
    world_size: int  # 0: not known
    resilience: ResilienceConfig
    hang: Hang | None = None
    stragglers: collections.deque[Straggler] = field(default_factory=collections.deque)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _clock: float = 0.0
    _last: float | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeats", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def has_told(self, run: RunDirectory, attempt: int) -> bool:
        """True once every rank but those that are suspended has written its stacks, and every agent its report."""
        suspended = self.hang.suspended if self.hang else ()
        asked = [rank for rank, seen in self._seen.items() if rank not in suspended and seen.beat.phase != "ended"]
        nodes = {seen.beat.node for seen in self._seen.values()}
        with contextlib.suppress(OSError):
            stacks = all(run.stack_path(attempt, rank).stat().st_size > 0 for rank in asked)
            return stacks and all(run.agent_report_path(attempt, node).exists() for node in nodes)
        return False

    def look(self, now: float) -> list[Watched]:
        """Read every heartbeat; `now` is time.monotonic()."""
        beats: list[Heartbeat] = []
        with contextlib.suppress(OSError):
            beats = [beat for path in self.folder.glob("rank*") if (beat := read(path)) is not None]
        if beats and self._last is not None:
            self._clock += min(now - self._last, 2 * _LONGEST_PAUSE_SECONDS)
        self._last = now
        for beat in beats:
            seen = self._seen.setdefault(beat.rank, _Seen(beat, self._clock, self._clock))
            if beat.signs() != seen.beat.signs():
                seen.quiet_since = self._clock
            if beat.beats != seen.beat.beats:
                seen.stale_since = self._clock
            seen.beat = beat
        clock = self._clock
        return [Watched(s.beat, clock - s.quiet_since, clock - s.stale_since) for _, s in sorted(self._seen.items())]

    def _run(self) -> None:
        slow = StragglerWatch()
        pause = _SHORTEST_PAUSE_SECONDS
        while self.hang is None and not self._over.wait(pause):
            watched = self.look(now := time.monotonic())
            beats = [rank.beat for rank in watched]
            if self.resilience.hang_timeout_seconds is not None:
                limit = limit_seconds(beats, self.resilience)
                pause = min(max(limit / _PAUSES_A_LIMIT, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)
                self.hang = find_hang(watched, self.world_size, self.resilience)
            else:
                pause = _LONGEST_PAUSE_SECONDS
            self.stragglers.extend(slow.update(beats, now))
