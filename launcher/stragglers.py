"""Stragglers: ranks that have been slower than the others for minutes, from the heartbeats.

The ranks of a synchronous loop all take as long as the slowest, so their step times say nothing. Two things do: a
fixed piece of work without collectives (`trainer.stragglers`), and how long a rank makes batches by itself, where
training has to wait for batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.heartbeat import Heartbeat

RATIO = 1.5
IN_A_ROW = 3
WINDOW_SECONDS = 60.0
# Batches matter where a step waits for them for this share of its time; so does what a rank takes to make them
_DATA_SHARE = 0.1

Kind = Literal["compute", "data"]


@dataclass(frozen=True)
class Straggler:
    """`rank` took `ratio` times the median of all ranks, IN_A_ROW times; `seconds` is its last time."""

    rank: int
    node: str
    kind: Kind
    ratio: float
    seconds: float
    median_seconds: float


def slow_ranks(seconds: Mapping[int, float]) -> dict[int, float]:
    """Rank -> its ratio to the (lower) median, of those beyond RATIO."""
    if len(seconds) < 2:
        return {}
    median = statistics.median_low(seconds.values())
    return {rank: own / median for rank, own in seconds.items() if 0 < median * RATIO < own}


@dataclass
class StragglerWatch:
    """Remembers who was slow before; each rank is told once a kind."""

    _ratios: dict[tuple[Kind, int], list[float]] = field(default_factory=dict)
    _told: set[tuple[Kind, int]] = field(default_factory=set)
    _probes: int = 0
    _window: dict[int, float] = field(default_factory=dict)
    _window_began: float = 0.0

    def update(self, beats: Sequence[Heartbeat], now: float) -> list[Straggler]:
        """Take in the heartbeats of all ranks, seen at `now` (time.monotonic()); who is a straggler since now."""
        found: list[Straggler] = []
        counts = {beat.probes for beat in beats}
        if len(counts) == 1 and (count := counts.pop()) > self._probes:  # the same probe of every rank
            self._probes = count
            found += self._judge("compute", beats, {beat.rank: beat.probe_seconds for beat in beats}, 0.0)
        if self._window.keys() != {beat.rank for beat in beats}:
            self._begin_window(beats, now)
        elif now - self._window_began >= WINDOW_SECONDS:
            own = {beat.rank: beat.own_data_seconds - self._window[beat.rank] for beat in beats}
            waits = [beat.data_seconds > _DATA_SHARE * beat.step_seconds for beat in beats]
            least = _DATA_SHARE * (now - self._window_began)
            found += self._judge("data", beats, own if all(waits) else {}, least)
            self._begin_window(beats, now)
        return found

    def _begin_window(self, beats: Sequence[Heartbeat], now: float) -> None:
        self._window = {beat.rank: beat.own_data_seconds for beat in beats}
        self._window_began = now

    def _judge(
        self, kind: Kind, beats: Sequence[Heartbeat], seconds: Mapping[int, float], least: float
    ) -> list[Straggler]:
        slow = {rank: ratio for rank, ratio in slow_ranks(seconds).items() if seconds[rank] >= least}
        found = []
        for beat in beats:
            key: tuple[Kind, int] = kind, beat.rank
            ratios = [*self._ratios.get(key, ()), slow[beat.rank]] if beat.rank in slow else []
            self._ratios[key] = ratios[-IN_A_ROW:]
            if len(ratios) >= IN_A_ROW and key not in self._told:
                self._told.add(key)
                ratio, median = statistics.median(self._ratios[key]), statistics.median_low(seconds.values())
                found.append(Straggler(beat.rank, beat.node, kind, ratio, seconds[beat.rank], median))
        return found
