"""SLURM's short form of node lists. Expanded here, since `scontrol show hostnames` may be missing in a container."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PART = re.compile(r"\[([^\]]*)\]")


def expand(text: str) -> list[str]:
    """The nodes of a list such as ``n[1-3,07-10],login,r[1-2]n[1-4]``, in SLURM's order.

    Raises ValueError for what is not a node list.
    """
    return [node for item in _items(text) for node in _expand_one(item)]


def _items(text: str) -> Iterator[str]:
    """Cut at the commas outside brackets."""
    depth = start = 0
    for index, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"not a node list: {text!r}")
        if character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise ValueError(f"not a node list: {text!r}")
    if text:
        yield text[start:]


def _expand_one(item: str) -> Iterator[str]:
    match = _PART.search(item)
    if match is None:
        if not item.strip():
            raise ValueError("an empty name in a node list")
        yield item.strip()
        return
    rest = list(_expand_one(item[match.end() :])) if item[match.end() :] else [""]
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"not a range of numbers in a node list: {piece!r}")
        for number in range(int(first), int(last or first) + 1):
            yield from (f"{item[: match.start()]}{number:0{len(first)}d}{tail}" for tail in rest)
