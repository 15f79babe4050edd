"""Checkpoints on node-local storage, more frequent than those on shared storage: for restarts on the same nodes.

    FAST_DIR/NAME-HASH/step-00000020/rank-00001-of-00004.safetensors   as in a checkpoint
                                     rank-00001-of-00004.json          token, bytes, checksum, state; written last
    RUN/checkpoints/fast.json                                          [[step, token], ...] of the newest ones

A rank knows of its own part alone. What counts is said on shared storage by rank 0: going back in the run removes
fast.json, and with it every fast checkpoint at once; the token tells parts of one save from those of another.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint_files import checksum, fast_list, folder_name, rank_file
from trainer.failures import UserError, node_name
from trainer.rundir import RunDirectory, read_json, write_json

Gather = Callable[[np.ndarray], list[np.ndarray]]

_KEPT = 2  # whole ones: when a rank writes the third, each rank has the first


class FastTier:
    """One rank's part of it.

    Args:
        gather: see `collectives.make_gather`.

    Attributes:
        token: tells saves of a step, before and after a restart or a rollback, from one another; equal on all ranks.

    Raises:
        UserError: ``fast_dir`` cannot be written to on this node.
    """

    def __init__(self, fast_dir: str, run: RunDirectory, rank: int, world_size: int, gather: Gather) -> None:
        self._rank, self._file = rank, rank_file(rank, world_size)
        self._list = fast_list(run)
        name = f"{run.path.name}-{hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:12]}"
        self.folder = Path(fast_dir) / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            usable = os.access(self.folder, os.W_OK)
        except OSError as error:
            raise UserError(f"checkpoint.fast_dir: {fast_dir} on {node_name()}: {error.strerror}") from error
        if not usable:
            raise UserError(f"checkpoint.fast_dir: {self.folder} on {node_name()} cannot be written to")
        self.token = int(gather(np.array([secrets.randbits(48)], dtype=np.int64))[0][0])

    def write(self, step: int, state: dict[str, Any], save: Callable[[Path], None], flushed: int | None) -> Path:
        """This rank's part: ``save`` writes its slices to a path; the file.

        Nothing is synced: a node that loses power has lost its part, which the checksum shows. Parts older than the
        last two are removed, but for that of step ``flushed``, which is being copied.
        """
        for old in self._steps()[:-_KEPT]:
            if old != flushed:
                self._remove(old)
        folder = self.folder / folder_name(step)
        folder.mkdir(exist_ok=True)
        path = folder / self._file
        self._record(step).unlink(missing_ok=True)
        save(path)
        entry = {"token": self.token, "bytes": path.stat().st_size, "xxh3_128": checksum(path), "state": state}
        write_json(self._record(step), entry)
        if self._rank == 0:
            listed = [item for item in read_json(self._list) or [] if item[0] != step]
            write_json(self._list, [*listed[-_KEPT:], [step, self.token]])
        return path

    def listed(self, newer_than: int) -> list[tuple[int, int]]:
        """(step, token) of those that count, as rank 0 reads it, the newest first."""
        try:
            found = [(int(step), int(token)) for step, token in read_json(self._list) or []]
        except (OSError, ValueError, TypeError):
            return []
        return sorted((item for item in found if item[0] > newer_than), reverse=True)

    def part(self, step: int, token: int) -> tuple[Path, dict[str, Any]] | str:
        """(folder, state) of this rank's part if it is there, of this save, and whole; else what is wrong."""
        folder = self.folder / folder_name(step)
        path = folder / self._file
        try:
            entry = read_json(self._record(step))
            if entry is None or entry["token"] != token:
                return f"{node_name()} has no {path}"
            if path.stat().st_size != entry["bytes"] or checksum(path) != entry["xxh3_128"]:
                return f"{path} on {node_name()} does not match its checksum"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{path} on {node_name()}: {error}"
        return folder, entry["state"]

    def clear(self) -> None:
        """Remove everything on this node, parts of attempts with more ranks or fewer as well; once no rank writes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record(self, step: int) -> Path:
        return (self.folder / folder_name(step) / self._file).with_suffix(".json")

    def _steps(self) -> list[int]:
        """Steps of which this rank has written its part, in the order of writing: a run may have gone back."""
        found = self.folder.glob(f"step-*/{Path(self._file).with_suffix('.json')}")
        in_order = sorted(found, key=lambda path: path.stat().st_mtime_ns)
        return [int(path.parent.name.removeprefix("step-")) for path in in_order]

    def _remove(self, step: int) -> None:
        """The record first: without it there is no part."""
        record = self._record(step)
        with suppress(OSError):
            record.unlink(missing_ok=True)
            record.with_suffix(".safetensors").unlink(missing_ok=True)
        if not any(record.parent.glob("rank-*.json")):  # by the last rank, with what killed writers have left
            shutil.rmtree(record.parent, ignore_errors=True)
