"""When a checkpoint is written: one rank decides, between steps, and never lets training wait long for the disk."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from trainer import heartbeat
from trainer.checkpoint import Saver
from trainer.checkpoint_interval import PRIOR_MTBF_SECONDS, auto_interval_seconds, estimate_mtbf_seconds
from trainer.config.schema import CheckpointConfig
from trainer.rundir import EventWriter, RunDirectory

# Before a save was measured: bytes that a rank copies per second
_COPY_RATE = 2e9
# When a save meets the one before it still being written: training waits this share of the time since then, and at
# least so long, before the save is put off
_WAITING_SHARE = 0.1
_WAITING_SECONDS = 2.0
_POLL_SECONDS = 1.0


class SavePolicy:
    """Rank 0's decisions. The others follow them: see `trainer.train`."""

    def __init__(self, config: CheckpointConfig, saver: Saver, run: RunDirectory, attempt: int, ranks: int) -> None:
        self._config, self._saver, self._run = config, saver, run
        self._events: EventWriter = run.event_writer("checkpoints", attempt)
        self._request = run.save_request_path(attempt)
        self._stall = saver.bytes_of_all_ranks() / ranks / _COPY_RATE
        self._mtbf: float | None = None
        self._saved_at = time.monotonic()
        self._next_poll = 0.0
        self._waiting = self._told = False
        self._waited = 0.0

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        self._waiting = self._waiting or self._wanted(step)
        if not self._waiting:
            return False
        start = time.monotonic()
        elapsed = start - self._saved_at
        heartbeat.enter("checkpoint")
        done = self._saver.wait(0.0 if self._told else max(_WAITING_SECONDS, _WAITING_SHARE * elapsed))
        heartbeat.enter("step")
        self._waited = time.monotonic() - start
        if not done:
            if not self._told:
                message = "the checkpoint before is still being written"
                self._tell("checkpoint_postponed", step, message, seconds=self._waited)
            self._told = True
            return False
        self._waiting = self._told = False
        problem = self._saver.missing_space()
        if problem:
            self._tell("checkpoint_failed", step, problem)
            self._saved_at = time.monotonic()
        return problem is None

    def saved(self, stall_seconds: float) -> float:
        """A save has begun; training stood still for so long. Returns that with the wait for the save before it."""
        self._stall, waited, self._waited = stall_seconds, self._waited, 0.0
        self._saved_at = time.monotonic()
        self._mtbf = None
        return stall_seconds + waited

    def interval_seconds(self) -> float | None:
        """Seconds between saves by time, or None where only steps count."""
        if self._config.interval_minutes is not None:
            return 60 * self._config.interval_minutes
        if self._config.interval_steps != "auto":
            return None
        if self._mtbf is None:  # once a save: the ledger is a file on shared storage
            hours = self._config.mean_time_between_failures_hours
            self._mtbf = self._seen_mtbf() if hours == "auto" else 3600.0 * hours
        return auto_interval_seconds(self._stall, self._saver.seconds, self._mtbf)

    def _seen_mtbf(self) -> float:
        """From the ledger; while the storage is away, as if nothing had failed yet."""
        with contextlib.suppress(OSError):
            return estimate_mtbf_seconds(self._run.merged_events(), time.time())
        return PRIOR_MTBF_SECONDS

    def _wanted(self, step: int) -> bool:
        steps = self._config.interval_steps
        if isinstance(steps, int) and step % steps == 0:
            return True
        interval = self.interval_seconds()
        if interval is not None and time.monotonic() - self._saved_at >= interval:
            return True
        if time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + _POLL_SECONDS
            with contextlib.suppress(OSError):  # there is none, or the storage is away for a moment
                self._request.unlink()
                return True
        return False

    def _tell(self, event: str, step: int, message: str, **fields: Any) -> None:
        print(f"warning: step {step}: {message}", flush=True)
        tell(self._events, event, step=step, message=message, **fields)


def tell(events: EventWriter, event: str, **fields: Any) -> None:
    """An event that must not end the run where the disk is full."""
    try:
        events.write(event, **fields)
    except OSError as error:
        print(f"warning: event {event} not written: {error}", flush=True)
