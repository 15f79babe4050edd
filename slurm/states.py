"""What SLURM's job states mean for a run: a pure mapping."""

from __future__ import annotations

from typing import Literal

JobState = Literal["pending", "running", "finished", "failed", "stopped", "unknown"]

# The states of `squeue` and `sacct` ("JOB STATE CODES" in their manual pages), up to SLURM 25.05
_STATES: dict[JobState, tuple[str, ...]] = {
    "pending": (
        *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
        *("SUSPENDED", "STOPPED", "POWER_UP_NODE", "EXPEDITING"),
    ),
    "running": ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "UPDATE_DB"),
    "finished": ("COMPLETED",),
    "failed": ("FAILED", "BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY", "LAUNCH_FAILED", "RECONFIG_FAIL"),
    # The job is over before its script was: the run can go on where it stopped
    "stopped": ("CANCELLED", "TIMEOUT", "PREEMPTED", "DEADLINE", "REVOKED"),
}
_MEANING = {name: state for state, names in _STATES.items() for name in names}


def job_state(text: str) -> JobState:
    """The meaning of a state as SLURM prints it: ``RUNNING``, ``CANCELLED by 1000``, ``CANCELLED+``."""
    word = text.split(" ")[0].rstrip("+").upper()
    return _MEANING.get(word, "unknown")
