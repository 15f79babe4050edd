"""Frozen weights that a checkpoint need not hold: they are, bit for bit, in the files that the model came from.

A checkpoint then says which (``origin`` in its state.json): the files with their checksums, and for every such
parameter the file and the name there. What is not found in the files unchanged is stored as ever. Weights in 4 bits
are packed from the files at each start, always with the same result, of which the checkpoint has the checksum.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from trainer.adapters import plain_name
from trainer.checkpoint_files import checksum
from trainer.failures import StorageError, UserError
from trainer.four_bit import Linear4bit, pack, packed_layers, unpack
from trainer.planning.model_facts import model_folder
from trainer.rundir import RunDirectory, read_json, write_json

if TYPE_CHECKING:
    from trainer.engine import Engine
    from trainer.parameters import Shard

_CHUNK = 1 << 23  # elements compared at once
_CACHE = "origin.json"  # in the run directory: path -> size, mtime in ns, checksum


@dataclass(frozen=True)
class Origin:
    """Where frozen weights come from.

    Attributes:
        folder: of the files.
        files: name -> checksum of each file that a parameter lies in.
        keys: parameter -> (file, name in it).
        dtype: in which the run holds the weights; files may have another.
        packed: parameter -> (shape in the files, checksum once packed) of those that the run holds in 4 bits.
    """

    folder: Path
    files: dict[str, str]
    keys: dict[str, tuple[str, str]]
    dtype: torch.dtype
    packed: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        found = {"folder": str(self.folder), "files": self.files, "parameters": self.keys, "dtype": dtype}
        return {**found, "packed": self.packed} if self.packed else found

    def holds(self, other: Origin) -> bool:
        """Whether everything of ``other`` is here as well, the same bits; the folder may be another."""
        return (
            self.dtype == other.dtype
            and other.files.items() <= self.files.items()
            and all(self.keys.get(name) == key for name, key in other.keys.items())
            and self.packed == other.packed
        )

    def verify(self, run_path: Path) -> None:
        """Raise StorageError unless the files are those that the checkpoint means."""
        for name, expected in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise StorageError(f"{path} is missing, {_ADVICE}")
            if _checksum(path, _cached(run_path)) != expected:
                raise StorageError(f"{path} has changed, {_ADVICE}")

    def read(self, name: str, begin: int, length: int) -> torch.Tensor:
        """Elements of a flattened parameter, in the run's dtype; of one in 4 bits, those of what it stands for."""
        file, key = self.keys[name]
        if name in self.packed:
            return _repacked(self.folder / file, key, self.dtype).view(-1)[begin : begin + length]
        with safe_open(self.folder / file, framework="pt") as opened:
            return elements(opened, key, begin, length).to(self.dtype)


_ADVICE = "and checkpoints of this run take their frozen weights from it: put back the model's files as they were"


def origin_of(state: dict[str, Any]) -> Origin | None:
    """The origin that a checkpoint's state.json names."""
    found = state.get("origin")
    if not found:
        return None
    keys = {name: (file, key) for name, (file, key) in found["parameters"].items()}
    packed = {name: (tuple(shape), digest) for name, (shape, digest) in found.get("packed", {}).items()}
    return Origin(Path(found["folder"]), found["files"], keys, getattr(torch, found["dtype"]), packed)


