"""`dsft launch --watch` on SLURM: the job in the queue, then the run as a local launch shows it, over all requeues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from launcher import jobs
from launcher.state import CUT_SHORT, DIED, ledger, run_state
from launcher.watch import Watch
from slurm.client import Job
from trainer.failures import EXIT_DONE, EXIT_FAILED, EXIT_TEMPORARY
from trainer.rundir import Json, RunDirectory

_TICK_SECONDS = 0.2
# Between two questions to SLURM: at first, and when nothing has changed for a while, for which a controller has to be
# spared; that the run has begun shows in its ledger
_ASK_SECONDS, _ASK_LATER_SECONDS = 5.0, 30.0
_A_WHILE_SECONDS = 60.0


def follow(run: RunDirectory, job_id: str, stream: TextIO) -> int:
    """Show how the job and the run go until both have ended; the run's exit code. Ctrl-C leaves the job alone.

    "SLURM does not answer" and "the job is not known any more" end nothing that the ledger does not say has ended.
    """
    watch = Watch(run, stream)
    try:
        return _follow(run, job_id, watch)
    except KeyboardInterrupt:
        watch.say(
            f"job {job_id} goes on without this terminal: `dsft status {run.path}` tells how, `dsft resume --watch "
            f"{run.path}` comes back to this view, `dsft cancel {run.path}` saves and stops it"
        )
        return EXIT_DONE
    finally:
        watch.close()


def _follow(run: RunDirectory, job_id: str, watch: Watch) -> int:
    said = ""
    seen, changed = "", 0.0
    next_ask = 0.0
    before = len(_ends(ledger(run)))  # those of earlier jobs: by number, since clocks of other machines may be off
    while True:
        watch.tick()
        time.sleep(_TICK_SECONDS)
        if time.monotonic() < next_ask:
            continue
        events = ledger(run)
        state = run_state(run, events)
        if state.state != seen:
            seen, changed = state.state, time.monotonic()
        waits = state.state == "running" or time.monotonic() - changed > _A_WHILE_SECONDS
        next_ask = time.monotonic() + (_ASK_LATER_SECONDS if waits else _ASK_SECONDS)
        answer = jobs.ask({run.path: job_id})
        job = answer.jobs.get(run.path)
        if (text := answer.unknown.get(run.path) or (_words(job) if job else "")) and text != said:
            watch.say(text)
            said = text
        if state.state == "running" or run.path in answer.unknown or (job and job.state in ("pending", "running")):
            continue
        ends = _ends(events)
        if len(ends) > before and state.reason not in (DIED, CUT_SHORT):
            return int(ends[-1].get("exit_code", EXIT_FAILED))
        if state.state == "finished":
            return EXIT_DONE
        why = state.reason or f"see {run.path / 'job.log'}"
        watch.say(f"job {job_id} {'has ended' if job else 'is not known to SLURM any more'}: {why}")
        return EXIT_TEMPORARY if job and job.state == "stopped" else EXIT_FAILED


def _ends(events: Sequence[Json]) -> list[Json]:
    return [event for event in events if event["event"] in ("finished", "failed", "stopped")]


def _words(job: Job) -> str:
    reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
    nodes = f" on {job.node_list}" if job.state == "running" and job.node_list else ""
    return f"job {job.job_id}: {job.slurm_state.lower()}{reason}{nodes}"
