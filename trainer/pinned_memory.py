"""Host memory that a GPU copies to by itself, without the waste of torch's allocator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.planning.memory import pinned_bytes

_SMALLEST, _LARGEST = 1 << 20, 1 << 30  # bytes of a chunk; a larger tensor has a larger one
_ALIGNMENT = 64


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class PinnedMemory:
    """Tensors that are kept, cut out of chunks.

    torch rounds the size of each pinned tensor up to a power of two, and so takes up to twice as much of the node's
    memory as was planned: chunks have such sizes, and tensors fill them.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor] = _pinned) -> None:
        self._allocate = allocate
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for [numel] elements."""
        size = numel * dtype.itemsize
        if self._used + size > len(self._chunk):
            # each twice the one before, up to a limit: small models take little
            usual = min(max(2 * len(self._chunk), _SMALLEST), _LARGEST)
            self._chunk, self._used = self._allocate(max(usual, pinned_bytes(size))), 0
        start = self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self._chunk[start : start + size].view(dtype)
