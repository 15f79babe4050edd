"""Checkpoints: whole or absent, no pickle, loadable at any world size.

    checkpoints/step-00000200/
        rank-00000-of-00002.safetensors   a rank's slices
        state.json                        step, data state, optimizer steps, parameters
        manifest.json                     files, sizes, checksums; written last by atomic rename: the publication

A rank's slices are `master/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` (fp32) of trained parameters and `frozen/NAME`
of the others. Each is 1-D; its place in the flattened parameter is in the file's metadata, in the form that
`torch.distributed.checkpoint.HuggingFaceStorageReader` reads. A rank stages its slices by one copy into reused
buffers; a thread then writes them while training goes on, without collectives: ranks report through files.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.engine import Engine, Shard
from trainer.failures import StorageError
from trainer.rundir import RunDirectory, write_json

FORMAT = 1
_PREFIX = "step-"
_REPORT_TIMEOUT_SECONDS = 3600.0


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def remove_unpublished(checkpoints: Path) -> list[str]:
    """Remove what a killed save or removal has left; names of the folders removed."""
    removed = []
    if checkpoints.is_dir():
        for folder in sorted(checkpoints.iterdir()):
            suffix = folder.name.removeprefix(_PREFIX)
            unpublished = suffix.isdigit() and not (folder / "manifest.json").is_file()
            if folder.name.startswith(_PREFIX) and (unpublished or suffix.endswith(".deleting")):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
    return removed


def checksum(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def damage(folder: Path, share: Callable[[int], bool] = lambda _: True) -> str | None:
    """What is wrong with a published checkpoint, or None. ``share`` picks the files to check, by their index."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if share(index) and checksum(path) != entry["xxh3_128"]:
                return f"{path} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: {type(error).__name__}: {error}"
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


class Saver:
    """Writes checkpoints in the background; one at a time.

    Args:
        run: the run directory.
        engine: whose slices are saved.
        keep_last: published checkpoints to keep.
        on_published: called on rank 0, in the writing thread, with (step, seconds, bytes of all ranks).
    """

    def __init__(
        self, run: RunDirectory, engine: Engine, keep_last: int, on_published: Callable[[int, float, int], None]
    ) -> None:
        self._run = run
        self._checkpoints = run.checkpoints_dir
        self._engine = engine
        self._keep_last = keep_last
        self._on_published = on_published
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self.error: str | None = None  # of the latest save

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Stage this rank's slices and write them in the background; returns the seconds training stood still."""
        start = time.monotonic()
        self.wait()
        tensors, offsets = self._stage()
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.stage,
            "optimizer_steps": self._engine.optimizer_steps(),
            "parameters": self._engine.parameters(),
            **state,
        }
        self.error = None
        self._thread = threading.Thread(target=self._write, args=(step, tensors, offsets, state), name="checkpoint")
        self._thread.start()
        return time.monotonic() - start

    def wait(self) -> None:
        """Wait until the save under way, if any, is published or has failed (see ``error``)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _stage(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, int] = {}
        for shard in self._engine.shards():
            if shard.length == 0:
                continue
            for kind, source in shard.tensors.items():
                key = f"{kind}/{shard.name}"
                buffer = self._buffers.get(key)
                if buffer is None:
                    pinned = source.device.type == "cuda"
                    buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pinned)
                    self._buffers[key] = buffer
                buffer.copy_(source, non_blocking=True)
                tensors[key] = buffer
                offsets[key] = shard.offset
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return tensors, offsets

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], offsets: dict[str, int], state: dict[str, Any]
    ) -> None:
        start = time.monotonic()
        folder = self._checkpoints / folder_name(step)
        rank, world_size = self._engine.rank, self._engine.world_size
        report = folder / f"report-{rank:05d}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = _rank_file(rank, world_size)
            sharding = {key: {"saved_offsets": [offset]} for key, offset in offsets.items()}
            partial = folder / f"{name}.partial"
            save_file(tensors, partial, metadata={"DCP_SHARDING_INFO": json.dumps(sharding), "DCP_VERSION": "1.0"})
            _fsync(partial)
            partial.replace(folder / name)
            entry = {"bytes": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name)}
            write_json(report, {"files": {name: entry}})
            if rank == 0:
                files = self._collect(folder, world_size)
                write_json(folder / "state.json", state)
                state_file = folder / "state.json"
                files["state.json"] = {"bytes": state_file.stat().st_size, "xxh3_128": checksum(state_file)}
                manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
                _fsync(folder)
                write_json(folder / "manifest.json", manifest)
                _fsync(self._checkpoints)
                for leftover in folder.glob("report-*.json"):
                    leftover.unlink(missing_ok=True)
                self._on_published(step, time.monotonic() - start, sum(entry["bytes"] for entry in files.values()))
                self._retain()
        except Exception as error:  # reported by the training loop; the run and older checkpoints are unharmed
            self.error = f"checkpoint of step {step} not written: {type(error).__name__}: {error}"
            with suppress(OSError):  # without a report rank 0 gives up on this checkpoint after its time limit
                write_json(report, {"error": self.error})

    def _collect(self, folder: Path, world_size: int) -> dict[str, Any]:
        """Wait for every rank's report; the files they have written."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + _REPORT_TIMEOUT_SECONDS
        for rank in range(world_size):
            path = folder / f"report-{rank:05d}.json"
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise StorageError(f"rank {rank} has not written its part within {_REPORT_TIMEOUT_SECONDS:.0f} s")
                time.sleep(0.01)
            report = json.loads(path.read_text())
            if "error" in report:
                raise StorageError(f"rank {rank}: {report['error']}")
            files.update(report["files"])
        return files

    def _retain(self) -> None:
        for step in self._run.published_checkpoints()[: -self._keep_last]:
            folder = self._checkpoints / folder_name(step)
            doomed = folder.with_name(folder.name + ".deleting")
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            except OSError:
                pass  # tried again after the next save


