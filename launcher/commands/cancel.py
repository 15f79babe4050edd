"""`dsft cancel RUN`: ask a run to save and stop."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--now", action="store_true", help="without a last checkpoint")


def run(options: argparse.Namespace) -> int:
    """Leave the stop request where the ranks and the supervisor look; it does not wait for them."""
    from launcher.registry import find_run
    from launcher.state import current_attempt, run_state
    from trainer.failures import DsftError, UserError

    found = find_run(options.run)
    state = run_state(found).state
    running = state == "running"
    if state != "finished" and (found.events_dir / "submission.jsonl").exists():
        from launcher.jobs import cancel_job

        try:
            job_id = cancel_job(found, running)
        except DsftError as error:
            if not running:  # unknown is not gone: the job may start yet
                raise
            print(f"warning: {error}", file=sys.stderr)
            job_id = None
        if job_id is not None and not running:
            print(f"job {job_id} of {found.name} is out of the queue; `dsft resume {found.path}` submits it again")
            return 0
    if not running:
        raise UserError(f"{found.path}: nothing to cancel, the run is {state}")
    asked = 0
    while (attempt := current_attempt(found)) != asked:  # the next one may begin in this very moment
        asked = attempt
        found.request_stop(asked, "cancel", now=options.now)
    how = "it is being killed" if options.now else "it saves after its current step and ends"
    print(f"asked {found.name} to stop: {how}; `dsft resume {found.path}` continues it")
    return 0
