"""SLURM's short form of node lists. Expanded here, since `scontrol show hostnames` may be missing in a container."""

from __future__ import annotations

import re
from itertools import product

_COMMA = re.compile(r",(?![^\[]*\])")  # outside brackets
_RANGES = re.compile(r"\[([^\]]*)\]")


def expand(text: str) -> list[str]:
    """The nodes of a list such as ``n[1-3,07-10],login,r[1-2]n[1-4]``, in SLURM's order.

    Raises ValueError for what is not a node list.
    """
    nodes: list[str] = []
    for item in _COMMA.split(text) if text else ():
        plain, ranges = (parts := _RANGES.split(item.strip()))[::2], parts[1::2]
        if parts == [""] or set("[]") & set("".join(plain)):
            raise ValueError(f"not a node list: {text!r}")
        numbers = [[number for piece in pieces.split(",") for number in _numbers(piece)] for pieces in ranges]
        nodes += [
            "".join(word + number for word, number in zip(plain, [*chosen, ""], strict=True))
            for chosen in product(*numbers)
        ]
    return nodes


def _numbers(piece: str) -> list[str]:
    first, dash, last = piece.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise ValueError(f"not a range of numbers in a node list: {piece!r}")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
