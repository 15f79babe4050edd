"""`dsft launch --detach`: the same launch in a session of its own, which outlives the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.failures import EXIT_DONE, EXIT_INTERRUPTED
from trainer.processes import child_environment
from trainer.rundir import RunDirectory

_READY = b"ready\n"


def log_path(run: RunDirectory) -> Path:
    """Where a detached launch says what one in a terminal would."""
    return run.path / "launch.log"


def detach(arguments: Sequence[str], run: RunDirectory, as_json: bool) -> int:
    """Start `dsft launch ARGUMENTS` of `run`, whose folder is there, on its own and return once its ranks may start, or
    with its exit code if it ends before, after showing what it said.
    """
    reader, writer = os.pipe()
    with open(log_path(run), "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", "launch", *arguments, f"--ready-fd={writer}"],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(writer,),
        )
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            ready = pipe.read() == _READY  # ends with the writer's `tell_ready`, or with the process
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        return EXIT_INTERRUPTED
    if not ready:
        code = process.wait()
        sys.stderr.write(log_path(run).read_bytes()[begin:].decode(errors="replace"))
        return code
    if as_json:
        print(json.dumps({"run": str(run.path), "pid": process.pid, "log": str(log_path(run))}))
        return EXIT_DONE
    print(f"{run.path} runs on its own (process {process.pid}), output in {log_path(run)}")
    print(
        f"`dsft status {run.path}` and `dsft logs -f {run.path}` show it, `dsft cancel {run.path}` saves and stops it"
    )
    return EXIT_DONE


def tell_ready(writer: int) -> None:
    """Let `detach` return: everything is checked and the ranks start."""
    with contextlib.suppress(BrokenPipeError):  # its terminal was closed meanwhile: all the more it goes on
        os.write(writer, _READY)
    os.close(writer)
