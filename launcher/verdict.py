"""What ended an attempt, and what to do about it: pure functions of a snapshot."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from launcher.hangs import Hang
from trainer.failures import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TEMPORARY,
    EXIT_TERMINATED,
    EXIT_USER,
    FailureClass,
)
from trainer.kernel_log import broken_device

Outcome = Literal["finished", "stopped", "failed"]
# The supervisor's own reasons to have the ranks save and end; another attempt follows at once
GROW, STRAGGLER = "grow", "straggler"
PLANNED_STOPS = frozenset({GROW, STRAGGLER})

# In place of an agent's exit code: the link to its node ended without a word
NODE_LOST = -1000

# Attempts in a row that may end no further than the best before them
MAX_WITHOUT_PROGRESS = 3
_FIRST_BACK_OFF_SECONDS = 5.0
_LONGEST_BACK_OFF_SECONDS = 300.0

_EXIT_OF_STOP = {
    "interrupt": EXIT_INTERRUPTED,
    "terminate": EXIT_TERMINATED,
    "cancel": EXIT_TERMINATED,
    "preemption": EXIT_TEMPORARY,
    "time_limit": EXIT_TEMPORARY,
}
_NEVER_RETRIED: frozenset[FailureClass] = frozenset({"user", "data"})
# The same again at the same step shows that a retry cannot help
_DETERMINISTIC: frozenset[FailureClass] = frozenset({"unknown", "numeric", "out_of_memory"})
_MEMORY_ADVICE = "lower training.micro_batch_size or data.sequence_length, or set deepspeed.offload_optimizer"
_TEMPORARY: frozenset[FailureClass] = frozenset(
    {"communication", "node", "storage", "hang", "preemption", "time_limit"}
)


@dataclass(frozen=True)
class Snapshot:
    """Everything known about an attempt whose agents have all ended."""

    agents: dict[str, int]  # node -> exit code of its agent; negative: killed by that signal, or NODE_LOST
    reports: Sequence[dict[str, Any]] = ()  # attempts/NNNN/agents/*.json
    records: Sequence[dict[str, Any]] = ()  # attempts/NNNN/failures/*.json
    log_tails: dict[int, str] = field(default_factory=dict)  # rank -> the end of its log, for the message only
    step: int | None = None  # last completed optimizer step that was logged
    stop_reason: str | None = None  # of the stop request, if there was one
    trained: bool = False  # the last step was done in this attempt
    lease_lost: str = ""  # how, if it was
    hang: Hang | None = None


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended; for a failure its class, the first rank to fail and those it took with it."""

    outcome: Outcome
    failure_class: FailureClass | None = None
    rank: int | None = None
    node: str | None = None
    step: int | None = None
    message: str = ""
    traceback: str | None = None
    victims: tuple[int, ...] = ()
    evidence: tuple[str, ...] = ()
    unfit: bool = False  # the node itself is broken: this one failure is enough to leave it out

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["class"] = value.pop("failure_class")
        return value

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` has written."""
        known: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        known["failure_class"] = known.pop("class", None)
        return Verdict(**{name: known[name] for name in (f.name for f in fields(Verdict)) if name in known})


@dataclass(frozen=True)
class _Candidate:
    """A rank or agent that ended badly by itself."""

    failure_class: FailureClass
    rank: int | None
    node: str | None
    step: int | None
    message: str
    time: float
    traceback: str | None = None
    told: bool = True  # it left a record of its own
    evidence: tuple[str, ...] = ()
    unfit: bool = False


def classify(snapshot: Snapshot) -> Verdict:
    """The verdict on an attempt. The cause is the earliest failure that is not just the echo of another's."""
    if snapshot.lease_lost:
        return Verdict("stopped", step=snapshot.step, message=snapshot.lease_lost)
    candidates = _candidates(snapshot)
    if snapshot.trained and snapshot.agents and not any(snapshot.agents.values()):
        return Verdict("finished", step=snapshot.step)  # also where a stop request came too late
    if snapshot.stop_reason is not None and not any(c.failure_class in _NEVER_RETRIED for c in candidates):
        return Verdict("stopped", step=snapshot.step, message=f"stopped on request ({snapshot.stop_reason})")
    if snapshot.hang is not None and not any(candidate.told for candidate in candidates):
        return _verdict(_with_kernel(_of_hang(snapshot.hang), snapshot), snapshot, set(snapshot.hang.others))
    if not candidates:
        codes = ", ".join(f"{node}: {code}" for node, code in snapshot.agents.items()) or "none"
        message = f"nobody reported an error, nor that the training is done (exit codes of the agents: {codes})"
        return Verdict("failed", "unknown", step=snapshot.step, message=message)
    cause = _with_kernel(min(candidates, key=lambda candidate: (_echo(candidate), candidate.time)), snapshot)
    others = {c.rank for c in candidates if c.rank is not None and c.rank != cause.rank}
    killed = {int(rank) for report in snapshot.reports for rank in report.get("killed_ranks", ())}
    return _verdict(cause, snapshot, others | killed)


def _verdict(cause: _Candidate, snapshot: Snapshot, victims: set[int]) -> Verdict:
    return Verdict(
        outcome="failed",
        failure_class=cause.failure_class,
        rank=cause.rank,
        node=cause.node,
        step=cause.step if cause.step is not None else snapshot.step,
        message=cause.message,
        traceback=cause.traceback,
        victims=tuple(sorted(victims)),
        evidence=cause.evidence,
        unfit=cause.unfit,
    )


def _with_kernel(cause: _Candidate, snapshot: Snapshot) -> _Candidate:
    """`cause` with what the kernel of its node said meanwhile; a GPU that broke makes it the node's failure.

    Where peers lost connections alone, or nobody gets on, the node of a broken GPU is the cause.
    """
    said = {report["node"]: report.get("kernel") or [] for report in snapshot.reports}
    broken = {node: line for node, lines in said.items() if (line := broken_device(lines))}
    node = cause.node
    if node not in broken and cause.failure_class in ("communication", "hang"):
        node = next(iter(broken), node)
    told = said if node is None else [node]
    evidence = (*cause.evidence, *(f"kernel of {name}: {line}" for name in told for line in said.get(name, ())))
    if node not in broken or cause.failure_class in _NEVER_RETRIED:
        return replace(cause, evidence=evidence)
    message = f"a GPU of {node} is broken ({broken[node]}); {cause.message}"
    rank = cause.rank if node == cause.node else None
    return replace(cause, failure_class="node", node=node, rank=rank, message=message, evidence=evidence, unfit=True)


def _of_hang(hang: Hang) -> _Candidate:
    rank = min(hang.ranks, default=None)
    return _Candidate("hang", rank, hang.node, hang.step, hang.message, 0.0, hang.stack, evidence=hang.evidence)


def _echo(candidate: _Candidate) -> int:
    """0 for what can be a cause; more for what usually follows from another's failure."""
    if candidate.failure_class == "communication":
        return 2  # a peer's connection closed: true of every rank that outlives the first
    return 1 if not candidate.told and "SIGABRT" in candidate.message else 0  # libraries abort when peers are gone


def _candidates(snapshot: Snapshot) -> list[_Candidate]:
    found = [_from_record(record) for record in snapshot.records]
    told = {candidate.rank for candidate in found}
    for report in snapshot.reports:
        for name, code in report.get("exit_codes", {}).items():
            rank = int(name)
            if code != 0 and rank not in told and rank not in report.get("killed_ranks", ()):
                found.append(_from_exit(snapshot, report, rank, code))
        if report.get("class"):
            own_word = _of_agent(report["node"], report["class"], f"agent: {report['message']}", report["time"])
            found.append(replace(own_word, unfit=bool(report.get("unfit"))))
    reported = {report["node"] for report in snapshot.reports}
    for node, code in snapshot.agents.items():
        if code == NODE_LOST:  # whatever it managed to report
            message = f"node {node} is gone: its processes or its network stopped without a word"
            found.append(_of_agent(node, "node", message, 0.0))
        elif code != 0 and node not in reported:
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            found.append(_of_agent(node, "node", f"the agent on {node} {how} and left no report", 0.0))
    return found


def _from_record(record: dict[str, Any]) -> _Candidate:
    failure_class = record.get("class")
    return _Candidate(
        failure_class=cast(FailureClass, failure_class) if failure_class in get_args(FailureClass) else "unknown",
        rank=record["rank"],
        node=record.get("node"),
        step=record.get("step"),
        message=str(record.get("message", "")),
        time=float(record["time"]),
        traceback=record.get("traceback"),
        unfit=bool(record.get("unfit")),
    )


def _from_exit(snapshot: Snapshot, report: dict[str, Any], rank: int, code: int) -> _Candidate:
    """A rank that ended without a word: by a signal, or by an exit inside a library."""
    failure_class: FailureClass = "unknown"
    evidence: tuple[str, ...] = ()
    tail = snapshot.log_tails.get(rank, "").strip()
    if code == -signal.SIGKILL and (kills := report.get("oom_kills")):
        failure_class = "out_of_memory"
        evidence = (f"the kernel killed {kills} process(es) for memory on {report['node']} during this attempt",)
        message = f"rank {rank} was killed by the kernel: the memory of {report['node']}, or of the job there, was full"
    elif code < 0:
        message = f"rank {rank} was killed by {_signal_name(-code)}"
        if -code == signal.SIGBUS:
            message += "; /dev/shm or another memory-mapped file system may be full"
    else:
        message = f"rank {rank} ended with exit code {code} and left no record"
    if tail:
        message += f"; its last output: {tail}"
    ended = float(report.get("ended", {}).get(str(rank), report["time"]))
    return _Candidate(failure_class, rank, report["node"], None, message, ended, told=False, evidence=evidence)


def _of_agent(node: str, failure_class: FailureClass, message: str, time: float) -> _Candidate:
    return _Candidate(failure_class, None, node, None, message, time, told=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Attempt:
    """A past attempt as `decide` sees it. `progress`: newest published checkpoint's step and last logged step;
    `relieved`: those after it take less memory."""

    verdict: Verdict
    progress: tuple[int, int]
    relieved: bool = False


@dataclass(frozen=True)
class Action:
    """What the supervisor does next."""

    kind: Literal["done", "retry", "stop"]
    exit_code: int = EXIT_DONE
    delay_seconds: float = 0.0
    reason: str = ""
    requeue: bool = False  # the scheduler is to run this launch again


def record_of(attempt: Attempt, action: Action, time: float) -> dict[str, Any]:
    """`verdict.json`. time: unix seconds."""
    return attempt.verdict.to_json() | {
        "action": action.kind,
        "reason": action.reason,
        "delay_seconds": action.delay_seconds,
        "requeue": action.requeue,
        "progress": list(attempt.progress),
        "exit_code": action.exit_code,
        "time": time,
    }


def decide(history: Sequence[Attempt], max_restarts: int, stop_reason: str | None = None) -> Action:
    """The action after the last attempt of `history`: those of this launch, and of the job before its requeues."""
    verdict = history[-1].verdict
    if verdict.outcome == "finished":
        return Action("done")
    if verdict.outcome == "stopped" and stop_reason in PLANNED_STOPS:
        return Action("retry", reason="nodes that were lost are back")
    if verdict.outcome == "stopped":
        code = _EXIT_OF_STOP.get(stop_reason or "", EXIT_TEMPORARY)
        requeue = stop_reason in ("preemption", "time_limit")
        return Action("stop", code, reason=verdict.message, requeue=requeue)
    assert verdict.failure_class is not None
    if verdict.failure_class in _NEVER_RETRIED:
        return Action("stop", EXIT_USER, reason=f"a {verdict.failure_class} error is never retried")
    code = EXIT_TEMPORARY if verdict.failure_class in _TEMPORARY else EXIT_FAILED
    failures = [attempt for attempt in history if attempt.verdict.outcome == "failed"]
    if verdict.failure_class in _DETERMINISTIC and len(failures) > 1 and _same(*failures[-2:]):
        advice = f": {_MEMORY_ADVICE}" if verdict.failure_class == "out_of_memory" else ""
        return Action("stop", code, reason=f"the same failure twice at the same step{advice}")
    if len(failures) > max_restarts:
        return Action("stop", code, reason=f"resilience.max_restarts ({max_restarts}) is used up")
    stuck = _without_progress(failures)
    if stuck >= MAX_WITHOUT_PROGRESS:
        return Action("stop", code, reason=f"{stuck} attempts in a row without progress")
    waits = stuck > 0 and not history[-1].relieved  # there is nothing to wait for where the next one differs
    delay = min(_FIRST_BACK_OFF_SECONDS * 2.0 ** (stuck - 1), _LONGEST_BACK_OFF_SECONDS) if waits else 0.0
    return Action("retry", delay_seconds=delay, reason=f"restart {len(failures)} of {max_restarts}")


def _same(before: Attempt, last: Attempt) -> bool:
    one, other = before.verdict, last.verdict
    if one.failure_class == "out_of_memory":  # its message tells how much was free
        return (one.failure_class, one.step) == (other.failure_class, other.step) and not before.relieved
    return (one.failure_class, one.message, one.step) == (other.failure_class, other.message, other.step)


def _without_progress(failures: Sequence[Attempt]) -> int:
    """How many of the last attempts got no further (neither in checkpoints nor in steps) than those before them."""
    count = 0
    for index in range(len(failures) - 1, 0, -1):
        best = [max(attempt.progress[kind] for attempt in failures[:index]) for kind in (0, 1)]
        if any(now > before for now, before in zip(failures[index].progress, best, strict=True)):
            break
        count += 1
    return count
