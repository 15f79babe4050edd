"""The nodes of a run while it runs: at which size an attempt starts, when more nodes are worth a restart, and which
slow node it does better without."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from launcher.nodes import NodePool
from launcher.sizes import worth_growing
from launcher.watch import Progress, epochs_of
from trainer.retry import retried
from trainer.rundir import LineReader, RunDirectory, read_json, write_json

_LOOK_SECONDS = 30.0
_LEAST_STEPS = 5  # before the pace of an attempt is known


class Nodes(Protocol):
    """What a backend knows about its nodes. Calls may take seconds, and are made in a thread."""

    pool: NodePool

    def candidates(self) -> list[str]:
        """All that an attempt could run on, as far as the scheduler knows."""

    def answering(self, nodes: Sequence[str]) -> list[str]:
        """Those on which something can be started now."""

    def seconds_left(self) -> float:
        """Until the scheduler ends the job; infinity if it does not."""


@dataclass
class Membership:
    """Nodes of one launch. `plans`: number of nodes -> plan.json, one for each of the pool's sizes."""

    run: RunDirectory
    nodes: Nodes
    plans: Mapping[int, Mapping[str, Any]]
    _found: list[str] = field(default_factory=list)
    _wants_more: bool = False
    _over: threading.Event = field(default_factory=threading.Event)

    def take(self, count: int) -> None:
        """The next attempt runs on `count` nodes: its ranks find the plan for them."""
        if (read_json(self.run.plan_path) or {}).get("nodes") != count:
            retried(lambda: write_json(self.run.plan_path, self.plans[count], indent=2), "plan.json")

    def begin(self, attempt: int) -> None:
        """Look now and then, while the attempt runs, whether nodes that were lost answer again."""
        self._over, self._found, self._wants_more = threading.Event(), [], False
        arguments = (attempt, int((read_json(self.run.plan_path) or {})["nodes"]), time.time(), self._over)
        threading.Thread(target=self._look, args=arguments, name="membership", daemon=True).start()

    def end(self) -> None:
        """The attempt is over; a look that is under way finds nothing any more."""
        self._over.set()

    @property
    def wants_more(self) -> bool:
        """Whether a restart with more nodes is worth its time."""
        return self._wants_more and not self._over.is_set()

    def accept(self, unfit: str | None, why: str) -> None:
        """An attempt follows: it may have the nodes that answered, but for one that is `unfit`."""
        self.nodes.pool.back(self._found)
        if unfit is not None:
            self.nodes.pool.lose(unfit, why)
        self._found = []

    def does_better_without(self, node: str, ratio: float) -> bool:
        """Whether to restart without a node that is `ratio` times as slow as the others.

        With a spare always; without one if the steps of fewer nodes take less than those that wait for it.
        """
        pool = self.nodes.pool
        present = int((read_json(self.run.plan_path) or {})["nodes"])
        try:
            left = [name for name in self.nodes.candidates() if name != node and name not in pool.away]
        except Exception:  # no word of the scheduler
            return False
        after = min(pool.size(len(left)), present)
        return after > 0 and _micro_batches(self.plans[after]) < ratio * _micro_batches(self.plans[present])

    def _look(self, attempt: int, present: int, began: float, over: threading.Event) -> None:
        metrics, progress = LineReader(self.run.metrics_path), Progress(epochs_of(self.run))
        with contextlib.suppress(OSError):
            metrics.skip()  # what earlier attempts have done
        while not over.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):  # storage or scheduler away for a moment
                pool = self.nodes.pool
                for line in metrics.read():
                    if "loss" in line:
                        progress.add(line)
                # also nodes that were not lost: one that was being drained, and is not any more
                there = self.nodes.candidates() if pool.away or present < max(pool.sizes) else []
                returning = pool.returning(there)
                found = self.nodes.answering(returning) if returning else []
                if over.is_set():
                    return
                self._found = found
                count = pool.size(sum(node not in pool.away for node in there) + len(found))
                if count > present and len(progress.recent) >= _LEAST_STEPS:
                    left = min(progress.eta_seconds() or 0.0, self.nodes.seconds_left())
                    cost = self._restart_seconds(attempt, began)
                    self._wants_more = worth_growing(self.plans, present, count, left, cost)

    def _restart_seconds(self, attempt: int, began: float) -> float:
        """What this attempt took to its first step, and a checkpoint; infinity if that is not known."""
        events = self.run.merged_events()
        first = [e for e in events if e["event"] == "first_step" and e.get("attempt") == attempt]
        saves = [float(e.get("seconds") or 0.0) for e in events if e["event"] == "checkpoint"]
        return float(first[0]["time"]) - began + (saves[-1] if saves else 0.0) if first else math.inf


def _micro_batches(plan: Mapping[str, Any]) -> float:
    return float(plan["batch"]["micro_batches_per_rank"])
