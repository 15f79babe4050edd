"""PyTorch's flight recorder: the last collectives of a rank's NCCL groups, written when one times out or on demand.

The files, attempts/NNNN/flight/rank<k>, are torch's own: `torchfrtrace --prefix rank attempts/NNNN/flight` reads them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def variables(attempt_dir: Path, agent_pid: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank needs in its environment before its first process group; what the user has set stays.

    That it records, and 2000 collectives, is torch's default. It appends the rank to the file's name, and the rank and
    `.pipe` to the pipe's, which is on the node's own disk.
    """
    wanted = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(attempt_dir / "flight" / "rank"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": _pipe_stem(agent_pid),
    }
    return {name: value for name, value in wanted.items() if name not in environment}


def begin(attempt_dir: Path, agent_pid: int) -> None:
    """Have this process record; call it before torch makes a process group."""
    os.environ.update(variables(attempt_dir, agent_pid, os.environ))
    with contextlib.suppress(OSError):
        (attempt_dir / "flight").mkdir(parents=True, exist_ok=True)


def ask(agent_pid: int, ranks: Iterable[int]) -> None:
    """Have the ranks of an agent write what they have recorded; those that do not record are passed over."""
    for rank in ranks:
        with contextlib.suppress(OSError):  # no pipe, or nobody reads it
            descriptor = os.open(f"{_pipe_stem(agent_pid)}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(descriptor, b"1\n")
            finally:
                os.close(descriptor)


def clear(agent_pid: int, ranks: Iterable[int]) -> None:
    """Remove the pipes of ranks that have ended."""
    for rank in ranks:
        Path(f"{_pipe_stem(agent_pid)}{rank}.pipe").unlink(missing_ok=True)


def _pipe_stem(agent_pid: int) -> str:
    return f"/tmp/dsft-flight-{agent_pid}-rank"
