"""How sources of training data are mixed: how often each is taken, its share, and where that ends. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.schema import DataSource


def source_epochs(source: DataSource, epochs: float | None) -> float | None:
    """How often a source is taken in a training of ``epochs`` (None: one of so many steps); None: for ever."""
    if source.epochs == "repeat":
        return None
    return epochs if source.epochs is None else source.epochs


def source_weights(
    sources: Sequence[DataSource], records: Sequence[int], epochs: Sequence[float | None]
) -> list[float]:
    """Relative shares of the sequences: those of the config; without any, such that sources end together."""
    if any(source.weight for source in sources):
        return [source.weight or 1.0 for source in sources]
    return [count * (1.0 if times is None else times) for count, times in zip(records, epochs, strict=True)]


@dataclass(frozen=True)
class Mixture:
    """What becomes of sources in a training, about.

    Attributes:
        sequences: drawn in all.
        taken: of each source, in epochs.
    """

    sequences: float
    taken: tuple[float, ...]


def expected_mixture(
    sizes: Sequence[float], epochs: Sequence[float | None], weights: Sequence[float], limit: float
) -> Mixture:
    """Draw by weight until ``limit`` sequences, or, without one, until every source that ends has ended.

    Args:
        sizes: sequences in an epoch of each source.
        epochs: see `source_epochs`.
        weights: see `source_weights`.
        limit: sequences; inf: a training of so many epochs.
    """
    left = [float("inf") if times is None else size * times for size, times in zip(sizes, epochs, strict=True)]
    drawn = [0.0] * len(sizes)
    total = 0.0
    while total < limit:
        is_open = [i for i in range(len(sizes)) if left[i] > 0]
        if not is_open or (limit == float("inf") and all(epochs[i] is None for i in is_open)):
            break
        share = sum(weights[i] for i in is_open)
        until_one_ends = min(left[i] / weights[i] for i in is_open)
        turns = min(until_one_ends, (limit - total) / share)
        for i in is_open:
            drawn[i] += turns * weights[i]
            left[i] = 0.0 if left[i] / weights[i] == until_one_ends <= turns else left[i] - turns * weights[i]
        total += turns * share
    return Mixture(total, tuple(d / size if size else 0.0 for d, size in zip(drawn, sizes, strict=True)))
