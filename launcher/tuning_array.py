"""`tune.array`: what is missing of a study as one array of jobs, of which each sees one trial through, and ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher.backends.slurm import in_allocation, submit
from launcher.facts import gather_facts
from launcher.gate import checked
from launcher.jobs import one_at_a_time, submitted_job
from launcher.plan import make_plan
from launcher.preflight import preflight
from launcher.tuning import Search, Study
from launcher.tuning_report import UNDER_WAY, summary
from slurm import client
from slurm.job import Job
from trainer.config.loading import redacted
from trainer.config.schema import SlurmCluster
from trainer.processes import added_root
from trainer.rundir import RunDirectory, write_json

_ASK_SECONDS = 5.0  # between two questions to SLURM


def is_task(search: Search) -> bool:
    """Whether this process is to see one trial through, as a job of the array."""
    return search.settings.array and in_allocation() and "SLURM_ARRAY_TASK_ID" in os.environ


def ensure_submitted(study: Study, say: Callable[[str], None]) -> str:
    """The id of the study's array that is in the queue, or of a new one with a job for each trial that is missing.

    Raises:
        UserError: it cannot work.
        SlurmUnavailable: SLURM does not answer.
    """
    search, folder = study.search, RunDirectory(study.search.folder)
    cluster = search.config.cluster
    assert isinstance(cluster, SlurmCluster)
    with one_at_a_time(folder):
        number = submitted_job(folder)
        there = in_queue(number) if number else []
        if number and there:
            running = sum(job.state == "running" for job in there)
            say(
                f"array {number} of this study is in the queue: {running} of its jobs running, {len(there) - running} "
                f"waiting; `scancel {number}` ends it, `dsft tune --watch` follows it"
            )
            return number
        job = _job(search, folder, search.count - _ended(study), cluster)
        _check(search, Path(job.command[-1]))
        number = submit(job, cluster)
        folder.event_writer("submission").write("submitted", job_id=number, backend="slurm")
    say(f"submitted array {number}: {job.array}, {job.script_path}, output in {job.log_path}.*")
    return number


def _ended(study: Study) -> int:
    return sum(trial["state"] not in UNDER_WAY for trial in summary(study)["trials"])


def _job(search: Search, folder: RunDirectory, missing: int, cluster: SlurmCluster) -> Job:
    """Its jobs read the config as it is now, not what it may be when they start."""
    root, python = added_root(), cluster.python or sys.executable
    command = [python, "-P", "-m", "launcher", "tune", str(folder.path / "array.json")]
    array = f"0-{missing - 1}%{search.settings.parallel}"
    return Job(search.config.name, folder.path, command, None if root is None else str(root), array)


def _check(search: Search, path: Path) -> None:
    """Write the config of the jobs; refuse what a launch of a trial would refuse."""
    config = search.config
    facts = gather_facts(config)
    plan = make_plan(config, facts)
    preflight(config, plan, facts)
    write_json(path, redacted(config), indent=2)
    for warning in (*plan.warnings, *checked(path)):
        print(f"warning: {warning}", file=sys.stderr)


def in_queue(number: str) -> list[client.Job]:
    """The jobs of an array that run or wait. Raises SlurmUnavailable."""
    return [job for job in client.queued([number]).values() if job.state not in ("finished", "failed", "stopped")]


def follow(study: Study, number: str, say: Callable[[str], None]) -> bool:
    """Tell what becomes of the trials until the array has left the queue; whether it has: Ctrl-C leaves it alone."""
    told: dict[int, str] = {}
    try:
        while True:
            there = True
            with contextlib.suppress(client.SlurmUnavailable):
                there = bool(in_queue(number))
            for trial in summary(study)["trials"]:
                value = "" if trial["value"] is None else f", {study.search.metric} {trial['value']:.5g}"
                words = f"{trial['state']}{value}"
                if told.get(trial["number"]) != words:
                    told[trial["number"]] = words
                    say(f"trial {trial['number']}: {words}")
            if not there:
                return True
            time.sleep(_ASK_SECONDS)
    except KeyboardInterrupt:
        say(f"array {number} goes on without this terminal: `dsft tune` tells how, `scancel {number}` ends it")
        return False


def drop_waiting() -> None:
    """Take what still waits of this process's own array out of the queue."""
    with contextlib.suppress(client.SlurmUnavailable, client.SlurmError):
        client.cancel(os.environ["SLURM_ARRAY_JOB_ID"], pending=True)
