"""Small collectives on CPU tensors, on gloo groups of their own, so that they never wait for the GPU's stream."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from trainer.config.schema import ResilienceConfig

TIMEOUT_SECONDS = 1800.0
_LATER_SECONDS = 300.0
_LIMB = 21  # bits: sums of 21-bit integers over 2**32 ranks stay exact in a float64


def timeout_seconds(resilience: ResilienceConfig) -> float:
    """How long a collective may take: the supervisor ends a wait in a slow phase before, and knows for whom."""
    return max(TIMEOUT_SECONDS, resilience.slow_phase_timeout_seconds + _LATER_SECONDS)


def new_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """A gloo group over all ranks; None (the default group) does not mix with it."""
    group: dist.ProcessGroup | None = dist.new_group(
        backend="gloo", timeout=datetime.timedelta(seconds=timeout_seconds)
    )
    return group


def make_gather(group: dist.ProcessGroup | None) -> Callable[[np.ndarray], list[np.ndarray]]:
    """All-gather of int64 arrays whose length differs between ranks (trailing dimensions are equal)."""
    world_size = dist.get_world_size(group)

    def gather(array: np.ndarray) -> list[np.ndarray]:
        if world_size == 1:
            return [array]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
        dist.all_gather(lengths, torch.tensor([len(array)], dtype=torch.int64), group=group)
        longest = max(int(length) for length in lengths)
        padded = np.zeros((longest, *array.shape[1:]), dtype=np.int64)
        padded[: len(array)] = array
        parts = [torch.zeros(padded.shape, dtype=torch.int64) for _ in range(world_size)]
        dist.all_gather(parts, torch.from_numpy(padded), group=group)
        return [part.numpy()[: int(length)] for part, length in zip(parts, lengths, strict=True)]

    return gather


def sum_step(
    group: dist.ProcessGroup | None, loss_sum: float, digest: int, padded_tokens: int, request: int = 0
) -> tuple[float, int, int, int]:
    """One all-reduce a step: (loss sum, digest mod 2**63, padded tokens, request). One rank alone may request."""
    mask = (1 << _LIMB) - 1
    limbs = [(digest >> (_LIMB * i)) & mask for i in range(3)]
    values = torch.tensor([loss_sum, float(padded_tokens), float(request), *map(float, limbs)], dtype=torch.float64)
    dist.all_reduce(values, group=group)
    total = sum(int(values[3 + i]) << (_LIMB * i) for i in range(3)) % (1 << 63)
    return float(values[0]), total, int(values[1]), int(values[2])


def largest(group: dist.ProcessGroup | None, value: int) -> int:
    """The largest of the ranks' values."""
    values = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return int(values.item())


def any_rank(group: dist.ProcessGroup | None, flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(largest(group, int(flag)))
