"""Where the wall time of a run went: every second of it, from submission to the end, in exactly one part. Pure.

ETTR, the effective training time ratio of Kokolis et al. (2024), "Revisiting Reliability in Large-Scale Machine
Learning Research Clusters" (arXiv:2410.21680): productive runtime over available wall time of a run, over all its jobs
and restarts, where steps made again and restarts are not productive. They count time in the queue as available; here
it is left out, since it says more about the site than about the run:

    ETTR = useful / (wall - queue - idle)

`useful` is a step's time with its wait for data, each step once: of a step made several times the last counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

Json = Mapping[str, Any]
Part = Literal[
    "queue",  # waiting for the scheduler
    "start",  # launcher, agents, imports of the ranks
    "load",  # from the ranks' first own act to the first batch: model, checkpoint, data
    "useful",
    "repeated",  # steps that were made again after a failure or a rollback
    "checkpoint",  # training stood still for a save
    "evaluation",
    "export",
    "recovery",  # from the last progress before a failure to the next attempt, and going back behind a bad step
    "shutdown",  # from the ranks' last word to the end of the attempt
    "idle",  # nobody had asked for the run to go on
]
PARTS: tuple[Part, ...] = get_args(Part)

_ENDS = ("finished", "failed", "stopped")
# What else rank 0 says while it trains: time, and the step reached
_PROGRESS = ("first_step", "checkpoint_started", "evaluation", "rollback")


@dataclass(frozen=True)
class Span:
    """A stretch of time, in unix seconds, that belongs to one part."""

    start: float
    end: float
    part: Part


def timeline(
    events: Iterable[Json], lines: Iterable[Json], verdicts: Sequence[Json] = (), now: float | None = None
) -> list[Span]:
    """The run's time as spans without gaps or overlaps, in order; empty before anything has happened.

    Args:
        events: the merged ledger.
        lines: all lines of metrics.jsonl, repeated steps too.
        verdicts: of the attempts, with `attempt` and `requeue`.
        now: unix seconds, if the run runs or waits in the queue; else the time line ends with its last event.
    """
    told = sorted((_at_start(event) for event in events if "event" in event), key=_time)
    steps = sorted((line for line in lines if "loss" in line and "time" in line and "step" in line), key=_time)
    frame = list(_frame(told))
    if not frame:
        return []
    begin = _time(frame[0])
    ranks = [event for event in told if not _by_launcher(event)]
    signs = sorted([*map(_time, told), *map(_time, steps)])
    end = max(now or 0.0, signs[-1])
    requeued = {int(verdict["attempt"]) for verdict in verdicts if verdict.get("requeue")}
    layers: list[Span] = []
    for place, event in enumerate(frame):
        following = frame[place + 1] if place + 1 < len(frame) else None
        until = _time(following) if following else end
        if event["event"] == "attempt":
            window = _Window(event, until, following, ranks, steps, now is not None and following is None)
            if following is not None and following["event"] in ("launched", "submitted", "attempt"):
                # its supervisor was killed: it lasted to its last sign of life
                life = max((sign for sign in signs if sign < until), default=until)
                layers.append(Span(life, until, "recovery" if _same_job(event, frame[place + 1 :]) else "idle"))
                window.end = life
            layers += window.spans()
        else:
            layers.append(Span(_time(event), until, _after(event, frame[place + 1 :], requeued)))
    return _flatten([Span(begin, end, "idle"), *layers], begin, end)


def account(spans: Sequence[Span]) -> dict[str, Any]:
    """{wall_seconds, useful_seconds, ratio (useful / wall), ettr, seconds: {part: seconds}}; ratios None at no time."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for span in spans:
        seconds[span.part] += span.end - span.start
    wall = spans[-1].end - spans[0].start if spans else 0.0
    available = wall - seconds["queue"] - seconds["idle"]
    return {
        "wall_seconds": wall,
        "useful_seconds": seconds["useful"],
        "ratio": seconds["useful"] / wall if wall > 0 else None,
        "ettr": min(1.0, seconds["useful"] / available) if available > 0 else None,
        "seconds": seconds,
    }


