"""Training state without DeepSpeed, cut like ZeRO-3's: what a Saver needs of an engine, for tests of files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import AtPoint, Saver
from trainer.checkpoint_files import Retention
from trainer.origin import Origin
from trainer.parameters import Shard
from trainer.rundir import RunDirectory


@dataclass
class PlainState:
    """``trained`` and ``frozen`` are whole tensors by name; moments are multiples of the weights."""

    rank: int
    world_size: int
    trained: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    stage: int = 3
    origin: Origin | None = None
    keeps_average = False
    memory = None

    def parameters(self) -> list[tuple[str, tuple[int, ...], bool]]:
        trained = [(name, tuple(tensor.shape), True) for name, tensor in self.trained.items()]
        return trained + [(name, tuple(tensor.shape), False) for name, tensor in self.frozen.items()]

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.kept.items())

    def frozen_itemsize(self) -> int:
        return 4

    def trained_itemsize(self) -> int:
        return 12

    def replicated(self) -> list[tuple[str, torch.Tensor]]:
        return []

    def optimizer_steps(self) -> int:
        return 1

    def unfrozen_steps(self) -> dict[str, int]:
        return {}

    def shards(self) -> Iterator[Shard]:
        for name, shape, trained in self.parameters():
            numel = math.prod(shape)
            piece = math.ceil(numel / self.world_size)
            offset = min(self.rank * piece, numel)
            length = min(piece, numel - offset)
            flat = (self.trained if trained else self.frozen)[name].reshape(-1)[offset : offset + length]
            tensors = {"master": flat, "exp_avg": 2 * flat, "exp_avg_sq": 3 * flat} if trained else {"frozen": flat}
            yield Shard(name, numel, offset, length, tensors)


def make_state(step: int, rank: int, world_size: int) -> PlainState:
    """A state whose every element tells the step."""
    trained = {"a": torch.arange(35.0).view(5, 7) + 1000 * step, "b": torch.full((3,), float(step))}
    return PlainState(rank, world_size, trained, {"c": torch.arange(11.0)}, {"n": torch.tensor([step])})


def save_rank(path: Path, state: Any, step: int, at_point: AtPoint = lambda _: None, keep: int = 2) -> str | None:
    """One rank's part of a save, to its end; its error."""
    saver = Saver(RunDirectory(path), state, Retention(keep), lambda *_, **__: None, at_point)
    saver.save(step, {"data": {}, "progress": 0.0, "batches": step, "losses": []})
    saver.wait()
    return saver.error
