"""Reading checkpoints back: slices of any world size, into an engine of any other. Layout: see `trainer.checkpoint`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.checkpoint_files import rank_file
from trainer.engine import Engine
from trainer.failures import StorageError
from trainer.origin import origin_of
from trainer.parameters import Shard


class Slices:
    """The slices of a checkpoint's rank files, opened when they are needed; of those of ``rank`` alone, if given."""

    def __init__(self, folder: Path, state: dict[str, Any], rank: int | None = None) -> None:
        self._rank = rank
        self._folder = folder
        self._world_size = int(state["world_size"])
        self._even = int(state["zero_stage"]) == 3
        self._files: dict[int, tuple[Any, dict[str, int]]] = {}
        self.origin = origin_of(state)

    def _open(self, rank: int) -> tuple[Any, dict[str, int]]:
        if rank not in self._files:
            file: Any = safe_open(self._folder / rank_file(rank, self._world_size), framework="pt")
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            offsets = {key: int(entry["saved_offsets"][0]) for key, entry in sharding.items()}
            self._files[rank] = (file, offsets)
        return self._files[rank]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a key's slices."""
        if self.origin and key.removeprefix("frozen/") in self.origin.keys:
            return self.origin.dtype
        for rank in range(self._world_size):
            file, offsets = self._open(rank)
            if key in offsets:
                dtype: torch.dtype = file.get_slice(key)[:0].dtype
                return dtype
        raise StorageError(f"{self._folder}: {key} is not there")

    def _candidates(self, numel: int, begin: int, end: int) -> Iterator[int]:
        if self._rank is not None:
            yield self._rank
        elif self._even:  # ZeRO-3: pieces of ceil(numel / W)
            piece = -(-numel // self._world_size)
            yield from range(begin // piece, min((end - 1) // piece + 1, self._world_size))
        else:
            yield from range(self._world_size)

    def read_into(self, key: str, shard: Shard, target: torch.Tensor) -> None:
        begin, end = shard.offset, shard.offset + shard.length
        if self.origin and key == f"frozen/{shard.name}" and shard.name in self.origin.keys:
            target.copy_(self.origin.read(shard.name, begin, shard.length))
            return
        missing = shard.length
        for rank in self._candidates(shard.numel, begin, end):
            if not missing:  # ranks with a fast tier have all buffers
                break
            file, offsets = self._open(rank)
            if key not in offsets:
                continue
            piece = file.get_slice(key)
            start = offsets[key]
            low, high = max(begin, start), min(end, start + piece.get_shape()[0])
            if low < high:
                target[low - begin : high - begin].copy_(piece[low - start : high - start])
                missing -= high - low
        if missing:
            raise StorageError(f"{self._folder}: {missing} of {shard.length} elements of {key} are not there")


def load(folder: Path, engine: Engine) -> dict[str, Any]:
    """Load a checkpoint of any world size into the engine, in place; returns its state.json.

    Raises:
        StorageError: the checkpoint does not hold this model.
    """
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    load_slices(Slices(folder, state), state, folder, engine)
    return state


def load_slices(slices: Slices, state: dict[str, Any], folder: Path, engine: Engine) -> None:
    """Load what ``slices`` has of this rank's shards and of the buffers. ``folder``: of the checkpoint.

    Raises:
        StorageError: it is of another model, or something is not there.
    """
    saved = {name: (tuple(shape), trained) for name, shape, trained in state["parameters"]}
    current = {name: (shape, trained) for name, shape, trained in engine.parameters()}
    if saved != current:
        differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        raise StorageError(
            f"{folder} holds another model: {differing[0]!r} (and {len(differing) - 1} more) has "
            f"(shape, trained) {saved.get(differing[0])} there and {current.get(differing[0])} here"
        )
    pinned: Collection[str] = ()  # equal to their files already
    if slices.origin and engine.origin and engine.origin.holds(slices.origin):
        pinned = slices.origin.keys
    elif slices.origin:
        slices.origin.verify(folder.parent.parent)
        if slices.origin.packed:
            raise StorageError(
                f"{folder} was trained over other 4-bit weights than these, though from the same files: put back the "
                "model, kind of GPU and version of bitsandbytes that it began with"
            )
    with torch.no_grad():
        for shard in engine.shards(to_load=True):
            for kind, target in shard.tensors.items():
                if shard.length and shard.name not in pinned:
                    slices.read_into(f"{kind}/{shard.name}", shard, target)
        for name, tensor in engine.replicated():
            slices.read_into(name, Shard(name, tensor.numel(), 0, tensor.numel(), {}), tensor.view(-1))
        buffers = dict(engine.buffers())
        for name, shape in state.get("buffers", ()):
            if name in buffers and math.prod(shape):
                whole = torch.empty(math.prod(shape), dtype=buffers[name].dtype)
                slices.read_into(f"buffer/{name}", Shard(name, whole.numel(), 0, whole.numel(), {}), whole)
                buffers[name].copy_(whole.view(shape))
        engine.finish_loading(int(state["optimizer_steps"]), state.get("unfrozen_steps", {}))