def failure_times(events: Sequence[Json]) -> dict[int, dict[str, Any]]:
    """By attempt that failed: `time` (unix seconds), `injected` (the fault of a drill, or None), `detection_seconds`
    (from the injection until the supervisor knew; None without one), `recovery_seconds` (from there to the end of the
    next optimizer step, or None).
    """
    found: dict[int, dict[str, Any]] = {}
    for place, event in enumerate(events):
        if event["event"] != "failure":
            continue
        attempt, time = int(event["attempt"]), float(event.get("noticed", event["time"]))
        drills = [e for e in events[:place] if e["event"] == "drill" and e.get("attempt") == attempt]
        drill = drills[-1] if drills else None
        later = next((e for e in events[place:] if e["event"] == "first_step" and e.get("attempt", 0) > attempt), None)
        found[attempt] = {
            "time": time,
            "injected": drill["fault"] if drill else None,
            "detection_seconds": time - _time(drill) if drill else None,
            "recovery_seconds": _time(later) - time if later else None,
        }
    return found


def _time(event: Json) -> float:
    return float(event["time"])


def _at_start(event: Json) -> Json:
    """A launch begins with its process, which is a little older than its event."""
    return {**event, "time": event["started"]} if event["event"] == "launched" and "started" in event else event


def _by_launcher(event: Json) -> bool:
    kind = event["event"]
    rank_stopped = kind == "stopped" and "step" in event
    return kind in ("submitted", "launched", "attempt", "failure", "restart", *_ENDS) and not rank_stopped


def _frame(events: Iterable[Json]) -> Iterator[Json]:
    """The launcher's events, which cut the time into submissions, launches, attempts and pauses."""
    is_up = False
    for event in events:
        kind = event["event"]
        if kind == "submitted" and is_up:  # told a little late: the job had begun already
            continue
        if not _by_launcher(event):
            continue
        is_up = kind not in ("submitted", *_ENDS)
        yield event


def _same_job(event: Json, rest: Sequence[Json]) -> bool:
    """Whether the next attempt is of the same job as the last one: the scheduler has started it again."""
    later = next((e for e in rest if e["event"] == "attempt"), None)
    return later is not None and "job_id" in event and later.get("job_id") == event["job_id"]


def _after(event: Json, rest: Sequence[Json], requeued: set[int]) -> Part:
    """What the run does after an event of the launcher, until its next one."""
    match event["event"]:
        case "submitted":
            return "queue"
        case "launched" | "restart":
            return "start"
        case "failure":
            return "recovery"
    waits = int(event.get("attempt") or 0) in requeued
    return "queue" if waits and not any(e["event"] == "submitted" for e in rest[:1]) else "idle"


