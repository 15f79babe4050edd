"""Failure classes, the exceptions that carry them, exit codes, and the record a failing rank leaves behind."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainer.rundir import write_json

FailureClass = Literal[
    "user",
    "data",
    "out_of_memory",
    "numeric",
    "hang",
    "communication",
    "storage",
    "node",
    "preemption",
    "time_limit",
    "unknown",
]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: worth resubmitting
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class DsftError(Exception):
    """An error whose message is written for the user; shown without a traceback."""

    failure_class: FailureClass = "unknown"
    exit_code = EXIT_FAILED


class UserError(DsftError):
    """Something the user must change: config, paths, versions. Never retried."""

    failure_class: FailureClass = "user"
    exit_code = EXIT_USER


class DataError(UserError):
    """A record, file or tokenizer that cannot be used as it is. Never retried."""

    failure_class: FailureClass = "data"


class NumericError(DsftError):
    """Loss or gradients are not finite."""

    failure_class: FailureClass = "numeric"


class StorageError(DsftError):
    """Disk full, no permission, or an I/O error while the run writes its own files."""

    failure_class: FailureClass = "storage"
    exit_code = EXIT_TEMPORARY


def in_words(error: DsftError | OSError) -> DsftError:
    """What to tell: a DsftError as it is, or which file cannot be read or written. Others are raised again."""
    if isinstance(error, DsftError):
        return error
    if error.filename is None:
        raise error
    kind = UserError if isinstance(error, PermissionError) else StorageError
    return kind(f"{error.filename}: {error.strerror}")


def run_tool(action: Callable[[], Any]) -> int:
    """Print what ``action`` returns, as JSON, or its error; the exit code of the process that was started for it."""
    try:
        report = action()
    except (DsftError, OSError) as error:
        told = in_words(error) if getattr(error, "filename", None) else error
        print(f"error: {told}", file=sys.stderr)
        return exit_code_of(told)
    print(json.dumps(report))
    return EXIT_DONE


NODE_VARIABLE = "DSFT_NODE"  # set over SSH: the name that the config has for the host


def node_name() -> str:
    """The name of this node in logs and records: the config's or SLURM's if there is one, else the short host name."""
    return os.environ.get(NODE_VARIABLE) or os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


# In messages of plain RuntimeErrors: torch's allocator on CPUs; CUDA, cuBLAS and NCCL outside torch's allocator
_MEMORY_IS_FULL = ("can't allocate memory", "error: out of memory", "'out of memory'", "STATUS_ALLOC_FAILED")
_GPU_FAILED = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "busy or unavailable",
    "Invalid access of peer GPU memory over nvlink",
)


def classify(error: BaseException) -> FailureClass:
    """The class of an exception raised in a rank, from its type (and, for torch's errors, its class name)."""
    if isinstance(error, DsftError):
        return error.failure_class
    names = {cls.__name__ for cls in type(error).__mro__}
    said = str(error) if isinstance(error, RuntimeError) else ""
    if "OutOfMemoryError" in names or isinstance(error, MemoryError) or any(words in said for words in _MEMORY_IS_FULL):
        return "out_of_memory"
    if any(words in said for words in _GPU_FAILED):
        return "node"
    if "DistError" in names or isinstance(error, ConnectionError):  # of torch.distributed
        return "communication"
    # gloo raises a plain RuntimeError; its source path is the only mark it leaves
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error).replace("\\", "/"):
        return "communication"
    if isinstance(error, OSError):
        return "storage"
    return "unknown"


def write_failure(attempt_dir: Path, rank: int, error: BaseException, step: int | None) -> dict[str, Any]:
    """Write this rank's failure record (see docs/architecture.md) and return it."""
    known = classify(error) != "unknown" or isinstance(error, DsftError)  # else its type is half of the story
    record: dict[str, Any] = {
        "class": classify(error),
        "rank": rank,
        "node": node_name(),
        "step": step,
        "message": str(error) if str(error) and known else f"{type(error).__name__}: {error}".removesuffix(": "),
        "unfit": getattr(error, "unfit", False),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    folder = attempt_dir / "failures"
    folder.mkdir(exist_ok=True)  # no parents: where storage was unmounted, nothing is to be left in its mount point
    write_json(folder / f"rank{rank}.json", record)
    return record


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends by `error`."""
    if isinstance(error, DsftError):
        return error.exit_code
    return EXIT_TEMPORARY if classify(error) in ("storage", "communication", "node") else EXIT_FAILED
