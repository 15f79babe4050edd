"""What a record becomes: token sequences with the positions that are learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Tokens of one record (or of a piece of one).

    Attributes:
        tokens: int32 [length].
        targets: bool [length]; True where this token is to be predicted from those before it. ``targets[0]`` is always
            False.
    """

    tokens: np.ndarray
    targets: np.ndarray


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
