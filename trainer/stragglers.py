"""A fixed piece of work that every rank times now and then, between steps: which device is slower than the others.

In a step ZeRO-3 makes the ranks wait for each other in every layer, so that all steps of all ranks take as long as
those of the slowest. Only work without a collective in it tells them apart. Rank 0 asks for the probe, so that all
ranks make it after the same step and training waits once for it: about 10 ms a minute.
"""

from __future__ import annotations

import statistics
import time

import torch

from trainer import heartbeat

_INTERVAL_SECONDS = 60.0
_PARTS = 5  # their median counts: one may be interrupted
_SIZE = {"cuda": 2048, "cpu": 256}
_REPEATS = {"cuda": 30, "cpu": 4}


class Probe:
    """Times matrix products on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next = time.monotonic() + _INTERVAL_SECONDS

    def due(self) -> bool:
        """Whether it is time for the next one; asked on rank 0."""
        return time.monotonic() >= self._next

    def run(self) -> None:
        """Time the work and publish its seconds with the heartbeat; nothing where the memory is full."""
        self._next = time.monotonic() + _INTERVAL_SECONDS
        kind = self._device.type
        dtype = torch.bfloat16 if kind == "cuda" else torch.float32
        try:
            matrix = torch.full((_SIZE[kind], _SIZE[kind]), 0.5, dtype=dtype, device=self._device)
            result = torch.empty_like(matrix)
            seconds = [self._part(matrix, result, _REPEATS[kind]) for _ in range(_PARTS + 1)]
        except torch.OutOfMemoryError:
            return
        heartbeat.note_probe(statistics.median(seconds[1:]))  # the first loads kernels

    def _part(self, matrix: torch.Tensor, result: torch.Tensor, repeats: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(matrix, matrix, out=result)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
