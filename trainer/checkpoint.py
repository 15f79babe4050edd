"""Checkpoints: whole or absent, no pickle, loadable at any world size.

    checkpoints/step-00000200/
        rank-00000-of-00002.safetensors   a rank's slices
        state.json                        step, data state, optimizer steps, parameters
        manifest.json                     files, sizes, checksums; written last by atomic rename: the publication

A rank's slices are `master/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` (fp32) of trained parameters and `frozen/NAME`
of the others, unless those are in the model's own files (`trainer.origin`). Each is 1-D; its place in the flattened
parameter is in the file's metadata, in the form that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads. A
rank stages its slices by one copy into reused buffers; a thread then writes them while training goes on, without
collectives: ranks report through files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.checkpoint_files import (
    Retention,
    checksum,
    folder_name,
    list_checkpoints,
    rank_file,
    remove,
    superfluous,
)
from trainer.engine import Engine, Shard
from trainer.failures import StorageError
from trainer.origin import origin_of
from trainer.rundir import RunDirectory, write_json

FORMAT = 1
_REPORT_TIMEOUT_SECONDS = 3600.0
_CLEAN_UP_SECONDS = 30.0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Called before each act of a save with its name; tests kill, fill the disk or take rights away there.
AtPoint = Callable[[str], None]
POINTS = ("folder", "write", "sync", "rename", "report", "collect", "state", "manifest", "published", "retain")


class Saver:
    """Writes checkpoints in the background; one at a time.

    Args:
        run: the run directory.
        engine: whose slices are saved.
        retention: which checkpoints are kept.
        tell: called in the writing thread with an event and its fields: ``checkpoint`` (step, seconds, bytes of all
            ranks) on rank 0; ``checkpoint_failed`` (step, message) on a rank that could not write.
        at_point: see `AtPoint`.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        retention: Retention,
        tell: Callable[..., Any],
        at_point: AtPoint = lambda _: None,
    ) -> None:
        self._run = run
        self._checkpoints = run.checkpoints_dir
        self._engine = engine
        self._retention = retention
        self._tell = tell
        self.at_point = at_point
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self.step: int | None = None  # of the latest save
        self.error: str | None = None  # of that save
        self.seconds = 0.0  # of the latest save, from its start to its publication

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Stage this rank's slices and write them in the background; returns the seconds training stood still.

        ``state`` goes into state.json; its ``evaluation``, if any, into the manifest as well.
        """
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
            "buffers": [(name, tuple(buffer.shape)) for name, buffer in self._engine.buffers()],
            **({"origin": self._engine.origin.to_json()} if self._engine.origin else {}),
            **state,
        }
        self.step, self.error = step, None
        self._thread = threading.Thread(target=self._write, args=(step, tensors, offsets, state), name="checkpoint")
        self._thread.start()
        return time.monotonic() - start

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the save under way, if any, is published or has failed (see ``error``); False: it still runs."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def bytes_of_all_ranks(self) -> int:
        """Bytes of one checkpoint, without headers: fp32 masters and two moments, and frozen weights if stored."""
        frozen, pinned = self._engine.frozen_itemsize(), self._pinned()
        return sum(
            math.prod(shape) * (12 if trained else frozen)
            for name, shape, trained in self._engine.parameters()
            if name not in pinned
        )

    def missing_space(self) -> str | None:
        """What to tell the user if the disk has no room for one more checkpoint."""
        needed = self.bytes_of_all_ranks() * 101 // 100 + (1 << 20)
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._checkpoints).free
        if needed <= free:
            return None
        return (
            f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {self._checkpoints}: "
            "free some space (`dsft checkpoint gc`), or lower checkpoint.keep_last or keep_best"
        )

    def _pinned(self) -> Collection[str]:
        """Frozen weights that are in the model's files and not in checkpoints."""
        return self._engine.origin.keys if self._engine.origin else ()

    def _stage(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, int] = {}
        pinned = self._pinned()
        for shard in self._engine.shards():
            if shard.length == 0 or shard.name in pinned:
                continue
            for kind, source in shard.tensors.items():
                key = f"{kind}/{shard.name}"
                tensors[key], offsets[key] = self._staged(key, source), shard.offset
        if self._engine.rank == 0:  # equal on all ranks
            for name, buffer in self._engine.buffers():
                if buffer.numel():
                    key = f"buffer/{name}"
                    tensors[key], offsets[key] = self._staged(key, buffer.detach().reshape(-1)), 0
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return tensors, offsets

    def _staged(self, key: str, source: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            pinned = source.device.type == "cuda"
            buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=True)

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], offsets: dict[str, int], state: dict[str, Any]
    ) -> None:
        start = time.monotonic()
        folder = self._checkpoints / folder_name(step)
        rank, world_size = self._engine.rank, self._engine.world_size
        try:
            self._write_own(folder, tensors, offsets)
            if rank == 0:
                size = self._publish(folder, step, state)
                self.seconds = time.monotonic() - start
                self._tell("checkpoint", step=step, seconds=self.seconds, bytes=size)
        except (
            Exception
        ) as error:  # told, and passed on to the training loop; the run and older checkpoints are unharmed
            self.error = f"checkpoint of step {step} not written: {type(error).__name__}: {error}"
            self._clean_up(folder, rank, world_size)
            with suppress(OSError):
                self._tell("checkpoint_failed", step=step, message=self.error)
            return
        if rank == 0:
            with suppress(OSError):  # tried again after the next save
                self.at_point("retain")
                for leftover in folder.glob("report-*"):
                    leftover.unlink(missing_ok=True)
                for checkpoint in superfluous(list_checkpoints(self._run), self._retention):
                    remove(checkpoint.folder)

    def _write_own(self, folder: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, int]) -> None:
        rank = self._engine.rank
        name = rank_file(rank, self._engine.world_size)
        sharding = {key: {"saved_offsets": [offset]} for key, offset in offsets.items()}
        partial = folder / f"{name}.partial"
        self.at_point("folder")
        if (folder / "manifest.json").exists():
            raise StorageError(f"{folder} is there already; a published checkpoint is never overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        self.at_point("write")
        # one entry: safetensors writes several in any order, and equal slices are to be equal files
        save_file(tensors, partial, metadata={"DCP_SHARDING_INFO": json.dumps(sharding)})
        partial.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read, whatever the umask
        self.at_point("sync")
        _fsync(partial)
        self.at_point("rename")
        partial.replace(folder / name)
        _fsync(folder)
        self.at_point("report")
        entry = {"bytes": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name)}
        write_json(folder / _report(rank), {"files": {name: entry}})

    def _publish(self, folder: Path, step: int, state: dict[str, Any]) -> int:
        """Rank 0: wait for all ranks, then make their files a checkpoint; its bytes."""
        self.at_point("collect")
        files = self._collect(folder)
        self.at_point("state")
        state_file = folder / "state.json"
        write_json(state_file, state)
        files["state.json"] = {"bytes": state_file.stat().st_size, "xxh3_128": checksum(state_file)}
        manifest = {"format": FORMAT, "step": step, "world_size": self._engine.world_size, "files": files}
        manifest["evaluation"] = state.get("evaluation")
        self.at_point("manifest")
        _fsync(folder)
        write_json(folder / "manifest.json", manifest)
        with suppress(OSError):  # it is published; a power failure now could still undo that
            self.at_point("published")
            _fsync(folder)
            _fsync(self._checkpoints)
        return sum(int(entry["bytes"]) for entry in files.values())

    def _collect(self, folder: Path) -> dict[str, Any]:
        """Wait for every rank's report; the files they have written."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + _REPORT_TIMEOUT_SECONDS
        for rank in range(self._engine.world_size):
            path = folder / _report(rank)
            delay = 0.005
            while not path.is_file():
                if path.with_suffix(".failed").exists():
                    raise StorageError(f"rank {rank} could not write its part; its log says why")
                if time.monotonic() > deadline:
                    raise StorageError(f"rank {rank} has not written its part within {_REPORT_TIMEOUT_SECONDS:.0f} s")
                time.sleep(delay)
                delay = min(2 * delay, 0.25)
            files.update(json.loads(path.read_text())["files"])
        return files

    def _clean_up(self, folder: Path, rank: int, world_size: int) -> None:
        """Give back the space of a failed save, and let rank 0 know, without needing a block of the disk."""
        if (folder / "manifest.json").exists():
            return
        with suppress(OSError):
            for path in folder.glob(f"{rank_file(rank, world_size)}*"):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            (folder / _report(rank)).with_suffix(".failed").touch()
        if rank == 0:
            self._wait_for_others(folder, world_size)
            with suppress(OSError):
                shutil.rmtree(folder)

    def _wait_for_others(self, folder: Path, world_size: int) -> None:
        deadline = time.monotonic() + _CLEAN_UP_SECONDS
        reports = [folder / _report(rank) for rank in range(1, world_size)]
        while folder.is_dir() and time.monotonic() < deadline:
            if all(report.is_file() or report.with_suffix(".failed").exists() for report in reports):
                return
            time.sleep(0.02)


def _report(rank: int) -> str:
    return f"report-{rank:05d}.json"


class Slices:
    """The slices of a checkpoint's rank files, opened when they are needed."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
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
        if self._even:  # ZeRO-3: pieces of ceil(numel / W)
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
    pinned: Collection[str] = ()  # equal to their files already
    if slices.origin and engine.origin and engine.origin.holds(slices.origin):
        pinned = slices.origin.keys
    elif slices.origin:
        slices.origin.verify(folder.parent.parent)
    with torch.no_grad():
        for shard in engine.shards():
            for kind, target in shard.tensors.items():
                if shard.length and shard.name not in pinned:
                    slices.read_into(f"{kind}/{shard.name}", shard, target)
        buffers = dict(engine.buffers())
        for name, shape in state.get("buffers", ()):
            if name in buffers and math.prod(shape):
                whole = torch.empty(math.prod(shape), dtype=buffers[name].dtype)
                slices.read_into(f"buffer/{name}", Shard(name, whole.numel(), 0, whole.numel(), {}), whole)
                buffers[name].copy_(whole.view(shape))
        engine.finish_loading(int(state["optimizer_steps"]))
    return state
