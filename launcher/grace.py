"""Whether the time between SLURM's signal and the time limit suffices for a step and a checkpoint, as measured."""

from __future__ import annotations

from launcher.backends.slurm import LATE_SECONDS
from trainer.config.schema import SlurmCluster
from trainer.rundir import RunDirectory

_RECENT = 100  # steps and checkpoints that are looked at: the past of a run may have been another machine's


def needed_seconds(run: RunDirectory) -> float | None:
    """The longest recent step, which a stop request waits for, and the longest recent checkpoint; None before both."""
    steps = [float(line["step_seconds"]) for line in run.last_steps(_RECENT) if "step_seconds" in line]
    saves = [float(event["seconds"]) for event in run.merged_events() if event["event"] == "checkpoint"][-_RECENT:]
    return max(steps) + max(saves) if steps and saves else None


def grace_problem(run: RunDirectory, cluster: SlurmCluster) -> str | None:
    """What is wrong with `cluster.grace_seconds`, and what to set; None if it suffices or nothing is known yet."""
    needed = needed_seconds(run)
    left = cluster.grace_seconds - LATE_SECONDS
    if needed is None or needed <= left:
        return None
    enough = round(1.5 * needed) + LATE_SECONDS
    return (
        f"cluster.grace_seconds ({cluster.grace_seconds}) leaves {max(0, left)} s before the time limit, since SLURM "
        f"may signal {LATE_SECONDS} s late, but a step and a checkpoint of this run take up to {needed:.0f} s: the "
        f"last checkpoint would be lost. `dsft cancel`, then `dsft resume --set cluster.grace_seconds={enough}`"
    )
