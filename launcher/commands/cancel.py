"""`dsft cancel RUN`: ask a run to save and stop."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.rundir import RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--now", action="store_true", help="without a last checkpoint")


def run(options: argparse.Namespace) -> int:
    """Say what was asked for; it does not wait for it."""
    from launcher.registry import find_run

    print(cancel(find_run(options.run), options.now))
    return 0


def cancel(run: RunDirectory, now: bool) -> str:
    """Leave the stop request where the ranks and the supervisor look, or take the run's job out of the queue.

    Returns what was done. Raises UserError if there is nothing to cancel, SlurmUnavailable without an answer of SLURM.
    """
    from launcher.state import current_attempt, run_state
    from trainer.failures import DsftError, UserError

    state = run_state(run).state
    running = state == "running"
    if state != "finished" and (run.events_dir / "submission.jsonl").exists():
        from launcher.jobs import cancel_job

        try:
            job_id = cancel_job(run, running)
        except DsftError as error:
            if not running:  # unknown is not gone: the job may start yet
                raise
            print(f"warning: {error}", file=sys.stderr)
            job_id = None
        if job_id is not None and not running:
            return f"job {job_id} of {run.name} is out of the queue; `dsft resume {run.path}` submits it again"
    if not running:
        raise UserError(f"{run.path}: nothing to cancel, the run is {state}")
    asked = 0
    while (attempt := current_attempt(run)) != asked:  # the next one may begin in this very moment
        asked = attempt
        run.request_stop(asked, "cancel", now=now)
    how = "it is being killed" if now else "it saves after its current step and ends"
    return f"asked {run.name} to stop: {how}; `dsft resume {run.path}` continues it"
