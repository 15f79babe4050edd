"""Best-fit-decreasing bin packing of samples into sequences (Johnson 1973), the longest first."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put items into bins of a capacity; each bin lists the items' numbers, in rising order.

    Args:
        lengths: int64 [items], each in [1, capacity].
        capacity: of a bin.

    The result depends on ``lengths`` and ``capacity`` alone: equal lengths keep their order, and of bins
    that fit equally well the oldest is taken.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, bin), sorted; full bins are dropped
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([item])
            left, number = capacity - length, len(bins) - 1
        else:
            left, number = room.pop(place)
            left -= length
            bins[number].append(item)
        if left > 0:
            insort(room, (left, number))
    return [sorted(members) for members in bins]
