"""Hangs: found in the heartbeats of an attempt's ranks by the supervisor's own clock; the limits come from the run.

Ranks of one model wait for each other in every step. So the attempt hangs if no rank at all gets on, and the cause is
the rank that the others wait for: the one that is suspended, or has entered fewer collectives than they have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config.schema import ResilienceConfig
from trainer.heartbeat import PHASES_OF_STEPS, Heartbeat, Phase, interval_seconds

FLOOR_SECONDS = 60.0
STEP_FACTOR = 5.0
# A rank whose file has not changed for this share of the limit is suspended: a living one writes every 2 s
_STALE_SHARE = 0.7
_SHOWN_RANKS = 8
_SHOWN_FRAMES = 12


@dataclass(frozen=True)
class Watched:
    """A rank as the supervisor has seen it."""

    beat: Heartbeat
    quiet_seconds: float  # since it last got on
    stale_seconds: float  # since its file last changed


@dataclass(frozen=True)
class Hang:
    """No rank gets on. `ranks` are the cause, none if nothing tells it; `suspended` have no heartbeat any more."""

    seconds: float
    limit_seconds: float
    ranks: tuple[int, ...]
    node: str | None
    phase: Phase | None
    step: int | None
    why: str
    suspended: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    evidence: tuple[str, ...] = ()
    stack: str | None = None  # of the first of `ranks`

    @property
    def message(self) -> str:
        where = f" in phase {self.phase}, step {self.step}" if self.phase else ""
        frame = f"; it was in {frame}" if (frame := top_frame(self.stack)) else ""
        limit = f"{self.seconds:.0f} s (limit {self.limit_seconds:.0f} s)"
        return f"hang{where}: no rank got on for {limit}; {self.why}{frame}"

    def to_event(self) -> dict[str, object]:
        """What the ledger says about it."""
        names = ("seconds", "limit_seconds", "ranks", "node", "phase", "step")
        return {name: getattr(self, name) for name in names}


def limit_seconds(beats: Iterable[Heartbeat], resilience: ResilienceConfig) -> float:
    """How long an attempt may stand still: a multiple of its longest recent step, more outside of steps.

    Ranks that are in different phases wait for the slowest of them, so the largest of their limits holds.
    """
    beats = [beat for beat in beats if beat.phase != "ended"]
    longest = max((beat.longest_step_seconds for beat in beats), default=0.0)
    slow = resilience.slow_phase_timeout_seconds
    # the first step compiles, allocates and fills buffers: nothing is learned yet
    if not longest or any(beat.phase not in PHASES_OF_STEPS for beat in beats):
        return slow
    if resilience.hang_timeout_seconds != "auto":
        return float(resilience.hang_timeout_seconds or 0.0)
    return max(FLOOR_SECONDS, STEP_FACTOR * longest)


def find_hang(watched: Sequence[Watched], world_size: int, resilience: ResilienceConfig) -> Hang | None:
    """The hang of an attempt, if it is one. Pure.

    Args:
        watched: every rank that has been heard of.
        world_size: ranks of the attempt; 0 if unknown.
    """
    if not watched or resilience.hang_timeout_seconds is None:
        return None
    missing = tuple(sorted(set(range(world_size)) - {w.beat.rank for w in watched}))
    limit = limit_seconds((w.beat for w in watched), resilience)
    if missing:
        limit = max(limit, resilience.slow_phase_timeout_seconds)
    watched = [w for w in watched if w.beat.phase != "ended"]
    stale = [w for w in watched if w.stale_seconds > max(_STALE_SHARE * limit, 2 * interval_seconds(world_size))]
    if len(stale) == len(watched) > 1:  # rather the storage between us and them; their training may go on
        limit = max(limit, resilience.slow_phase_timeout_seconds)
    quiet = min((w.quiet_seconds for w in watched), default=0.0)
    if quiet <= limit:
        return None
    ranks, why = _cause(watched, missing, stale)
    first = next((w.beat for w in watched if w.beat.rank in ranks), None)
    furthest = max((w.beat for w in watched), key=lambda beat: (beat.step, beat.progress))
    beat = first if first is not None and len(stale) == 0 else furthest  # a suspended rank's last word is an old one
    return Hang(
        seconds=quiet,
        limit_seconds=limit,
        ranks=ranks,
        node=first.node if first else None,
        phase=beat.phase,
        step=furthest.step,
        why=why,
        suspended=tuple(w.beat.rank for w in stale),
        others=tuple(w.beat.rank for w in watched if w.beat.rank not in ranks),
        evidence=tuple(_describe(w) for w in _shown(watched, ranks)),
    )


def _cause(
    watched: Sequence[Watched], missing: tuple[int, ...], stale: Sequence[Watched]
) -> tuple[tuple[int, ...], str]:
    """The ranks that the others wait for, and how that shows."""
    if missing:
        return missing, f"{_name(missing)} never started to work"
    if stale and (len(stale) < len(watched) or len(watched) == 1):
        ranks = tuple(w.beat.rank for w in stale)
        return ranks, (
            f"{_name(ranks)} gave no sign of life for {min(w.stale_seconds for w in stale):.0f} s: suspended, stuck in "
            "the kernel, or holding Python's lock"
        )
    if len(watched) == 1:
        return (watched[0].beat.rank,), f"{_name((watched[0].beat.rank,))} is alive but stands still"
    if all(w.beat.phase in PHASES_OF_STEPS for w in watched):
        marks = {w.beat.rank: (w.beat.step, w.beat.phase == "step") for w in watched}
        behind = tuple(rank for rank, mark in marks.items() if mark < max(marks.values()))
        if behind:
            return behind, f"{_name(behind)} did not come as far as the others, which wait"
    for group, counts in enumerate(zip(*(w.beat.collectives for w in watched), strict=False)):
        if min(counts) < max(counts):
            ranks = tuple(w.beat.rank for w, count in zip(watched, counts, strict=True) if count < max(counts))
            waiting = len(watched) - len(ranks)
            return ranks, (
                f"{_name(ranks)} did not enter collective {max(counts)} of process group {group}, in which {waiting} "
                f"rank{'s wait' if waiting > 1 else ' waits'}"
            )
    return (), "every rank has entered the same collectives: rather the network or a device than one of the ranks"


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (", ..." if len(ranks) > _SHOWN_RANKS else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _shown(watched: Sequence[Watched], ranks: Sequence[int]) -> list[Watched]:
    """The causes first, then some of the others."""
    return sorted(watched, key=lambda w: (w.beat.rank not in ranks, w.beat.rank))[:_SHOWN_RANKS]


def _describe(watched: Watched) -> str:
    beat = watched.beat
    return (
        f"rank {beat.rank} on {beat.node}: {beat.phase}, step {beat.step}, {beat.phase_seconds:.0f} s after its last "
        f"mark when it wrote last, {watched.stale_seconds:.0f} s ago; collectives entered: {list(beat.collectives)}"
    )


# -- the ranks' stacks ------------------------------------------------------------------------------------------------


def main_stack(text: str) -> str | None:
    """The innermost frames of the main thread, innermost first, from what faulthandler wrote; None: nothing."""
    # the signal goes to the main thread, which faulthandler calls the current one
    found = re.search(r"^Current thread .*\n((?:  File .*\n?)+)", text, re.MULTILINE)
    return "\n".join(found[1].splitlines()[:_SHOWN_FRAMES]) if found else None


def top_frame(stack: str | None) -> str | None:
    """`name (file.py:12)` of the innermost frame."""
    found = re.match(r'  File "(?:.*/)?(.*)", line (\d+) in (.*)', stack or "")
    return f"{found[3]} ({found[1]}:{found[2]})" if found else None


def with_stack(hang: Hang, folder: Path) -> Hang:
    """`hang` with what its first rank wrote to `folder`."""
    if not hang.ranks:
        return hang
    path = folder / f"rank{hang.ranks[0]}.txt"
    try:
        stack = main_stack(path.read_text(errors="replace"))
    except OSError:
        stack = None
    if stack is None:
        return replace(hang, evidence=(*hang.evidence, f"rank {hang.ranks[0]} could not write its stack"))
    return replace(hang, stack=stack, evidence=(*hang.evidence, f"all stacks: {folder}"))
