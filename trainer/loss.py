"""Cross-entropy only where there is a label.

The language-model head is most of a small model's work and its logits most of its memory, while two fifths of the
tokens of instruction data carry no label. A hook in front of the head keeps only the positions that predict one, so
that any architecture's own forward pass (scaling, soft-capping) runs as it is, on [targets, vocabulary] logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.engine import chunked_cross_entropy

IGNORED = -100  # label of a position that is not learned


class LabelledPositions:
    """Restricts the output embedding of a model to chosen positions while the context is open."""

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        self._model = model
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden = args[0]  # [rows, length, hidden size]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions),)

    @contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """Inside, logits are [len(positions), vocabulary]; ``positions`` int64, into the flattened rows."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in fp32, without ever holding all logits in fp32.

    Args:
        logits: [targets, vocabulary], any float dtype.
        labels: int64 [targets]; those that are IGNORED do not count.

    With no targets the result is 0 and still reaches every parameter, so that ranks without work
    take part in the same collectives.
    """
    return chunked_cross_entropy(logits, labels, IGNORED)
