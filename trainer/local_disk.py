"""A folder on the disk of a node, for memory that is kept in files (`trainer.file_memory`): whether it serves."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

CHUNK = 64 << 20  # bytes of a file that a rank's small tensors share: the last one is taken whole
_MEMORY = {"tmpfs", "ramfs"}
_NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "fuse.sshfs", "orangefs", "wekafs"}
# what is written again goes to new blocks: those that a file got at the start are no promise
_COPYING = {"btrfs", "zfs", "bcachefs"}


def file_system(folder: Path, mounts: Iterable[str] | None = None) -> str:
    """The type of the file system that a folder is on, by ``/proc/mounts``; "unknown" where there is none."""
    path, found = folder.resolve(), (-1, "unknown")
    try:
        lines = Path("/proc/mounts").read_text().splitlines() if mounts is None else mounts
    except OSError:
        return "unknown"
    for line in lines:
        _, place, kind, *_ = line.split(" ")
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), place))  # spaces are octal there
        if path.is_relative_to(point) and len(point.parts) >= found[0]:  # of two at one place, the later one counts
            found = (len(point.parts), kind)
    return found[1]


def problem(folder: Path, ranks: int, needed: int) -> str | None:
    """Why ``needed`` bytes of each of ``ranks`` cannot be kept there, or None; 0: it is not known how many."""
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a folder above it may not be entered
        return f"{folder} cannot be seen ({error.strerror})"
    if not is_folder:
        return f"{folder} is no folder; name one on the node's own disk"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    if file_system(folder) in _MEMORY:
        return f"{folder} is memory itself ({file_system(folder)}); name a folder on the node's own disk"
    free, needed = shutil.disk_usage(folder).free, ranks * (needed + CHUNK)
    if needed > free:
        return f"{needed / 1e9:.3g} GB are needed in {folder}, {free / 1e9:.3g} GB are free: free some"
    return None


def doubt(folder: Path) -> str | None:
    """What speaks against a folder that would serve, or None."""
    kind = file_system(folder)
    if kind in _COPYING:
        return f"{folder} is on {kind}, which takes new blocks for what is written again: keep it from filling up"
    return f"{folder} is on the network ({kind}): every step will wait for it" if kind in _NETWORK else None
