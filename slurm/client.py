"""Calls of SLURM's commands. Every call has a time limit; "SLURM does not answer" is never taken for "not there"."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.states import JobState, job_state
from trainer.failures import EXIT_TEMPORARY, DsftError, UserError

QUERY_SECONDS = 10.0  # without a controller the commands themselves give up only after half a minute
SUBMIT_SECONDS = 60.0
_RELEASE_SECONDS, _RELEASE_PAUSE = 60.0, 1.0

# What the commands say when the controller or the accounting daemon is away
_NO_ANSWER = re.compile(
    r"unable to contact|timed out|connection refused|communication (connection )?failure|not responding|"
    r"unexpected message received|persistent connection|database connection|protocol authentication error|"
    r"in (backup|standby) mode|configuration source|connection reset|zero bytes were transmitted|munge",
    re.IGNORECASE,
)


class SlurmUnavailable(DsftError):
    """SLURM did not answer: nothing is known about what was asked."""

    exit_code = EXIT_TEMPORARY


class SlurmError(UserError):
    """SLURM answered, and refused."""


@dataclass(frozen=True)
class Job:
    """What SLURM knows of a job. `state` is dsft's word, `slurm_state` SLURM's own."""

    job_id: str
    state: JobState
    slurm_state: str
    reason: str = ""
    node_list: str = ""
    time_left: str = ""
    start: str = ""
    folder: str = ""  # where it was submitted to run


def submit(script: Path, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Submit a job script with `folder` as its working directory; returns the job id.

    Raises SlurmError with SLURM's words if it refuses, SlurmUnavailable if it does not answer: the job may then have
    been submitted all the same.
    """
    try:
        answer = _call(["sbatch", "--parsable", f"--chdir={folder}", str(script)], SUBMIT_SECONDS, environment)
    except SlurmUnavailable as error:
        raise SlurmUnavailable(
            f"{error}. The job may be in the queue all the same (`squeue --me`): then it is found, not submitted again"
        ) from None
    return answer.strip().splitlines()[-1].split(";")[0]  # "id[;cluster]"


