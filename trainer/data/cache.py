"""What dsft keeps on local disk between runs: indices, decompressed and downloaded files; may be removed any time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trainer.failures import StorageError, node_name

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def cache_folder() -> Path:
    """Where indices, copies and check results are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsft"


def file_identity(path: Path) -> str:
    """Changes whenever a file may have changed: place, size, time of change, inode."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def cached(kind: str, identity: str, suffix: str, write: Callable[[IO[bytes]], None]) -> Path:
    """The cached file of an identity; made by ``write`` where it is missing, once for all ranks of a node.

    It appears whole or not at all.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    target = cache_folder() / kind / (hashlib.sha256(identity.encode()).hexdigest()[:40] + suffix)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")) as alone:
            # always the same name on a host: what a killed process has left of it is written over
            own = node_name() if alone else f"{node_name()}.{uuid.uuid4().hex[:12]}"
            unfinished = target.with_name(f"{target.name}.{own}.tmp")
            if not target.exists():
                try:
                    with unfinished.open("wb") as file:
                        write(file)
                    os.replace(unfinished, target)
                finally:
                    unfinished.unlink(missing_ok=True)
    except OSError as error:
        place = Path(str(error.filename))
        if error.errno not in _NO_ROOM and place not in target.parents and target.parent not in place.parents:
            raise  # of what was to be cached, not of the cache
        raise StorageError(
            f"{target.parent} cannot be written: {error.strerror or error}; dsft keeps its copies of data there: "
            "make room, or set XDG_CACHE_HOME to a folder on another local disk"
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One process of this host at a time; freed by the kernel when its holder dies.

    Gives False on a file system without locks, where the work may be done twice.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
