"""Checkpoints: whole or absent, no pickle, loadable at any world size.

    checkpoints/step-00000200/
        rank-00000-of-00002.safetensors   a rank's slices
        state.json                        step, data state, optimizer steps, parameters
        manifest.json                     files, sizes, checksums; written last by atomic rename: the publication

A rank's slices are `master/NAME`, the optimizer's moments (AdamW's `exp_avg/NAME` and `exp_avg_sq/NAME`) and `ema/NAME`
where weights are averaged, all fp32, of trained parameters; and `frozen/NAME` of the others, unless those are in the
model's own files (`trainer.origin`). Each is 1-D; its place in the flattened parameter is in the file's metadata, in
the form that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads. What is equal on all ranks (buffers and
Adafactor's factors) is in rank 0's file. A rank stages its slices by one copy into reused buffers; a thread then writes
them while training goes on, without collectives: ranks report through files. With a fast tier
(`trainer.fast_tier`) they write to that, and copy from it.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
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
from trainer.engine import Engine
from trainer.failures import StorageError
from trainer.fast_tier import FastTier
from trainer.pinned_memory import PinnedMemory
from trainer.rundir import RunDirectory, sync, write_json

FORMAT = 1
_REPORT_TIMEOUT_SECONDS = 3600.0
_CLEAN_UP_SECONDS = 30.0


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
        fast: node-local storage, written to before shared storage.
    """

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        retention: Retention,
        tell: Callable[..., Any],
        at_point: AtPoint = lambda _: None,
        fast: FastTier | None = None,
    ) -> None:
        self._run = run
        self.fast = fast
        self._checkpoints = run.checkpoints_dir
        self._engine = engine
        self._retention = retention
        self._tell = tell
        self.at_point = at_point
        self._buffers: dict[str, torch.Tensor] = {}
        self._pinned_memory = PinnedMemory()
        self._thread: threading.Thread | None = None  # empties the buffers
        self._flush: threading.Thread | None = None  # copies a file of the fast tier
        self.step: int | None = None  # of the latest save
        self.error: str | None = None  # of that save
        self.seconds = 0.0  # of the latest save, from its start to its publication
        if engine.memory:  # its disk has room for the buffers now
            for key, source, _ in self._sources():
                self._buffer(key, source)

    def save(self, step: int, state: dict[str, Any]) -> float:
        """Stage this rank's slices and write them in the background; returns the seconds training stood still.

        ``state`` goes into state.json; its ``evaluation``, if any, into the manifest as well.
        """
        start = time.monotonic()
        self.wait()
        self.step, self.error = step, None
        self._start(step, state, shared=True)
        return time.monotonic() - start

    def save_fast(self, step: int, state: dict[str, Any]) -> None:
        """Save to the fast tier alone; not at all where this rank is still writing to it."""
        if self._thread is None or not self._thread.is_alive():
            self._start(step, state, shared=False)

    def _start(self, step: int, state: dict[str, Any], shared: bool) -> None:
        tensors, offsets = self._stage()
        state = {
            "format": FORMAT,
            "step": step,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.stage,
            "optimizer_steps": self._engine.optimizer_steps(),
            "unfrozen_steps": self._engine.unfrozen_steps(),
            "averaged": self._engine.keeps_average,
            "parameters": self._engine.parameters(),
            "buffers": [(name, tuple(buffer.shape)) for name, buffer in self._engine.buffers()],
            **({"origin": self._engine.origin.to_json()} if self._engine.origin else {}),
            **state,
        }
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, offsets, state, shared), name="checkpoint"
        )
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the save under way, if any, is published or has failed (see ``error``); False: it still runs."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for name in ("_thread", "_flush"):  # the one may start the other
            thread = getattr(self, name)
            if thread is not None:
                thread.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))
                if thread.is_alive():
                    return False
                setattr(self, name, None)
        return True

    def bytes_of_all_ranks(self) -> int:
        """Bytes of one checkpoint, without headers: fp32 masters, moments, averages, and frozen weights if stored."""
        held, frozen, pinned = self._engine.trained_itemsize(), self._engine.frozen_itemsize(), self._pinned()
        return sum(
            math.prod(shape) * (held if trained else frozen)
            for name, shape, trained in self._engine.parameters()
            if name not in pinned
        )

    def missing_space(self) -> str | None:
        """What to tell the user if the disk has no room for one more checkpoint, or does not answer."""
        needed = self.bytes_of_all_ranks() * 101 // 100 + (1 << 20)
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._checkpoints).free
        except OSError as error:
            return f"{self._checkpoints} cannot be used: {error.strerror}"
        if needed <= free:
            return None
        return (
            f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {self._checkpoints}: "
            "free some space (`dsft checkpoint gc`), or lower checkpoint.keep_last or keep_best"
        )

    def _pinned(self) -> Collection[str]:
        """Frozen weights that are in the model's files and not in checkpoints."""
        return self._engine.origin.keys if self._engine.origin else ()

    def _sources(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """(key, 1-D tensor, its offset) of all that this rank saves."""
        pinned = self._pinned()
        for shard in self._engine.shards():
            if shard.length and shard.name not in pinned:
                for kind, source in shard.tensors.items():
                    yield f"{kind}/{shard.name}", source, shard.offset
        if self._engine.rank == 0 or self.fast:  # equal on all ranks
            named = [(f"buffer/{name}", buffer) for name, buffer in self._engine.buffers()]
            for key, tensor in named + self._engine.replicated():
                if tensor.numel():
                    yield key, tensor.detach().reshape(-1), 0

    def _stage(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        tensors: dict[str, torch.Tensor] = {}
        offsets: dict[str, int] = {}
        for key, source, offset in self._sources():
            tensors[key], offsets[key] = self._buffer(key, source).copy_(source, non_blocking=True), offset
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else a rank on CPUs would open a GPU here
            torch.cuda.current_stream().synchronize()
        return tensors, offsets

    def _buffer(self, key: str, source: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            if self._engine.memory:
                buffer = self._engine.memory.zeros(source.numel(), source.dtype)
            elif source.device.type == "cuda":
                buffer = self._pinned_memory.empty(source.numel(), source.dtype)
            else:
                buffer = torch.empty_like(source)
            self._buffers[key] = buffer
        return buffer

    def _write(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        offsets: dict[str, int],
        state: dict[str, Any],
        shared: bool,
    ) -> None:
        """To the fast tier, if there is one; then, if ``shared``, from there or from the buffers."""

        def save(path: Path) -> None:
            sharding = {key: {"saved_offsets": [offset]} for key, offset in offsets.items()}
            # one entry: safetensors writes several in any order, and equal slices are to be equal files
            save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(sharding)})

        if self.fast is None:
            self._write_shared(step, save, state)
            return
        flushed = self.step if self._flush is not None and self._flush.is_alive() else None
        try:
            source = self.fast.write(step, state, save, flushed)
        except Exception as error:  # the disk of this node is full, perhaps
            message = f"fast checkpoint of step {step} not written: {type(error).__name__}: {error}"
            self._tell("checkpoint_fast_failed", step=step, message=message)
            if shared:
                self._write_shared(step, save, state)
            return
        if shared:
            copy = functools.partial(shutil.copyfile, source)
            self._flush = threading.Thread(target=self._write_shared, args=(step, copy, state), name="flush")
            self._flush.start()

    def _write_shared(self, step: int, save: Callable[[Path], Any], state: dict[str, Any]) -> None:
        """Publish a checkpoint; ``save`` writes this rank's file."""
        start = time.monotonic()
        folder = self._checkpoints / folder_name(step)
        try:
            self._write_own(folder, save)
            if self._engine.rank == 0:
                size = self._publish(folder, step, state)
                self.seconds = time.monotonic() - start
                self._tell("checkpoint", step=step, seconds=self.seconds, bytes=size)
        except Exception as error:  # told, and passed on to the training loop; older checkpoints are unharmed
            self.error = f"checkpoint of step {step} not written: {type(error).__name__}: {error}"
            self._clean_up(folder)
            with suppress(OSError):
                self._tell("checkpoint_failed", step=step, message=self.error)
            return
        if self._engine.rank == 0:
            with suppress(OSError):  # tried again after the next save
                self.at_point("retain")
                for leftover in folder.glob("report-*"):
                    leftover.unlink(missing_ok=True)
                for checkpoint in superfluous(list_checkpoints(self._run), self._retention):
                    remove(checkpoint.folder)

    def _write_own(self, folder: Path, save: Callable[[Path], Any]) -> None:
        rank = self._engine.rank
        name = rank_file(rank, self._engine.world_size)
        partial = folder / f"{name}.partial"
        self.at_point("folder")
        if (folder / "manifest.json").exists():
            raise StorageError(f"{folder} is there already; a published checkpoint is never overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        self.at_point("write")
        save(partial)
        partial.chmod(folder.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read, whatever the umask
        self.at_point("sync")
        sync(partial)
        self.at_point("rename")
        partial.replace(folder / name)
        sync(folder)
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
        sync(folder)
        write_json(folder / "manifest.json", manifest)
        with suppress(OSError):  # it is published; a power failure now could still undo that
            self.at_point("published")
            sync(folder)
            sync(self._checkpoints)
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

    def _clean_up(self, folder: Path) -> None:
        """Give back the space of a failed save, and let rank 0 know, without needing a block of the disk."""
        rank, world_size = self._engine.rank, self._engine.world_size
        if (folder / "manifest.json").exists():
            return
        with suppress(OSError):
            for path in folder.glob(f"{rank_file(rank, world_size)}*"):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)  # this rank may have failed before any has made it
            (folder / _report(rank)).with_suffix(".failed").touch()
        if rank == 0:
            deadline = time.monotonic() + _CLEAN_UP_SECONDS
            waiting = [folder / _report(other) for other in range(1, world_size)]
            while waiting and folder.is_dir() and time.monotonic() < deadline:
                waiting = [path for path in waiting if not (path.is_file() or path.with_suffix(".failed").exists())]
                time.sleep(0.02)
            with suppress(OSError):
                shutil.rmtree(folder)


def _report(rank: int) -> str:
    return f"report-{rank:05d}.json"
