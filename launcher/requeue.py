"""One ladder over all starts of a SLURM job: what counts again after a requeue, and on which nodes it comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from launcher.backends.slurm import SlurmBackend
from launcher.nodes import bad_nodes
from launcher.state import FAILURE_KEYS, ledger
from launcher.supervisor import Supervisor, progress
from launcher.verdict import Action, Attempt, Verdict, decide, record_of
from slurm import client
from slurm.hostlist import expand
from trainer.config.schema import SlurmCluster
from trainer.failures import EXIT_FAILED, EXIT_TEMPORARY, DsftError, node_name
from trainer.rundir import Json, RunDirectory, read_json, read_lines, write_json

_ASK_SECONDS = 2.0  # after TERM, everything is killed soon: the verdict cannot wait for long


class GivenUpError(DsftError):
    """The job, or an earlier one of its chain, is at the end of the ladder."""


def continue_job(supervisor: Supervisor, backend: SlurmBackend) -> None:
    """Give the supervisor what earlier starts of this job went through, and the backend the nodes that failed lately.

    Raises GivenUpError if the start before has used up what restarts there are, or if one of a chain of jobs has
    stopped the run for good.
    """
    run = supervisor.run
    job_id = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
    supervisor.origin = {"job_id": job_id, "head": node_name()}
    supervisor.exhausted = backend.exhausted
    supervisor.explain = _explain
    is_chain = "SLURM_ARRAY_JOB_ID" in os.environ
    if is_chain or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:  # else a person has started it
        supervisor.history = attempts_of(run, job_id, time.time(), supervisor.resilience.max_restarts)
        last = run.verdicts()[-1:] if supervisor.history else []
        if last and _gave_up(last[0]):
            if is_chain:
                raise GivenUpError(
                    f"an earlier job of this chain has given up: {last[0]['reason']} ({last[0]['message']})"
                )
            supervisor.history = []  # a person has requeued it
    backend.pool.remember(ledger(run), time.time(), supervisor.resilience.bad_node_hours)


def attempts_of(run: RunDirectory, job_id: str, now: float, max_restarts: int) -> list[Attempt]:
    """The attempts that earlier starts of this very job have made; one that left no verdict gets its verdict here.

    The caller holds the lock of the run. now: unix seconds. Raises GivenUpError if such a one was the last allowed.
    """
    ledger = [e for e in read_lines(run.events_dir / "supervisor.jsonl") if e["event"] == "attempt"]
    mine = [event for event in ledger if event.get("job_id") == job_id]
    history: list[Attempt] = []
    given_up = False
    for event in mine:
        attempt = int(event["attempt"])
        if given_up:  # and a person has requeued the job
            history.clear()
        value = read_json(run.verdict_path(attempt))
        if value is None:
            step = progress(run)[1] or None
            if (request := run.stop_request(attempt)) is not None:  # it was stopping, and took longer than it was given
                message = f"stopped on request ({request.get('reason', 'cancel')})"
                verdict = Verdict("stopped", message=message, step=step)
            else:
                head = event.get("head")
                message = f"the supervisor on {head} was killed, or its node went down: it left no verdict"
                verdict = Verdict("failed", "node", message=message, step=step)
            made = Attempt(verdict, progress(run))
            action = Action("retry", EXIT_TEMPORARY, reason="the job was requeued", requeue=True)
            if verdict.outcome == "failed":
                decided = decide([*history, made], max_restarts)
                action = decided if decided.kind == "stop" else action
            value = record_of(made, action, now)
            write_json(run.verdict_path(attempt), value, indent=1)
            if verdict.outcome == "failed":
                fields = {key: value[key] for key in FAILURE_KEYS}
                run.event_writer("supervisor").write("failure", attempt=attempt, **fields)
            if action.kind == "stop":
                raise GivenUpError(f"{action.reason} ({verdict.message})")
        given_up = _gave_up(value)
        reached = value.get("progress") or (0, 0)
        history.append(Attempt(Verdict.from_json(value), (int(reached[0]), int(reached[1]))))
    return history


def _gave_up(verdict: Json) -> bool:
    """Whether a verdict stopped the run for good: nobody but a person starts it again."""
    return verdict["outcome"] == "failed" and verdict["action"] == "stop" and not verdict.get("requeue")


def _explain(reason: str) -> str:
    """TERM comes with a preemption and with scancel; where `preempt_send_user_signal` is set, so does USR1."""
    if reason in ("time_limit", "terminate"):
        with contextlib.suppress(DsftError):
            if client.is_preempted(client.own_id(), _ASK_SECONDS):
                return "preemption"
    return reason


def exit_code(action: Action, run: RunDirectory, cluster: SlurmCluster, hours: float) -> int:
    """What the job's script is to end with; 75 has it requeue the job. Nodes that failed are excluded before."""
    if not action.requeue:
        # "worth another try" is for people: the ladder of this job is at its end
        return EXIT_FAILED if action.exit_code == EXIT_TEMPORARY else action.exit_code
    nodes = bad_nodes(ledger(run), time.time(), hours)
    if nodes and cluster.requeue and os.environ.get("DSFT_REQUEUE") != "0" and "SLURM_ARRAY_JOB_ID" not in os.environ:
        _requeue_without(nodes, cluster)
    return EXIT_TEMPORARY


def _requeue_without(nodes: Sequence[str], cluster: SlurmCluster) -> None:
    """Requeue this process's own job so that it starts again on other nodes, if there are enough of them."""
    options = [
        f"--nodes={cluster.fewest_nodes}",
        *([f"--constraint={cluster.constraint}"] if cluster.constraint else []),
    ]
    for option in ("partition", "account"):
        if name := os.environ.get(f"SLURM_JOB_{option.upper()}"):
            options.append(f"--{option}={name}")
    for number in (signal.SIGTERM, signal.SIGCONT):  # SLURM's, as soon as the job is requeued
        signal.signal(number, signal.SIG_IGN)
    try:
        excluded = sorted({*nodes, *(expand(cluster.exclude) if cluster.exclude else ())})
        client.could_run([*options, f"--exclude={','.join(excluded)}"])
        client.requeue_excluding(os.environ["SLURM_JOB_ID"], excluded)
        print(f"requeued without {', '.join(nodes)}, which failed lately", flush=True)
    except (DsftError, ValueError) as error:  # then the job's script requeues it as it is
        print(f"warning: nodes that failed cannot be excluded: {error}", file=sys.stderr, flush=True)
