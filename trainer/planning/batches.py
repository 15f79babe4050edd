"""How a global batch is cut into micro-batches over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.failures import UserError

_TOLERATED = 0.02  # share of the time


@dataclass(frozen=True)
class BatchPlan:
    """The arithmetic of one optimizer step, in sequences.

    Attributes:
        global_batch: sequences in a global batch, G.
        micro_batch_size: sequences in a micro-batch, m.
        micro_batches_per_rank: forward passes of every rank in a step, A = ceil(G / (W * m)).
        idle_micro_batches: micro-batches of the W * A that hold no sequence; they run with zero weight, because
            ranks must make the same number of forward passes.
        wasted_share: share of the step's time in which ranks compute nothing useful:
            1 - G / (W * the sequences of the busiest rank).
        suggestions: settings close to these that waste less.
        reason: why this micro-batch size.
    """

    global_batch: int
    micro_batch_size: int
    micro_batches_per_rank: int
    idle_micro_batches: int
    wasted_share: float
    suggestions: tuple[str, ...] = ()
    reason: str = "as configured"


def cut(global_batch: int, world_size: int, micro_batch_size: int) -> tuple[int, int, float]:
    """(micro-batches per rank, idle micro-batches in all, wasted share)."""
    per_rank = math.ceil(global_batch / (world_size * micro_batch_size))
    idle = world_size * per_rank - math.ceil(global_batch / micro_batch_size)
    busiest = min(per_rank * micro_batch_size, global_batch)
    return per_rank, idle, 1 - global_batch / (world_size * busiest)


def plan_batches(global_batch: int, world_size: int, micro_batch_size: int, reason: str = "as configured") -> BatchPlan:
    """The batch arithmetic of a micro-batch size.

    Raises:
        UserError: there are more ranks than sequences in a global batch.
    """
    if world_size > global_batch:
        raise UserError(
            f"training.global_batch_size is {global_batch}, but there are {world_size} ranks, and each needs "
            f"at least one sequence: raise it to {world_size} or a multiple, or use at most {global_batch} ranks"
        )
    per_rank, idle, waste = cut(global_batch, world_size, micro_batch_size)
    return BatchPlan(
        global_batch,
        micro_batch_size,
        per_rank,
        idle,
        waste,
        _suggestions(global_batch, world_size, micro_batch_size, waste),
        reason,
    )


def choose_micro_batch(global_batch: int, world_size: int, largest: int, equal: bool = False) -> int:
    """The largest micro-batch of at most ``largest`` sequences among those that waste least, within 2 %.

    With ``equal`` among those that cut a global batch into equal parts, if there are any: compiled layers want shapes
    to stay the same.
    """
    candidates = list(range(1, min(largest, math.ceil(global_batch / world_size)) + 1))
    if equal:
        candidates = [size for size in candidates if global_batch % (world_size * size) == 0] or candidates
    waste = {size: cut(global_batch, world_size, size)[2] for size in candidates}
    least = min(waste.values())
    return max(size for size in candidates if waste[size] <= least + _TOLERATED)


def _suggestions(global_batch: int, world_size: int, micro_batch_size: int, waste: float) -> tuple[str, ...]:
    """The nearest global batches below and above without waste, and the nearest micro-batch that wastes less."""
    if waste < 1e-9:
        return ()
    unit = world_size * micro_batch_size
    values = [value for value in (global_batch // unit * unit, math.ceil(global_batch / unit) * unit) if value > 0]
    result = [f"training.global_batch_size={value}" for value in dict.fromkeys(values)]
    smaller = [size for size in range(micro_batch_size - 1, 0, -1) if cut(global_batch, world_size, size)[2] < waste]
    return (*result, *(f"training.micro_batch_size={size}" for size in smaller[:1]))
