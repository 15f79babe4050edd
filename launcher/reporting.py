"""How runs are doing, as JSON and as a line for each: `dsft status`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.goodput import Span, account, timeline
from launcher.registry import label
from launcher.state import DIED, RunState, job_id, ledger, run_state
from launcher.watch import Progress, duration, epochs_of, number
from trainer.failures import DsftError
from trainer.rundir import Json, RunDirectory, read_lines

if TYPE_CHECKING:
    from slurm import client

_NODES_SECONDS = 5.0


def status(run: RunDirectory) -> Json:
    """State, position, rates and goodput; of a run in a SLURM job, also the states of its nodes."""
    value = _statuses([_read(run)])[0]
    value["goodput"] = account(time_line(run, value["state"], run.merged_events()))
    job = value["job"]
    if job is not None and job["nodes"]:
        from slurm import client

        with contextlib.suppress(DsftError):
            states = client.node_states(",".join(job["nodes"]), _NODES_SECONDS)
            job["nodes"] = {name: states.get(name) for name in job["nodes"]}
    return value


def statuses(runs: Sequence[RunDirectory]) -> list[Json]:
    """The status of each run, without reading the whole past of any; SLURM is asked once for all of them.

    If SLURM does not answer, states are those of the ledgers, and `unknown` says what was not to be learned. A run
    whose records cannot be read is left out, with a warning.
    """
    known = []
    for run in runs:
        try:
            known.append(_read(run))
        except (OSError, ValueError) as error:
            print(f"warning: {run.path}: {error}", file=sys.stderr)
    return _statuses(known)


Known = tuple[RunDirectory, list[Json], RunState]  # and its ledger


def _read(run: RunDirectory) -> Known:
    events = ledger(run)
    return run, events, run_state(run, events)


def _statuses(known: Sequence[Known]) -> list[Json]:
    jobs, unknown = _jobs(known)
    return [_status(*one, jobs.get(one[0].path)) | {"unknown": unknown.get(one[0].path)} for one in known]


def _jobs(known: Sequence[Known]) -> tuple[Mapping[Path, client.Job], Mapping[Path, str]]:
    """The jobs of runs that may have one, and of those without an answer, why."""
    has_job = [
        (run.path, number, state)
        for run, events, state in known
        if state.state != "finished" and (number := job_id(events))
    ]
    if not has_job:
        return {}, {}  # the import is slow for those who have no SLURM
    from launcher import jobs

    told = {path for path, _, state in has_job if state.state != "pending" and state.reason != DIED}
    answer = jobs.ask({path: number for path, number, _ in has_job}, told)
    return answer.jobs, answer.unknown


def _status(run: RunDirectory, events: Sequence[Json], state: RunState, job: client.Job | None) -> Json:
    if job is not None:
        from launcher.jobs import with_job

        state = with_job(state, job)
    running = state.state == "running"
    progress = Progress(epochs_of(run) if running else None)
    with contextlib.suppress(OSError):  # storage away for a moment
        for line in run.last_steps(20 if running else 1):
            progress.add(line)
    last = progress.last or {}
    return {
        "run": str(run.path),
        "name": run.name,
        "state": state.state,
        "reason": state.reason,
        "node": state.holder.node if state.holder else None,
        "job": job and _describe_job(job),
        "attempt": max((int(event["attempt"]) for event in events if "attempt" in event), default=0),
        "restarts": _restarts(events),
        "step": last.get("step", 0),
        "total_steps": last.get("total_steps"),
        "loss": last.get("loss"),
        "eta_seconds": progress.eta_seconds() if running else None,
        "last_checkpoint": _last_checkpoint(run),
    }


def _describe_job(job: client.Job) -> Json:
    from slurm.hostlist import expand

    nodes: dict[str, str | None] = {}
    with contextlib.suppress(ValueError):  # "None assigned", and whatever else a site's squeue may say
        nodes = dict.fromkeys(expand(job.node_list) if job.state == "running" else ())
    return {
        "id": job.job_id,
        "state": job.slurm_state,
        "reason": job.reason,
        "time_left": job.time_left,
        "nodes": nodes,
    }


def _restarts(events: Sequence[Json]) -> int:
    """Attempts that went on with what another had begun, in the same job, after a requeue or by hand."""
    return max(0, sum(1 for event in events if event["event"] == "attempt") - 1)


def _last_checkpoint(run: RunDirectory) -> int | None:
    """The step of the newest checkpoint that is whole."""
    try:
        names = os.listdir(run.checkpoints_dir)
    except OSError:
        return None
    steps = sorted((name for name in names if name.removeprefix("step-").isdecimal()), reverse=True)
    whole = (name for name in steps if os.path.exists(f"{run.checkpoints_dir}/{name}/manifest.json"))
    return next((int(name.removeprefix("step-")) for name in whole), None)


def time_line(run: RunDirectory, state: str, events: Sequence[Json]) -> list[Span]:
    """Where the time of a run went; `events` are the merged ledger. Reads all metrics."""
    now = time.time() if state in ("running", "pending") else None
    return timeline(events, read_lines(run.metrics_path), run.verdicts(), now)


def render_status(value: Json, name: str | None = None) -> str:
    """A line about a run, which begins with its label unless `name` is given."""
    total = f"/{value['total_steps']}" if value["total_steps"] else ""
    parts = [f"{name or label(Path(value['run']))}: {value['state']}", f"step {value['step']}{total}"]
    if value["loss"] is not None:
        parts.append(f"loss {number(value['loss'])}")
    if value["eta_seconds"] is not None:
        parts.append(f"ETA {duration(value['eta_seconds'])}")
    if value["last_checkpoint"] is not None:
        parts.append(f"last checkpoint {value['last_checkpoint']}")
    if value.get("goodput") and value["goodput"]["ettr"] is not None:
        parts.append(f"ETTR {100 * value['goodput']['ettr']:.0f} %")
    if value["restarts"]:
        parts.append(f"restarts {value['restarts']}")
    if (job := value["job"]) is not None and job["nodes"]:
        parts.append(f"job {job['id']}, {job['time_left']} left, on {_nodes(job['nodes'])}")
    elif value["node"]:
        parts.append(f"on {value['node']}")
    text = ", ".join(parts)
    reasons = [reason for reason in (value["reason"], value["unknown"]) if reason]
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _nodes(states: Mapping[str, str | None]) -> str:
    """The nodes; their states where they are not all in use as they should be."""
    fine = (None, "allocated", "mixed", "idle", "completing")
    shown = [name if state in fine else f"{name} ({state})" for name, state in states.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
