"""Runs the attempts of one run until it is done, stopped, or not worth another: the only place that acts."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launcher.verdict import Action, Attempt, Snapshot, Verdict, classify, decide
from trainer.config.schema import ResilienceConfig
from trainer.failures import DsftError
from trainer.lease import Lease
from trainer.rundir import EventWriter, RunDirectory, write_json

_POLL_SECONDS = 0.05
_FILE_POLL_SECONDS = 0.5  # how often shared storage is asked for a stop request
_TAIL_BYTES = 2000
_TAIL_LINES = 3


class AttemptHandle(Protocol):
    """A started attempt on some backend."""

    def release(self) -> None:
        """Let the agents, which were started ahead, start their ranks."""

    def poll(self) -> dict[str, int] | None:
        """Node -> exit code of its agent once all agents have ended, else None."""

    def kill(self) -> list[int]:
        """Leave nothing of the attempt running; returns what would not die. May be called at any time."""


class Backend(Protocol):
    """Where attempts run."""

    def start(self, attempt: int) -> AttemptHandle:
        """Start the agents of `attempt`; no rank starts before `release`."""


class Gate(Protocol):
    """Checks that run beside the start of the first attempt's agents and must pass before any rank starts."""

    def poll(self) -> bool:
        """True once passed; raises the UserError or DataError that forbids the run."""

    def cancel(self) -> None:
        """End the checks if they still run."""


@dataclass
class StopSignals:
    """Counts requests to stop by signal; the first names the reason, the second means now."""

    reason: str | None = None
    count: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        reasons = {signal.SIGINT: "interrupt", signal.SIGUSR1: "time_limit"}  # USR1: from the batch shell
        self.reason = self.reason or reasons.get(signal.Signals(number), "terminate")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Catch INT, TERM, USR1 and HUP (a lost terminal; not under nohup) while the context lasts."""
    signals = StopSignals()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
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
    gate: Gate | None = None
    tick: Callable[[], None] = lambda: None
    released: Callable[[], None] = lambda: None  # called once, when everything is checked and the first ranks start
    _history: list[Attempt] = field(default_factory=list)

    def supervise(self) -> Result:
        """Run attempts until the action is not to retry. Signals and stop files end the run as they say."""
        events = self.run.event_writer("supervisor")
        with stop_signals() as signals:
            while True:
                attempt = self.run.new_attempt()
                events.write("attempt", attempt=attempt)
                oom_kills = _oom_kills()
                verdict, reason = self._attempt(attempt, signals, oom_kills)
                self._history.append(Attempt(verdict, self._progress()))
                action = decide(self._history, self.resilience.max_restarts, reason)
                self._record(attempt, verdict, action, events)
                self.tick()
                if action.kind != "retry":
                    return Result(verdict, action, len(self._history))
                if (reason := self._wait(attempt, action.delay_seconds, signals)) is not None:
                    verdict = Verdict("stopped", step=verdict.step, message=f"stopped on request ({reason})")
                    action = decide([Attempt(verdict, (0, 0))], 0, reason)
                    if not self.lease.lost.is_set():
                        events.write("stopped", attempt=attempt, reason=reason)
                    return Result(verdict, action, len(self._history))

    def _attempt(self, attempt: int, signals: StopSignals, oom_kills: int) -> tuple[Verdict, str | None]:
        """Run one attempt to its end, whatever that is; nothing of it runs when this returns."""
        gate, self.gate = self.gate, None
        handle = self.backend.start(attempt)
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
            codes, reason = self._watch(attempt, handle, signals)
        except DsftError as error:  # the gate's
            return Verdict("failed", error.failure_class, message=str(error)), None
        finally:
            if gate is not None:
                gate.cancel()
            left = handle.kill()
        snapshot = self._snapshot(attempt, codes, reason, _oom_kills() - oom_kills)
        verdict = classify(snapshot)
        if left:
            print(f"warning: processes {left} would not die (stuck in the kernel?)", flush=True)
        return verdict, reason

    def _watch(
        self, attempt: int, handle: AttemptHandle, signals: StopSignals
    ) -> tuple[dict[str, int] | None, str | None]:
        """Wait for the agents; (their exit codes, or None if they have to be killed; the reason of a stop)."""
        reason: str | None = None
        deadline = float("inf")
        next_look = 0.0
        while (codes := handle.poll()) is None:
            self.tick()
            if signals.count >= 2 or self.lease.lost.is_set() or time.monotonic() > deadline:
                return None, reason or signals.reason
            if signals.reason and reason is None:
                with contextlib.suppress(OSError):  # no storage, no last checkpoint: the grace just passes
                    if self.run.stop_request(attempt) is None:
                        self.run.request_stop(attempt, signals.reason)
                next_look = 0.0
            if reason is None and time.monotonic() >= next_look:
                next_look = time.monotonic() + _FILE_POLL_SECONDS
                request = self.run.stop_request(attempt)
                if request is not None or signals.reason:
                    reason = signals.reason or str((request or {}).get("reason", "cancel"))
                    now = bool((request or {}).get("now")) or not self._has_stepped(attempt)
                    deadline = time.monotonic() + (0.0 if now else self.resilience.stop_grace_seconds)
            time.sleep(_POLL_SECONDS)
        if reason is None and (request := self.run.stop_request(attempt)) is not None:
            reason = str(request.get("reason", "cancel"))  # the ranks were quicker than the next look
        return codes, reason

    def _wait(self, attempt: int, seconds: float, signals: StopSignals) -> str | None:
        """Back off; returns the reason if the run is to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            request = self.run.stop_request(attempt)
            if self.lease.lost.is_set():
                return "another launch has taken over"
            if signals.reason or request:
                return signals.reason or str((request or {}).get("reason", "cancel"))
            if time.monotonic() >= deadline:
                return None
            self.tick()
            time.sleep(_POLL_SECONDS)

    def _has_stepped(self, attempt: int) -> bool:
        """True if there is something of this attempt worth a last checkpoint."""
        return any(
            event["event"] == "first_step" and event.get("attempt") == attempt for event in self.run.merged_events()
        )

    def _progress(self) -> tuple[int, int]:
        checkpoints = self.run.published_checkpoints()
        return (checkpoints[-1] if checkpoints else 0, self._last_step() or 0)

    def _last_step(self) -> int | None:
        lines = self.run.step_lines()
        return int(lines[-1]["step"]) if lines else None

    def _snapshot(self, attempt: int, codes: dict[str, int] | None, reason: str | None, oom_kills: int) -> Snapshot:
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
            step=self._last_step(),
            stop_reason=reason,
            trained=any(event["event"] == "trained" and event.get("attempt") == attempt for event in events),
            oom_kills=oom_kills,
            lease_lost=self.lease.lost.is_set(),
        )

    def _record(self, attempt: int, verdict: Verdict, action: Action, events: EventWriter) -> None:
        """Into verdict.json and the ledger; whoever has taken over the lock writes there now, nobody else."""
        if self.lease.lost.is_set():
            return
        value: dict[str, Any] = verdict.to_json() | {
            "action": action.kind,
            "reason": action.reason,
            "delay_seconds": action.delay_seconds,
            "exit_code": action.exit_code,
            "time": time.time(),
        }
        write_json(self.run.verdict_path(attempt), value, indent=1)
        if verdict.outcome == "failed":
            fields = {key: value[key] for key in ("class", "rank", "node", "step", "message", "victims", "action")}
            events.write("failure", attempt=attempt, **fields)
        if action.kind != "retry":
            state = verdict.outcome
            events.write(state, attempt=attempt, exit_code=action.exit_code, reason=action.reason)


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


def _oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory since boot; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
