"""The SLURM jobs of runs, as a login node sees them. Light: `dsft status` asks for a thousand runs in half a second."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.state import DIED, RunState, State, job_id
from slurm import client
from slurm.job import SCRIPT
from slurm.states import JobState
from trainer.failures import DsftError, UserError
from trainer.rundir import RunDirectory, read_lines

STATUS_SECONDS = 5.0  # how long `dsft status` waits for SLURM


@dataclass(frozen=True)
class Answer:
    """What SLURM said of the jobs of some runs, and of which it said nothing, and why."""

    jobs: Mapping[Path, client.Job] = field(default_factory=dict)
    unknown: Mapping[Path, str] = field(default_factory=dict)


def ask(job_ids: Mapping[Path, str], told: Collection[Path] = ()) -> Answer:
    """The job of each run in `job_ids` (path -> job id): one call of squeue, and at most one of sacct.

    The accounting is not asked for runs in `told`, whose own ledger says how they ended.
    """
    if not job_ids:
        return Answer()
    wanted = sorted(set(job_ids.values()))
    try:
        found = client.queued(wanted, STATUS_SECONDS)
    except DsftError as error:
        return Answer(unknown=dict.fromkeys(job_ids, str(error)))
    unknown: dict[Path, str] = {}
    in_queue = {base_id(job) for job in found.values()}
    missing = [path for path, number in job_ids.items() if path not in told and number not in in_queue]
    if missing:
        try:
            found |= client.accounted(sorted({job_ids[path] for path in missing}), STATUS_SECONDS)
        except DsftError as error:
            unknown = dict.fromkeys(missing, str(error))
    by_id: dict[str, list[client.Job]] = {}
    for job in found.values():
        by_id.setdefault(base_id(job), []).append(job)
    return Answer({path: current(by_id[i]) for path, i in job_ids.items() if i in by_id}, unknown)


def base_id(job: client.Job) -> str:
    """The job's id, of an array's the whole array's."""
    return job.job_id.split("_")[0]


def current(chain: Sequence[client.Job]) -> client.Job:
    """Of the jobs of an array, which run one after the other: the one that runs, else the next, else the last."""
    order: list[JobState] = ["running", "unknown", "pending"]
    for state in order:
        if (job := next((job for job in chain if job.state == state), None)) is not None:
            return job
    return chain[-1]


def with_job(ledger: RunState, job: client.Job | None) -> RunState:
    """The state of a run from its ledger and from what SLURM says of its job (None: nothing, which changes nothing)."""
    if job is None or ledger.state == "finished":
        return ledger
    reason = f"job {job.job_id}: {job.slurm_state}"
    if job.reason not in ("", "None"):
        reason += f" ({job.reason})"
    if ledger.state == "running":
        return ledger if job.slurm_state != "SUSPENDED" else replace(ledger, reason=reason)
    if ledger.reason == DIED and job.state not in ("pending", "running", "unknown"):
        return replace(ledger, reason=f"{ledger.reason}; {reason}")
    if ledger.state != "pending" and job.state != "pending":
        return ledger
    # a job that runs has yet to write its first line; one that ended has left no other account
    states: dict[JobState, State] = {"failed": "failed", "stopped": "stopped", "finished": "stopped"}
    return RunState(states.get(job.state, "pending"), reason)


def submitted_job(run: RunDirectory) -> str | None:
    """The id of the last job submitted for a run or study, also if its launch did not live to write it down.

    Raises SlurmUnavailable.
    """
    return client.of_script(run.path / SCRIPT) or job_id(read_lines(run.events_dir / "submission.jsonl"))


def waiting_job(run: RunDirectory) -> client.Job | None:
    """The run's last submitted job if it is in the queue (waits or runs). Raises SlurmUnavailable."""
    submitted = submitted_job(run)
    jobs = list(client.queued([submitted]).values()) if submitted else []
    # a run that was copied has the records of the other's job, on another cluster maybe the number of anybody's
    jobs = [job for job in jobs if os.path.realpath(job.folder or run.path) == os.path.realpath(run.path)]
    job = current(jobs) if jobs else None
    return job if job is not None and job.state in ("pending", "running") else None


@contextlib.contextmanager
def one_at_a_time(run: RunDirectory) -> Iterator[None]:
    """Let one launch at a time look for a job of this run, and submit one; storage without locks makes none wait."""
    run.events_dir.mkdir(exist_ok=True)
    with open(run.events_dir / "submission.jsonl", "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def refuse_second_job(run: RunDirectory) -> None:
    """Raise UserError while a job of this run is in the queue, SlurmUnavailable if SLURM does not answer."""
    if (job := waiting_job(run)) is not None:
        raise UserError(
            f"{run.path}: job {job.job_id} of this run is in the queue already ({job.slurm_state}); "
            f"`dsft resume --watch {run.path}` follows it, `dsft cancel` or `scancel {base_id(job)}` ends it"
        )


def cancel_job(run: RunDirectory, running: bool) -> str | None:
    """Take the run's job out of the queue, also one that has begun to start the run; its id, None if there is none.

    `running`: the run itself is to save and stop; only what waits of its job (an array: the rest of the chain) goes.
    """
    job = waiting_job(run)
    if job is None or (running and "_" not in job.job_id):
        return None
    client.cancel(base_id(job), pending=running)
    return base_id(job)
