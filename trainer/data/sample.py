"""What a record becomes: token sequences with what is learned from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Origin = tuple[int, int, int]  # source, record in it, piece of it


@dataclass(frozen=True)
class Sample:
    """One record (or a piece of one) as a model sees it.

    Attributes:
        tokens: int32 [length].
        targets: bool [length]; what is learned, and counted: for language models the tokens to be predicted from those
            before them (``targets[0]`` is then always False), else the positions that carry a label; a sample with one
            label as a whole has it at position 0.
        labels: what is to be predicted, as the task lays it out; None: the tokens at ``targets``.
        inputs: further inputs of the model, without padding.
        reference: what the task needs to score a prediction.
        truncated: whether the task has cut the record to fit.
        origin: which record it comes from, where predictions are asked for.
        rows: lengths of the rows that ``tokens`` and ``inputs`` are joined from, where the model reads several for one
            sample, as choices; None: there is one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    labels: np.ndarray | None = None
    inputs: Mapping[str, np.ndarray] | None = None
    reference: Any = None
    truncated: bool = False
    origin: Origin | None = None
    rows: tuple[int, ...] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return len(self.tokens) if self.rows is None else max(self.rows)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """The rows of ``tokens`` or of one of ``inputs``."""
        return [values] if self.rows is None else np.split(values, np.cumsum(self.rows[:-1]))


@dataclass(frozen=True)
class PackedSequence:
    """Samples that share one sequence; none attends to another. Together at most `sequence_length` tokens."""

    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def target_tokens(self) -> int:
        return sum(int(sample.targets.sum()) for sample in self.samples)
