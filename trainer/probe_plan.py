"""Which ranks measure each other when, and which links are slow. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import TypeVar

Node = TypeVar("Node", int, str)

_SLOW = 3.0


def rounds(size: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `size` ranks once, in rounds of pairs that share no rank (the circle method of tournaments)."""
    players = [*range(size), *([-1] if size % 2 else [])]
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [pair for pair in pairs if -1 not in pair]
        players = [players[0], players[-1], *players[1:-1]]


def slow_links(speeds: Mapping[tuple[Node, Node], float]) -> list[tuple[Node, Node]]:
    """The links (from, to) whose speed is less than a third of that of the better half."""
    usual = statistics.median(sorted(speeds.values())[len(speeds) // 2 :]) if speeds else 0.0
    return sorted(link for link, speed in speeds.items() if speed * _SLOW < usual)
