"""Who may read and write a run: the umask of everything that dsft starts, and the group of the run directory."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

from trainer.config.schema import Cluster
from trainer.failures import UserError


def apply_umask(cluster: Cluster) -> None:
    """Set this process's umask, which its children inherit; agents elsewhere are told (`trainer.agent`)."""
    if cluster.umask is not None:
        os.umask(int(cluster.umask, 8))


def make_run_directory(path: Path, cluster: Cluster) -> None:
    """Make the run directory; everything in one with a group (setgid) gets that group, whoever writes it.

    Raises UserError if there is no such group, or the user is not in it; OSError if the directory cannot be made.
    """
    path.mkdir(parents=True, exist_ok=True)
    if cluster.group is None:
        return
    try:
        number = grp.getgrnam(cluster.group).gr_gid
    except KeyError:
        raise UserError(f"cluster.group: there is no group {cluster.group} on this machine; `id` shows yours") from None
    found = path.stat()
    if found.st_gid == number and found.st_mode & stat.S_ISGID:
        return
    try:
        os.chown(path, -1, number)
        os.chmod(path, stat.S_IMODE(path.stat().st_mode) | stat.S_ISGID)
    except PermissionError:
        raise UserError(
            f"cluster.group: {path} cannot be given to {cluster.group}: you have to be in that group (`id`), "
            "and the directory has to be yours"
        ) from None
