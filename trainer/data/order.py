"""One global order of documents: a pure function of (seed, epoch, source), never of ranks, workers or restarts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_WINDOWS, _DOCUMENTS, _SEQUENCES = range(3)  # what is shuffled; part of each stream's seed


def _permutation(size: int, seed: Sequence[int]) -> np.ndarray:
    """A permutation of range(size), int64. Raw bits and a stable sort: NumPy keeps those equal across its versions."""
    bits = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int64)


def window_order(windows: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """The order of a source's windows in an epoch, int64 [windows]."""
    return _permutation(windows, (seed, source, epoch, _WINDOWS))


def document_order(documents: int, seed: int, source: int, epoch: int, window: int) -> np.ndarray:
    """The order of the documents in a window, int64 [documents]."""
    return _permutation(documents, (seed, source, epoch, _DOCUMENTS, window))


def sequence_order(sequences: int, seed: int, source: int, epoch: int, window: int) -> np.ndarray:
    """The order of a window's packed sequences: packing makes the longest first."""
    return _permutation(sequences, (seed, source, epoch, _SEQUENCES, window))


def strides(weights: Sequence[float]) -> list[int]:
    """Whole numbers that are to each other as 1 / weight, exactly."""
    turns = [1 / Fraction(weight) for weight in weights]
    common = math.lcm(*(turn.denominator for turn in turns))
    return [int(turn * common) for turn in turns]


def next_source(drawn: Sequence[int], every: Sequence[int], open_sources: Sequence[bool]) -> int | None:
    """The source of the next sequence: the one furthest behind its share; None when all are exhausted.

    Weighted round robin in exact arithmetic: deterministic, and exact in the long run. ``every``: `strides`.
    """
    candidates = [index for index, is_open in enumerate(open_sources) if is_open]
    return min(candidates, key=lambda index: ((drawn[index] + 1) * every[index], index), default=None)
