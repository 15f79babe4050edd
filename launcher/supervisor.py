"""Runs the attempts of one run until it is done, stopped, or not worth another: the only place that acts."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launcher.gate import CheckProcess
from launcher.hangs import with_stack
from launcher.heartbeats import HeartbeatWatch
from launcher.membership import Membership
from launcher.state import FAILURE_KEYS
from launcher.stragglers import Straggler
from launcher.verdict import (
    GROW,
    PLANNED_STOPS,
    STRAGGLER,
    Action,
    Attempt,
    Snapshot,
    Verdict,
    classify,
    decide,
    record_of,
)
from trainer.config.schema import ResilienceConfig
from trainer.failures import EXIT_TEMPORARY, DsftError
from trainer.lease import Lease
from trainer.retry import retried
from trainer.rundir import EventWriter, RunDirectory, read_json, wall_time, write_json

_POLL_SECONDS = 0.05
_FILE_POLL_SECONDS = 0.5  # how often shared storage is asked for a stop request
_STACKS_SECONDS = 5.0
_TAIL_BYTES = 2000
_TAIL_LINES = 3


class AttemptHandle(Protocol):
    """A started attempt on some backend."""

    def release(self) -> None:
        """Let the agents, which were started ahead, start their ranks."""

    def ask_for_stacks(self) -> None:
        """Have every rank write the Python stacks of its threads into the attempt's folder, soon."""

    def poll(self) -> dict[str, int] | None:
        """Node -> exit code of its agent once all agents have ended, else None."""

    def is_failing(self) -> bool:
        """Whether an agent has failed or a node is gone, while others may have to be ended yet."""

    def kill(self) -> list[int]:
        """Leave nothing of the attempt running; returns what would not die. May be called at any time."""


class Backend(Protocol):
    """Where attempts run."""

    def start(self, attempt: int) -> AttemptHandle:
        """Start the agents of `attempt`; no rank starts before `release`."""


