"""An exponential moving average of the weights (Polyak & Juditsky 1992): fp32 slices beside the masters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

_CHUNK = 1 << 24  # elements


class Average:
    """average = decay * average + (1 - decay) * weights after each update; it begins as the first weights.

    Args:
        flats: this rank's masters, fp32.
        decay: between 0 and 1.
        copy: of a tensor, to where averages are kept.
    """

    def __init__(
        self,
        flats: Sequence[torch.Tensor],
        decay: float,
        copy: Callable[..., torch.Tensor] = torch.clone,
    ) -> None:
        self._flats, self._decay = [flat.detach() for flat in flats], decay
        self._averages = [copy(flat) for flat in self._flats]

    def __getitem__(self, group: int) -> torch.Tensor:
        """The average of a flat tensor."""
        return self._averages[group]

    def update(self) -> None:
        """After an update of the weights."""
        for average, flat in zip(self._averages, self._flats, strict=True):
            average.lerp_(flat, 1 - self._decay)

    def swap(self) -> None:
        """Exchange the weights and their average, in place."""
        for average, flat in zip(self._averages, self._flats, strict=True):
            for mine, other in zip(torch.split(average, _CHUNK), torch.split(flat, _CHUNK), strict=True):
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)


def weights_kind(state: Mapping[str, object]) -> str:
    """What evaluations and exports of a checkpoint use: its kind of slices, by its state.json."""
    return "ema" if state.get("averaged") else "master"