class Slices:
    """The slices of a checkpoint's rank files, opened when they are needed."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._folder = folder
        self._world_size = int(state["world_size"])
        self._even = int(state["zero_stage"]) == 3
        self._files: dict[int, tuple[Any, dict[str, int]]] = {}

    def _open(self, rank: int) -> tuple[Any, dict[str, int]]:
        if rank not in self._files:
            file: Any = safe_open(self._folder / _rank_file(rank, self._world_size), framework="pt")
            sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            offsets = {key: int(entry["saved_offsets"][0]) for key, entry in sharding.items()}
            self._files[rank] = (file, offsets)
        return self._files[rank]

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a key's slices."""
        for rank in range(self._world_size):
            file, offsets = self._open(rank)
            if key in offsets:
                dtype: torch.dtype = file.get_slice(key)[:0].dtype
                return dtype
        raise StorageError(f"{self._folder}: {key} is not there")

    def _candidates(self, numel: int, begin: int, end: int) -> Iterator[int]:
        if self._even:  # ZeRO-3: pieces of ceil(numel / W)
            piece = -(-numel // self._world_size)
            yield from range(begin // piece, min((end - 1) // piece + 1, self._world_size))
        else:
            yield from range(self._world_size)

    def read_into(self, key: str, shard: Shard, target: torch.Tensor) -> None:
        begin, end = shard.offset, shard.offset + shard.length
        missing = shard.length
        for rank in self._candidates(shard.numel, begin, end):
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
    slices = Slices(folder, state)
    saved = {name: (tuple(shape), trained) for name, shape, trained in state["parameters"]}
    current = {name: (shape, trained) for name, shape, trained in engine.parameters()}
    if saved != current:
        differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        raise StorageError(
            f"{folder} holds another model: {differing[0]!r} (and {len(differing) - 1} more) has "
            f"(shape, trained) {saved.get(differing[0])} there and {current.get(differing[0])} here"
        )
    with torch.no_grad():
        for shard in engine.shards():
            for kind, target in shard.tensors.items():
                if shard.length:
                    slices.read_into(f"{kind}/{shard.name}", shard, target)
        engine.finish_loading(int(state["optimizer_steps"]))
    return state


def abandon(folder: Path) -> Path:
    """Set a checkpoint aside under a name that is never taken for one; nothing is deleted."""
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.abandoned-{number}")
        if not target.exists():
            return folder.rename(target)
    raise StorageError(f"too many abandoned checkpoints beside {folder}: remove some")
