"""Runs programs that nobody has read: each in a process of its own that can do nothing to its host.

See `trainer/sandbox_guard.py` for what is held back and by what. Linux with user namespaces is needed; where the
system does not allow them nothing is run at all.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.generation import CodeExecutionConfig
from trainer.failures import UserError

_GUARD = Path(__file__).with_name("sandbox_guard.py")
_START_SECONDS = 20.0  # an interpreter's start and end on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How a program ended: it passed if it came to its end, without an exception and in time."""

    status: Literal["passed", "failed", "timeout"]
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(source: str, limits: CodeExecutionConfig) -> Outcome:
    """Run Python source text in a sandbox. Raises UserError where this machine allows none."""
    folder = tempfile.mkdtemp(prefix="dsft-program-", dir="/tmp")  # where the program's root directory is put together
    request = {"source": source, "token": secrets.token_hex(16), "folder": folder, **limits.model_dump(mode="json")}
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env={"LANG": "C.UTF-8"},
        ) as process:
            try:
                output, _ = process.communicate(json.dumps(request).encode(), limits.timeout_seconds + _START_SECONDS)
            except subprocess.TimeoutExpired:
                return Outcome("timeout", f"longer than {limits.timeout_seconds} s")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.rmdir(folder)
    try:
        answer = json.loads(output)
    except ValueError:
        return Outcome("failed", f"its guard ended with code {process.returncode}")
    if answer["status"] == "refused":
        raise UserError(
            f"task.code_execution: this machine gives no namespaces to run programs in ({answer['message']}): allow "
            "user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone; in a container its "
            "seccomp profile; root needs CAP_SYS_ADMIN), or set task.code_execution.enabled to false"
        )
    return Outcome(answer["status"], answer["message"])


def run_programs(sources: Sequence[str], limits: CodeExecutionConfig) -> list[Outcome]:
    """The outcome of each program, some side by side."""
    with ThreadPoolExecutor(limits.at_once) as pool:
        return list(pool.map(lambda source: run_program(source, limits), sources))
