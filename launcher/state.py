"""What state a run is in: from its ledger and its lock, never from logs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.failures import UserError
from trainer.lease import LEASE_SECONDS, Holder, read_holder
from trainer.rundir import RunDirectory, merged

DIED = "the launcher died without a word (killed, or its machine went down)"
CUT_SHORT = "killed while it was stopping"  # SLURM waits KillWait seconds, often 30
FAILURE_KEYS = ("class", "rank", "node", "step", "message", "victims", "action")  # what is told of a failed attempt
State = Literal["pending", "running", "finished", "failed", "stopped"]

# For showing only (taking over trusts no clock): a lock of another host that is older than this is shown as dead.
_STALE_SECONDS = 3 * LEASE_SECONDS


@dataclass(frozen=True)
class RunState:
    """The state, why, and who runs it (only while `running`)."""

    state: State
    reason: str = ""
    holder: Holder | None = None


def ledger(run: RunDirectory) -> list[dict[str, Any]]:
    """The events of the launcher, oldest first: those of the supervisor, of submissions and of drills."""
    # submission.jsonl: written where a job is submitted, on another machine than the supervisor's
    return merged(run.events_dir / f"{writer}.jsonl" for writer in ("submission", "supervisor", "drill"))


def job_id(events: Sequence[Mapping[str, Any]]) -> str | None:
    """The id (without an array's index) of the last job that was submitted for a run or ran it, from its `ledger`."""
    return next((str(event["job_id"]) for event in reversed(events) if "job_id" in event), None)


def run_state(run: RunDirectory, events: Sequence[Mapping[str, Any]] | None = None) -> RunState:
    """Derive the state, from `events` if the ledger was read already. A launcher that was killed leaves `failed`."""
    told = ("submitted", "attempt", "finished", "failed", "stopped", "reopened")
    events = ledger(run) if events is None else events
    last = next((event for event in reversed(events) if event["event"] in told), {"event": "none"})
    if last["event"] == "finished":
        return RunState("finished")
    holder = read_holder(run.lock_dir)
    if holder is not None and not holder.is_gone() and (holder.is_here() or _is_fresh(run, holder)):
        return RunState("running", holder=holder)
    match last["event"]:
        case "failed":
            return RunState("failed", str(last.get("reason", "")))
        case "stopped":
            return RunState("stopped", str(last.get("reason", "")))
        case "reopened":
            return RunState("stopped", f"to go on from step {last.get('step')}")
        case "attempt":
            stopping = run.stop_request(int(last["attempt"])) is not None
            return RunState("stopped", CUT_SHORT) if stopping else RunState("failed", DIED)
        case "none":
            return RunState("pending", "never started: its launch was refused, or goes on just now")
    return RunState("pending")


def current_attempt(run: RunDirectory) -> int:
    """The attempt that the launch of a running run has begun last. Raises UserError before its first."""
    told = [event for event in run.merged_events() if event["event"] in ("launched", "attempt")]
    if not told or told[-1]["event"] == "launched":  # earlier attempts are those of earlier launches
        raise UserError(f"{run.path}: its first attempt is about to begin; try again then")
    return int(told[-1]["attempt"])


def _is_fresh(run: RunDirectory, holder: Holder) -> bool:
    try:
        renewed = os.stat(run.lock_dir / f"holder-{holder.generation:08d}").st_mtime
    except FileNotFoundError:  # just released or taken over: somebody is at it
        return True
    return time.time() - renewed < _STALE_SECONDS


def failures(run: RunDirectory) -> list[dict[str, Any]]:
    """Every failure of the run: {attempt, class, rank, node, step, message, victims, action}, oldest first."""
    keys = ("attempt", *FAILURE_KEYS)
    return [{key: verdict.get(key) for key in keys} for verdict in run.verdicts() if verdict["outcome"] == "failed"]
