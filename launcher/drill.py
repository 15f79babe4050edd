"""Faults on purpose: a process of a running run is killed or stopped, and the ledger says that it was a drill."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal, get_args

from launcher.state import run_state
from trainer.failures import UserError, node_name
from trainer.lease import read_holder
from trainer.processes import parent_of, processes_of_run
from trainer.rundir import Json, LineReader, RunDirectory
from trainer.worker import AGENT_PID_VARIABLE

Fault = Literal["kill-rank", "stop-rank", "kill-agent", "kill-supervisor"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
_POLL_SECONDS = 0.1


def inject(run: RunDirectory, fault: Fault, rank: int, after_step: int | None) -> Json:
    """Wait until the current attempt has made step `after_step` (None: any), then do it; returns the ledger's event.

    `kill-agent` means the agent of `rank`. Raises UserError if the run does not run, ends before that step, or if the
    process is not on this host; nothing is injected then.
    """
    attempt, step = _wait_for_step(run, after_step)
    pid = _supervisor(run) if fault == "kill-supervisor" else _of_rank(run, attempt, rank, fault == "kill-agent")
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise UserError(f"process {pid} has just ended by itself; nothing was injected") from None
    found = {"rank": rank} if fault.endswith("-rank") else {}
    event = run.event_writer("drill", attempt).write(
        "drill", fault=fault, step=step, node=node_name(), pid=pid, **found
    )
    signal.pidfd_send_signal(process, signal.SIGSTOP if fault == "stop-rank" else signal.SIGKILL)
    os.close(process)
    return event


def _wait_for_step(run: RunDirectory, after_step: int | None) -> tuple[int, int]:
    """(attempt, step) once the run has reached it."""
    metrics = LineReader(run.metrics_path)
    step, began = 0, 0.0
    while True:
        state = run_state(run)
        if state.state not in ("running", "pending"):
            raise UserError(f"{run.path} is not running ({state.state}), so there is nothing to drill")
        events = run.merged_events()
        attempts = [e for e in events if e["event"] == "attempt"]
        if attempts and float(attempts[-1]["time"]) > began:
            began, step, metrics.offset = float(attempts[-1]["time"]), 0, 0
        lines = [line for line in metrics.read() if "loss" in line]
        # with sparse logs the first step is known by its event alone
        for told in [*lines, *(e for e in events if e["event"] == "first_step")]:
            if float(told.get("time", 0)) > began > 0:
                step = max(step, int(told["step"]))
        if step and step >= (after_step or 0):
            attempt = int(attempts[-1]["attempt"])
            if not any(e["event"] == "failure" and e["attempt"] == attempt for e in events):
                return attempt, step
            # it has just failed: the next attempt is about to begin
        time.sleep(_POLL_SECONDS)


def _supervisor(run: RunDirectory) -> int:
    holder = read_holder(run.lock_dir)
    if holder is None or not holder.is_here():
        where = f"on {holder.node}" if holder else "nowhere"
        raise UserError(f"the supervisor of {run.path} runs {where}, not on {node_name()}: call `dsft drill` there")
    return holder.pid


def _of_rank(run: RunDirectory, attempt: int, rank: int, agent: bool) -> int:
    """The process of a rank, or of its agent; the processes that a rank has started carry the same variables."""
    for pid in processes_of_run(run.path):
        try:
            lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        parent = parent_of(pid)
        if f"RANK={rank}".encode() in lines and f"{AGENT_PID_VARIABLE}={parent}".encode() in lines:
            return parent if agent and parent is not None else pid
    logs = sorted((run.attempt_dir(attempt) / "logs").glob("*/rank*.log"))
    nodes = {int(path.stem.removeprefix("rank")): path.parent.name for path in logs}
    if rank not in nodes:
        raise UserError(
            f"there is no rank {rank} in attempt {attempt}; its ranks: {', '.join(map(str, sorted(nodes)))}"
        )
    raise UserError(
        f"rank {rank} runs on {nodes[rank]}, not on {node_name()}: call `dsft drill` there; in a SLURM job by "
        f"`srun --jobid=... --overlap --nodes=1 --nodelist={nodes[rank]} dsft drill ...`"
    )
