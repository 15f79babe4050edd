"""Which nodes an attempt runs on, and how many: what is held against each node, and the numbers that a run can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# So many losses rule a node out: one may have been its processes' or the network's
RULED_OUT = 2


@dataclass
class NodePool:
    """What is known against nodes. `sizes`: numbers of nodes that the run can go on with, rising; the last is its own.

    A node that was lost is `away`, and is left out as long as the others are enough for one of the sizes.
    """

    sizes: Sequence[int]
    losses: Counter[str] = field(default_factory=Counter)
    away: set[str] = field(default_factory=set)
    _judged: dict[str, str] = field(default_factory=dict)  # node -> why, of those not told yet

    def lose(self, node: str, for_good: str | None = None) -> None:
        """A node failed; `for_good`: why a single time is enough to keep it out until the ledger forgets it."""
        before = self.is_ruled_out(node)
        self.losses[node] += 1 if for_good is None else RULED_OUT
        self.away.add(node)
        if self.is_ruled_out(node) and not before:
            self._judged[node] = for_good or ""

    def news(self) -> list[tuple[str, str]]:
        """(node, why) of those that have been ruled out since the last call; why: empty if it was lost twice."""
        judged, self._judged = self._judged, {}
        return sorted(judged.items())

    def back(self, nodes: Iterable[str]) -> None:
        """These nodes answer again."""
        self.away -= {node for node in nodes if not self.is_ruled_out(node)}

    def remember(self, events: Sequence[Mapping[str, Any]], now: float, hours: float) -> None:
        """Take in the ledger of earlier launches: who failed comes last; who was judged bad is left out."""
        for node in bad_nodes(events, now, hours):
            self.losses[node] += 1
        for node in judged_bad(events, now, hours):
            self.losses[node] += RULED_OUT
            self.away.add(node)

    def is_ruled_out(self, node: str) -> bool:
        return self.losses[node] >= RULED_OUT

    def returning(self, there: Iterable[str]) -> list[str]:
        """Of the nodes `there` those that are away and may come back once they answer."""
        return [node for node in there if node in self.away and not self.is_ruled_out(node)]

    def size(self, count: int) -> int:
        """The largest number of nodes that `count` of them are enough for; 0 if there is none."""
        return max((size for size in self.sizes if size <= count), default=0)

    def choose(self, there: Sequence[str]) -> list[str]:
        """The nodes of the next attempt, in their order; those that are away only where too few are left without.

        Empty if `there` are too few for any size.
        """
        trusted = [node for node in there if node not in self.away]
        count = self.size(len(trusted)) or (min(self.sizes) if len(there) >= min(self.sizes) else 0)
        by_trust = sorted(there, key=lambda node: (node in self.away, self.losses[node]))
        chosen = set(by_trust[:count])
        return [node for node in there if node in chosen]


def bad_nodes(events: Sequence[Mapping[str, Any]], now: float, hours: float) -> list[str]:
    """Nodes that failed or were judged bad in the last `hours`, from a run's ledger; what a drill did does not count.

    now: unix seconds.
    """
    failed = (event for event in events if event["event"] == "failure" and event.get("class") == "node")
    return sorted({*_recent(events, failed, now, hours), *judged_bad(events, now, hours)})


def judged_bad(events: Sequence[Mapping[str, Any]], now: float, hours: float) -> list[str]:
    """Nodes that a run has ruled out in the last `hours` (event `bad_node`)."""
    return sorted(_recent(events, (event for event in events if event["event"] == "bad_node"), now, hours))


def _recent(
    events: Sequence[Mapping[str, Any]], chosen: Iterable[Mapping[str, Any]], now: float, hours: float
) -> set[str]:
    drilled = {event.get("attempt") for event in events if event["event"] == "drill"}
    return {
        str(event["node"])
        for event in chosen
        if event.get("node") and event.get("attempt") not in drilled and now - float(event["time"]) < 3600 * hours
    }
