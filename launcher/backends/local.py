"""This machine: one agent, started as a child that dies with the launcher."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.plan import torchrun_arguments
from trainer.failures import node_name
from trainer.heartbeat import STACK_SIGNAL
from trainer.processes import RUN_VARIABLE, child_environment, kill_run
from trainer.rundir import RunDirectory

_KILL_SECONDS = 10.0


def agent_command(run_dir: Path, attempt: int, worker_module: str, torchrun: Sequence[str]) -> list[str]:
    """The agent's command line; `torchrun` are the arguments that a person would give to `torchrun`."""
    return [
        *(sys.executable, "-P", "-m", "trainer.agent", "--run-dir", str(run_dir), "--attempt", str(attempt)),
        *("--parent-pid", str(os.getpid()), "--hold", "--worker-module", worker_module, "--", *torchrun),
    ]


@dataclass
class LocalAttempt:
    """A started attempt."""

    run: RunDirectory
    process: subprocess.Popen[str]
    node: str = field(default_factory=node_name)

    def release(self) -> None:
        """Let the held agent start its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died already: `poll` tells
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def poll(self) -> dict[str, int] | None:
        """Exit code of each node's agent once all have ended (negative: the signal that killed it), else None."""
        code = self.process.poll()
        return None if code is None else {self.node: code}

    def is_failing(self) -> bool:
        """There is one agent: it has ended or it has not."""
        return False

    def ask_for_stacks(self) -> None:
        """Have every rank write the Python stacks of its threads."""
        self.process.send_signal(STACK_SIGNAL)

    def kill(self) -> list[int]:
        """Kill everything that belongs to the run on this machine; returns pids that would not die."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        left = kill_run(self.run.path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_KILL_SECONDS)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        return left


@dataclass(frozen=True)
class LocalBackend:
    """Starts attempts on this machine. Call it from the main thread: the agent dies with the thread that started it."""

    run: RunDirectory
    processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    worker_module: str = "trainer.worker"

    def start(self, attempt: int) -> LocalAttempt:
        """Start the agent of `attempt` in a session of its own; its ranks wait for `release`."""
        kill_run(self.run.path)  # the lock is ours: what still runs is left of a launcher that was killed
        # port 0: the agent takes a free one itself, which nobody can snatch in between
        torchrun = torchrun_arguments(1, self.processes, 0, "127.0.0.1", 0)
        log = self.run.agent_log_path(attempt, node_name())
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                agent_command(self.run.path, attempt, self.worker_module, torchrun),
                env=child_environment(self.environment) | {RUN_VARIABLE: str(self.run.path)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                text=True,
            )
        return LocalAttempt(self.run, process)