@functools.lru_cache(maxsize=1)
def _repacked(path: Path, key: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix of a file as it is once packed in 4 bits and unpacked."""
    with safe_open(path, framework="pt") as opened:
        return unpack(*pack(opened.get_tensor(key).to(dtype)))


def find_origin(
    model_path: str | None, engine: Engine, run: RunDirectory, gather: Callable[[np.ndarray], list[np.ndarray]]
) -> Origin | None:
    """The frozen weights that are in the model's safetensors files as they are here; every rank compares its slices,
    and packs its share of those in 4 bits anew.

    A collective. The files' checksums are computed once a run, each by one rank.

    Args:
        model_path: `model.path`; None where weights are random.
        gather: see `collectives.make_gather`.

    Raises:
        UserError: a weight in 4 bits is not in the files.
    """
    frozen = [(name, shape) for name, shape, trained in engine.parameters() if not trained]
    if model_path is None or not frozen:
        return None
    packed = packed_layers(engine.model)
    whole = [(name, packed[name].shape if name in packed else shape) for name, shape in frozen]
    folder, places = _places(model_path, getattr(engine.model, "base_model_prefix", ""), whole)
    equal = _compare(folder, places, engine, packed)
    dtypes = {name: parameter.dtype for name, parameter in engine.model.named_parameters()}
    dtype = dtypes[frozen[0][0]]
    equal = {name: same and dtypes[name] == dtype for name, same in equal.items()}
    alike = np.min(gather(np.array([equal.get(name, False) for name, _ in frozen], dtype=np.int64)), axis=0)
    keys = {name: places[name] for (name, _), same in zip(frozen, alike, strict=True) if same}
    if missing := sorted(packed.keys() - keys.keys()):
        raise UserError(
            f"model.path: {plain_name(missing[0])} is not in its safetensors files as the model has it: qlora packs "
            "weights that are there one by one; use lora"
        )
    if not keys:
        return None
    names = sorted({file for file, _ in keys.values()})
    cache = _cached(run.path)
    own = [_checksum(folder / name, cache) for name in names[engine.rank :: engine.world_size]]
    shares = gather(np.frombuffer(bytes.fromhex("".join(own)), dtype=np.int64).copy().reshape(-1, 2))
    files = {}
    for rank, share in enumerate(shares):
        for name, digest in zip(names[rank :: engine.world_size], share, strict=True):
            files[name] = digest.tobytes().hex()
    if engine.rank == 0:
        with suppress(OSError):
            entries = {str(folder / name): [*_stamp(folder / name), digest] for name, digest in files.items()}
            write_json(run.path / _CACHE, entries)
    return Origin(folder, files, keys, dtype, {name: (layer.shape, layer.digest) for name, layer in packed.items()})


def _places(
    model_path: str, prefix: str, frozen: list[tuple[str, tuple[int, ...]]]
) -> tuple[Path, dict[str, tuple[str, str]]]:
    """(folder, parameter -> (file, name there)) by name and shape, with the base model's prefix or without."""
    folder = model_folder(model_path) or Path(model_path)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    with suppress(OSError, ValueError, RuntimeError):  # what cannot be read is not pinned
        for path in sorted(folder.glob("*.safetensors"), key=lambda p: (not p.name.startswith("model"), p.name)):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # no mapping
                    found.setdefault(key, (path.name, tuple(file.get_slice(key).get_shape())))
    places = {}
    for name, shape in frozen:
        plain = plain_name(name)
        for key in (plain, plain.removeprefix(f"{prefix}."), f"{prefix}.{plain}"):
            if key in found and found[key][1] == shape:
                places[name] = (found[key][0], key)
                break
    return folder, places


def _compare(
    folder: Path, places: dict[str, tuple[str, str]], engine: Engine, packed: dict[str, Linear4bit]
) -> dict[str, bool]:
    """Parameter -> whether this rank's slice is in the files, bit for bit; of those in 4 bits, every W-th by a rank."""
    equal = {name: name in places for name in packed}
    looked_at = set(list(packed)[engine.rank :: engine.world_size])
    opened: dict[str, Any] = {}
    for shard in engine.shards():
        if shard.name not in places or (shard.name in packed and shard.name not in looked_at):
            continue
        file, key = places[shard.name]
        try:
            if file not in opened:
                opened[file] = safe_open(folder / file, framework="pt")
            if shard.name in packed:
                equal[shard.name] = packed[shard.name].stands_for(opened[file].get_tensor(key))
            else:
                equal[shard.name] = _equal(opened[file], key, shard)
        except (OSError, ValueError, RuntimeError):  # this rank's node has other files
            equal[shard.name] = False
    return equal


def _equal(file: Any, key: str, shard: Shard) -> bool:
    held = shard.tensors["frozen"]
    for begin in range(0, shard.length, _CHUNK):
        here = held[begin : begin + _CHUNK].cpu()
        there = elements(file, key, shard.offset + begin, here.numel()).to(here.dtype)
        if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
            return False
    return True


def elements(file: Any, key: str, begin: int, length: int) -> torch.Tensor:
    """Elements [begin, begin + length) of a flattened tensor of a file. It is mapped: no others are read."""
    whole: torch.Tensor = file.get_tensor(key).view(-1)
    return whole[begin : begin + length]


def _stamp(path: Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns


def _cached(run_path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(read_json(run_path / _CACHE) or {})
    return {}


def _checksum(path: Path, cache: dict[str, Any]) -> str:
    """A file's checksum; the one noted for it while its size and time stay."""
    size, time_ns, digest = cache.get(str(path), (None, None, ""))
    return str(digest) if (size, time_ns) == _stamp(path) else checksum(path)