def try_out(script: Path, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """`sbatch --test-only`: SLURM's estimate of when and where the job would start. Raises as `submit` does."""
    answer = _call(["sbatch", "--test-only", f"--chdir={folder}", str(script)], SUBMIT_SECONDS, environment, error=True)
    return answer.strip().removeprefix("sbatch: ")


def own_id() -> str:
    """The id of the job that this process runs in. Its number alone may mean the whole array that it is one of."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def job(job_id: str) -> Job | None:
    """One job, from the queue, else from the accounting; None if SLURM knows of none. Raises SlurmUnavailable."""
    return queued([job_id]).get(job_id) or accounted([job_id]).get(job_id)


def is_preempted(job_id: str, seconds: float = QUERY_SECONDS) -> bool:
    """Whether the running job has been told to make room for another. Raises SlurmUnavailable."""
    text = _call(["scontrol", "show", "job", "--oneliner", job_id], seconds)
    match = re.search(r" PreemptTime=(\S+)", text)
    return match is not None and match[1] not in ("None", "Unknown")


def cancel(job_id: str, signal: str | None = None, batch: bool = False, pending: bool = False) -> None:
    """Cancel a job or a step (``12.0``), or only send it a signal (`batch`: the batch script alone gets it).

    `pending`: only what still waits of it, as in an array of jobs.
    """
    options = [*([f"--signal={signal}"] if signal else []), *(["--batch"] if batch else [])]
    _call(["scancel", *options, *(["--state=PENDING"] if pending else []), job_id], QUERY_SECONDS)


def could_run(options: Sequence[str]) -> None:
    """Raise SlurmError if no job with these options of sbatch can ever run, SlurmUnavailable without an answer."""
    environment = submission_environment(())
    _call(["sbatch", "--test-only", "--wrap=true", *options], QUERY_SECONDS, environment, error=True)


def requeue_excluding(job_id: str, nodes: Sequence[str]) -> None:
    """Requeue a running job, to start again on other nodes than these. Raises SlurmUnavailable, SlurmError.

    The list can be changed only while the job does not run, hence the hold in between.
    """
    held = True
    try:
        try:
            _call(["scontrol", "requeuehold", job_id], QUERY_SECONDS)
        except SlurmError:  # without an answer it may be held all the same
            held = False
            raise
        _call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}"], QUERY_SECONDS)
    finally:
        if held:
            _release(job_id)


def _release(job_id: str) -> None:
    """A job that stays held never starts again: SLURM is asked as long as it leaves this process (KillWait)."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            _call(["scontrol", "release", job_id], QUERY_SECONDS)
            return
        except SlurmUnavailable as error:
            if time.monotonic() > deadline:
                raise SlurmUnavailable(
                    f"job {job_id} is requeued and held: `scontrol release {job_id}` ({error})"
                ) from error
            time.sleep(_RELEASE_PAUSE)


def queued(job_ids: Sequence[str], seconds: float | None = None) -> dict[str, Job]:
    """Those of the jobs that the queue knows, by one call; of an array each job (``7_2``). Raises SlurmUnavailable."""
    # %i would shorten an array to 7_[2-9]: -r prints one line for each of its jobs
    command = ["squeue", "--noheader", "-r", "--states=all", "--format=%i|%T|%r|%N|%L|%S|%Z"]
    try:
        text = _call([*command, f"--jobs={','.join(job_ids)}"], seconds or QUERY_SECONDS)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        if len(job_ids) == 1:
            return {}
        text = _call(command, seconds or QUERY_SECONDS)  # one that is unknown must not hide the others
    found = {}
    wanted = set(job_ids)
    for line in text.splitlines():
        job_id, state, reason, nodes, left, start, *folder = line.split("|", 6)
        job_id = job_id.strip()
        if not wanted.isdisjoint((job_id, job_id.split("_")[0])):
            found[job_id] = Job(job_id, job_state(state), state, reason, nodes, left, start, "".join(folder))
    return found


def of_script(script: Path) -> str | None:
    """The id of this user's last job in the queue that is of a script; None: there is none. Raises SlurmUnavailable."""
    text = _call(["squeue", "--me", "--noheader", "--sort=i", "--format=%F|%o"], QUERY_SECONDS)
    jobs = [line.partition("|")[::2] for line in text.splitlines() if line.endswith(f"/{script.name}")]
    return next((i.strip() for i, path in reversed(jobs) if os.path.realpath(path) == os.path.realpath(script)), None)


def accounted(job_ids: Sequence[str], seconds: float | None = None) -> dict[str, Job]:
    """Those of the jobs that the accounting knows, by one call; none without accounting. Raises SlurmUnavailable."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList,Start"]
    try:
        text = _call([*command, f"--jobs={','.join(job_ids)}"], seconds or QUERY_SECONDS)
    except SlurmError as error:
        if "disabled" in str(error):  # a site without accounting: the queue was all there is to ask
            return {}
        raise
    found = {}
    for line in text.splitlines():
        job_id, state, nodes, start = line.split("|")
        found[job_id] = Job(job_id, job_state(state), state, node_list=nodes, start=start)
    return found


def duration(text: str) -> float:
    """A time as SLURM prints it: ``2:03``, ``1-02:03:04``; infinity for ``UNLIMITED``, or where it is not known."""
    if not re.fullmatch(r"[\d:-]+", text):
        return math.inf
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return 86400 * int(days or 0) + total


def node_states(node_list: str, seconds: float | None = None) -> dict[str, str]:
    """Node -> SLURM's word for its state (``idle``, ``mixed``, ``down*``). Raises SlurmUnavailable, SlurmError."""
    text = _call(["sinfo", "--noheader", "--Node", f"--nodes={node_list}", "--format=%N|%T"], seconds or QUERY_SECONDS)
    return dict(line.strip().split("|", 1) for line in text.splitlines())


def _call(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, error: bool = False
) -> str:
    """Run a command of SLURM; returns its stdout (`error`: its stderr, where `--test-only` answers)."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
        )
    except FileNotFoundError:
        raise UserError(
            f"`{command[0]}` is not installed here: run dsft on a login node of a SLURM cluster, or choose another "
            "`cluster.backend`"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(
            f"`{command[0]}` has not answered for {seconds:.0f} s; see `scontrol ping` and try again"
        ) from None
    if done.returncode == 0:
        return done.stderr if error else done.stdout
    message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if _NO_ANSWER.search(message) or done.returncode < 0:
        raise SlurmUnavailable(f"`{command[0]}` got no answer from SLURM: {message}; try again later")
    raise SlurmError(f"SLURM refuses: {message}")


def submission_environment(options: Sequence[str]) -> dict[str, str]:
    """This process's environment for sbatch, which hands it on to the job.

    Without the SBATCH_* variables that would win over `options` of the job script, and without what an allocation in
    which this process may run says about itself.
    """
    hidden = {_VARIABLES.get(option, "SBATCH_" + option.upper().replace("-", "_")) for option in options}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }


# Options whose variable is not called after them ("INPUT ENVIRONMENT VARIABLES" of sbatch's manual page)
_VARIABLES = {
    "array": "SBATCH_ARRAY_INX",
    "mem": "SBATCH_MEM_PER_NODE",
    "switches": "SBATCH_REQ_SWITCH",
    "time": "SBATCH_TIMELIMIT",
}