class _Window:
    """The time of one attempt."""

    def __init__(
        self, event: Json, end: float, following: Json | None, events: Sequence[Json], steps: Sequence[Json], live: bool
    ) -> None:
        self.start, self.end, self.live = _time(event), end, live
        self.failed = following is not None and following["event"] == "failure"
        self.mine = [e for e in events if e.get("attempt") == event.get("attempt")]
        self.said = {e["event"]: e for e in self.mine}
        self.lines = [line for line in steps if self.start < _time(line) <= end]
        self.resumes = [
            (_time(e), int(e["step"]) - 1 if e["event"] == "first_step" else int(e["to_step"]))
            for e in events
            if e["event"] in ("first_step", "rollback") and _time(e) > self.start
        ]

    def spans(self) -> Iterator[Span]:
        """Layers, the later above the earlier."""
        setup = _time(self.said["setup"]) if "setup" in self.said else None
        first = self._first_batch()
        if first is None:
            yield Span(self.start, self.end, "start")
            if setup is not None:
                yield Span(setup, self.end, "load")
            return
        yield Span(self.start, first, "start")
        if setup is not None:
            yield Span(setup, first, "load")
        last = yield from self._steps(first)
        over = next((self.said[name] for name in ("trained", "stopped") if name in self.said), None)
        if over is not None:
            yield Span(last, _time(over), "checkpoint")
            yield Span(_time(over), self.end, "export" if self.live else "shutdown")
        elif self.live:
            yield Span(last, self.end, "useful")
        else:
            yield Span(last, self.end, "recovery" if self.failed else "shutdown")
        for event in self.mine:
            seconds = float(event.get("stall_seconds") or event.get("seconds") or 0.0)
            match event["event"]:
                case "evaluation":
                    yield self._before(event, seconds, "evaluation")
                case "checkpoint_started" | "checkpoint_postponed":
                    yield self._before(event, seconds, "checkpoint")
                case "exported":
                    yield self._before(event, seconds, "export")

    def _before(self, event: Json, seconds: float, part: Part) -> Span:
        return Span(max(_time(event) - seconds, self.start), min(_time(event), self.end), part)

    def _first_batch(self) -> float | None:
        """When the first batch was there; None before the first step."""
        event = self.said.get("first_step")
        if event is None:
            return None
        time = _time(event)
        if "seconds" in event:
            time -= float(event["seconds"]) - float(event.get("data_seconds", 0.0))
        elif self.lines and self.lines[0]["step"] == event["step"]:
            time = _time(self.lines[0]) - float(self.lines[0].get("step_seconds", 0.0))
        return max(time, self.start)

    def _steps(self, first: float) -> Generator[Span, None, float]:
        """Spans of the steps; returns when the last of them was done.

        Between two marks the steps are taken to last equally long, where not every step is logged.
        """
        begun = int(self.said["first_step"]["step"]) - 1
        progress = [e for e in self.mine if e["event"] in _PROGRESS and e["event"] != "first_step"]
        marks = [(first, begun), (_time(self.said["first_step"]), begun + 1)]
        for mark in sorted([*self.lines, *progress], key=_time):
            back = mark.get("event") == "rollback"
            marks.append((_time(mark), int(mark["to_step"] if back else mark["step"])))
        kept = _kept(self.resumes)
        for (start, before), (end, after) in pairwise(marks):
            if after < before:  # back behind a bad step
                yield Span(start, end, "recovery")
                continue
            # of the steps `before + 1` to `after` those beyond `limit` were made again
            limit = min(max(kept(end), before), after)
            share = (limit - before) / (after - before) if after > before else float(kept(end) >= after)
            middle = start + (end - start) * share
            yield Span(start, middle, "useful")
            yield Span(middle, end, "repeated")
        return max(marks)[0]


def _kept(resumes: Sequence[tuple[float, int]]) -> Callable[[float], float]:
    """time -> the last step that nobody has gone back behind since then."""

    def kept(time: float) -> float:
        return min((step for when, step in resumes if when > time), default=float("inf"))

    return kept


def _flatten(layers: Sequence[Span], begin: float, end: float) -> list[Span]:
    """What is seen from above of spans that lie on each other, between begin and end; the first covers all."""
    shown = [(max(s.start, begin), min(s.end, end), s.part) for s in layers]
    starts = sorted((start, level) for level, (start, stop, _) in enumerate(shown) if stop > start)
    cuts = sorted({point for start, stop, _ in shown if stop > start for point in (start, stop)})
    result: list[Span] = []
    open_levels: list[int] = []  # a heap of negative levels; those that have ended are thrown out when they come up
    following = 0
    for cut, until in pairwise(cuts):
        while following < len(starts) and starts[following][0] <= cut:
            heapq.heappush(open_levels, -starts[following][1])
            following += 1
        while shown[-open_levels[0]][1] <= cut:
            heapq.heappop(open_levels)
        part = shown[-open_levels[0]][2]
        if result and result[-1].part == part:
            result[-1] = Span(result[-1].start, until, part)
        else:
            result.append(Span(cut, until, part))
    return result