@dataclass
class StopSignals:
    """Counts requests to stop by signal; the first names the reason, the second means now."""

    reason: str | None = None
    count: int = 0
    _wishes: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        # systemd ends a session by TERM and HUP, which Python takes in either order: no second wish
        self._wishes += number != signal.SIGHUP
        self.count = max(self.count, self._wishes, 1)
        reasons = {signal.SIGINT: "interrupt", signal.SIGUSR1: "time_limit"}  # USR1: from the batch shell
        self.reason = self.reason or reasons.get(signal.Signals(number), "terminate")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Catch INT, USR1, TERM and HUP (a lost terminal), the last two unless ignored (nohup), while the context lasts."""
    signals = StopSignals()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number in (signal.SIGINT, signal.SIGUSR1) or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    verdict: Verdict
    action: Action
    attempts: int


@dataclass
class Supervisor:
    """The attempt ladder of one launch. The caller holds the lock of the run."""

    run: RunDirectory
    backend: Backend
    resilience: ResilienceConfig
    lease: Lease
    gate: CheckProcess | None = None  # runs beside the start of the first agents; passes before any rank starts
    tick: Callable[[], None] = lambda: None
    # Written with every attempt's event: the job, the head node
    origin: Mapping[str, str] = field(default_factory=dict)
    # Why no further attempt can be made where this launch runs, so that only a requeue helps; None if it can
    exhausted: Callable[[], str | None] = lambda: None
    # The attempts made before a requeue, which count like this launch's own
    history: list[Attempt] = field(default_factory=list)
    # Verdict on an attempt -> the event to write if the next ones were planned to take less memory than it had, or None
    relieve: Callable[[Verdict], dict[str, Any] | None] = lambda verdict: None
    membership: Membership | None = None  # where there is more than one node to choose from
    _nodes: int | None = None  # of the attempt before
    _slow: Straggler | None = None  # its node is to be left out
    _noticed: float | None = None  # unix seconds: when it was known that the attempt has failed
    # The reason of a stop once more is known about it: a preemption can come with the time limit's signal
    explain: Callable[[str], str] = lambda reason: reason
    released: Callable[[], None] = lambda: None  # called once, when everything is checked and the first ranks start

    def supervise(self) -> Result:
        """Run attempts until the action is not to retry. Signals and stop files end the run as they say."""
        events = self.run.event_writer("supervisor")
        with stop_signals() as signals:
            before: int | None = None
            while True:
                attempt = self.run.new_attempt()
                events.write("attempt", attempt=attempt, **self.origin)
                if before is not None and (late := self._asked(before)):  # of that one while this one was made
                    self.run.request_stop(attempt, late)
                before = attempt
                verdict, reason = self._attempt(attempt, signals, events)
                less = self.relieve(verdict)
                self.history.append(Attempt(verdict, progress(self.run), less is not None))
                action = decide(self.history, self.resilience.max_restarts, reason)
                if self.membership is not None:
                    self.membership.accept(verdict.node if verdict.unfit else None, verdict.message)
                if action.kind == "retry" and (why := self.exhausted()) is not None:
                    action = Action("stop", EXIT_TEMPORARY, reason=why, requeue=True)
                self._record(attempt, verdict, action, events)
                if less is not None:
                    events.write(attempt=attempt, **less)
                self.tick()
                if action.kind != "retry":
                    return Result(verdict, action, len(self.history))
                if (reason := self._wait(attempt, action.delay_seconds, signals)) is not None:
                    verdict = Verdict("stopped", step=verdict.step, message=f"stopped on request ({reason})")
                    action = decide([Attempt(verdict, (0, 0))], 0, reason)
                    if not self.lease.lost.is_set():
                        events.write("stopped", attempt=attempt, reason=reason)
                    return Result(verdict, action, len(self.history))

    def _attempt(self, attempt: int, signals: StopSignals, events: EventWriter) -> tuple[Verdict, str | None]:
        """Run one attempt to its end, whatever that is; nothing of it runs when this returns."""
        gate, self.gate, self._slow, self._noticed = self.gate, None, None, None
        try:
            handle = self.backend.start(attempt)
        except DsftError as error:
            return Verdict("failed", error.failure_class, message=str(error)), None
        self._tell_size(attempt, events)
        watch = self._heartbeats(attempt)
        codes: dict[str, int] | None = None
        reason: str | None = None
        try:
            if gate is not None:
                while not gate.poll() and not signals.count and not self.lease.lost.is_set():
                    time.sleep(_POLL_SECONDS)
            if signals.count:
                return Verdict("stopped", message=f"stopped on request ({signals.reason})"), signals.reason
            handle.release()
            if gate is not None:
                self.released()
            watch.start()
            if self.membership is not None:
                self.membership.begin(attempt)
            codes, reason = self._watch(attempt, handle, signals, watch, events)
            self._noticed = self._noticed or wall_time()
            if codes is None and reason is None and watch.hang is not None and not self.lease.lost.is_set():
                with contextlib.suppress(OSError):
                    events.write("hang", attempt=attempt, **watch.hang.to_event())
                handle.ask_for_stacks()
                self._wait_for_stacks(attempt, watch)
            reason = self.explain(reason) if reason else None
        except DsftError as error:  # the gate's
            return Verdict("failed", error.failure_class, message=str(error)), None
        finally:
            watch.stop()
            if self.membership is not None:
                self.membership.end()
            if gate is not None:
                gate.cancel()
            left = handle.kill()
        if reason in PLANNED_STOPS and (codes is None or any(codes.values())):
            reason = None  # it went wrong: a failure as any other
        snapshot = self._snapshot(attempt, codes, reason)
        if codes is None and watch.hang is not None:
            snapshot = replace(snapshot, hang=with_stack(watch.hang, self.run.attempt_dir(attempt) / "stacks"))
        verdict = classify(snapshot)
        if left:
            print(f"warning: processes {left} would not die (stuck in the kernel?)", flush=True)
        if reason == STRAGGLER and verdict.outcome == "stopped":
            return self._leave_out(verdict), None
        return verdict, reason

    def _watch(
        self, attempt: int, handle: AttemptHandle, signals: StopSignals, watch: HeartbeatWatch, events: EventWriter
    ) -> tuple[dict[str, int] | None, str | None]:
        """Wait for the agents; (their exit codes, or None if they have to be killed; the reason of a stop)."""
        reason: str | None = None
        deadline = float("inf")
        next_look = 0.0
        while (codes := handle.poll()) is None:
            self.tick()
            if self._noticed is None and handle.is_failing():
                self._noticed = wall_time()
            if signals.count >= 2 or self.lease.lost.is_set() or time.monotonic() > deadline:
                return None, reason or signals.reason
            if (planned := self._planned_stop(attempt, watch, events)) and reason is None and not signals.count:
                with contextlib.suppress(OSError):  # no storage, no checkpoint: not now
                    self.run.request_stop(attempt, planned)
                    reason, deadline = planned, time.monotonic() + self.resilience.slow_phase_timeout_seconds
            if watch.hang is not None and reason is None:
                return None, None
            if signals.reason and reason is None:
                with contextlib.suppress(OSError):  # no storage, no last checkpoint: the grace just passes
                    if self.run.stop_request(attempt) is None:
                        self.run.request_stop(attempt, signals.reason)
                next_look = 0.0
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _FILE_POLL_SECONDS
                asked = signals.reason or self._asked(attempt)
                if asked and (reason is None or reason in PLANNED_STOPS):
                    grace = self.resilience.stop_grace_seconds if self._has_stepped(attempt) else 0.0
                    reason, deadline = asked, time.monotonic() + grace
                if asked and (self.run.stop_request(attempt) or {}).get("now"):  # perhaps only after a while
                    deadline = 0.0
            time.sleep(_POLL_SECONDS)
        if reason is None and (request := self.run.stop_request(attempt)) is not None:
            reason = str(request.get("reason", "cancel"))  # the ranks were quicker than the next look
        return codes, reason

    def _planned_stop(self, attempt: int, watch: HeartbeatWatch, events: EventWriter) -> str | None:
        """Write down who is slow; why the ranks are to save and end now, so that other nodes can go on, or None."""
        while watch.stragglers:
            slow = watch.stragglers.popleft()
            with contextlib.suppress(OSError):  # no word of it is worth the run
                events.write("straggler", attempt=attempt, **asdict(slow))
            if self._slow is None and self._may_leave_out(slow):
                self._slow = slow
                return STRAGGLER
        return GROW if self.membership is not None and self.membership.wants_more else None

    def _may_leave_out(self, slow: Straggler) -> bool:
        """Whether to go on without a slow node; the restart counts, so the last one is kept for a failure."""
        failed = sum(attempt.verdict.outcome == "failed" for attempt in self.history)
        if self.membership is None or not self.resilience.exclude_stragglers or failed >= self.resilience.max_restarts:
            return False
        return self.membership.does_better_without(slow.node, slow.ratio)

    def _leave_out(self, verdict: Verdict) -> Verdict:
        """The ranks have saved and ended because of a slow node: it counts as one that has failed."""
        assert self._slow is not None
        assert self.membership is not None
        slow, self._slow = self._slow, None
        why = f"straggler: rank {slow.rank} took {slow.ratio:.1f} times the median of all ranks ({slow.kind})"
        self.membership.nodes.pool.lose(slow.node, why)
        return replace(verdict, outcome="failed", failure_class="node", rank=slow.rank, node=slow.node, message=why)

    def _heartbeats(self, attempt: int) -> HeartbeatWatch:
        plan = read_json(self.run.plan_path) or {}
        folder = self.run.heartbeat_path(attempt, 0).parent
        return HeartbeatWatch(folder, int(plan.get("world_size", 0)), self.resilience)

    def _tell_size(self, attempt: int, events: EventWriter) -> None:
        """Into the ledger, where the number of nodes is not what it was."""
        plan = read_json(self.run.plan_path) or {}
        nodes, before = plan.get("nodes"), self._nodes
        self._nodes = nodes
        planned = max(self.membership.plans) if self.membership is not None else nodes
        if nodes != (planned if before is None else before):
            events.write("resized", attempt=attempt, nodes=nodes, ranks=plan.get("world_size"), planned_nodes=planned)

    def _wait_for_stacks(self, attempt: int, watch: HeartbeatWatch) -> None:
        """Until every rank that still can has written its stacks, and every agent what its kernel said."""
        deadline = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < deadline and not watch.has_told(self.run, attempt):
            self.tick()
            time.sleep(_FILE_POLL_SECONDS)

    def _wait(self, attempt: int, seconds: float, signals: StopSignals) -> str | None:
        """Back off; returns the reason if the run is to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            if self.lease.lost.is_set():
                return self._lost()
            if reason := signals.reason or self._asked(attempt):
                return reason
            if time.monotonic() >= deadline:
                return None
            self.tick()
            time.sleep(_POLL_SECONDS)

    def _asked(self, attempt: int) -> str | None:
        """Why somebody else wants this attempt, and with it the run, to stop."""
        request = self.run.stop_request(attempt)
        reason = None if request is None else str(request.get("reason", "cancel"))
        return None if reason in PLANNED_STOPS else reason

    def _lost(self) -> str:
        """How the lock was lost."""
        if self.run.lock_dir.exists():  # a dying agent may have made other folders of it again
            return "another launch has taken over this run"
        return gone(self.run)

    def _has_stepped(self, attempt: int) -> bool:
        """True if there is something of this attempt worth a last checkpoint."""
        return any(
            event["event"] == "first_step" and event.get("attempt") == attempt for event in self.run.merged_events()
        )

    def _snapshot(self, attempt: int, codes: dict[str, int] | None, reason: str | None) -> Snapshot:
        reports = self.run.agent_reports(attempt)
        events = self.run.merged_events()
        return Snapshot(
            agents=codes or {},
            reports=reports,
            records=self.run.failure_records(attempt),
            log_tails={
                int(rank): _tail(self.run.log_path(attempt, report["node"], int(rank)))
                for report in reports
                for rank, code in report["exit_codes"].items()
                if code != 0
            },
            step=progress(self.run)[1] or None,
            stop_reason=reason,
            trained=any(event["event"] == "trained" and event.get("attempt") == attempt for event in events),
            lease_lost=self._lost() if self.lease.lost.is_set() else "",
        )

    def _record(self, attempt: int, verdict: Verdict, action: Action, events: EventWriter) -> None:
        """Into verdict.json and the ledger; whoever has taken over the lock writes there now, nobody else."""
        if self.lease.lost.is_set():
            return
        value = record_of(self.history[-1], action, wall_time())
        retried(lambda: write_json(self.run.verdict_path(attempt), value, indent=1), "verdict.json")
        if verdict.outcome == "failed":
            fields = {key: value[key] for key in FAILURE_KEYS}
            events.write("failure", attempt=attempt, noticed=self._noticed or value["time"], **fields)
        elif action.kind == "retry":
            events.write("restart", attempt=attempt, reason=action.reason)
        for node, why in self.membership.nodes.pool.news() if self.membership is not None else ():
            why = why or verdict.message
            events.write("bad_node", attempt=attempt, node=node, why=why, hours=self.resilience.bad_node_hours)
        if action.kind != "retry":
            state = verdict.outcome
            events.write(state, attempt=attempt, exit_code=action.exit_code, reason=action.reason)


def gone(run: RunDirectory) -> str:
    """What to say of a run whose folder is not there any more."""
    return f"{run.path} is gone: deleted, or on storage that is not mounted any more"


def progress(run: RunDirectory) -> tuple[int, int]:
    """The steps of the newest published checkpoint and of the newest logged step; 0 without one."""
    checkpoints, lines = run.published_checkpoints(), run.last_steps(1)
    return (checkpoints[-1] if checkpoints else 0, int(lines[-1]["step"]) if lines else 0)


def _tail(path: Path) -> str:
    """The last lines of a log, for a message."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return " | ".join(lines[-_TAIL_LINES:])
