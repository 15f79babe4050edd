"""Tells people of a run's failures, recoveries and end. It follows the ledger; its own failures never harm a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.watch import describe_failure, read_if_there
from trainer.config.notifications import Notification
from trainer.processes import RUN_VARIABLE
from trainer.rundir import Json, LineReader, RunDirectory, read_json

_READ_SECONDS = 0.5
_WEBHOOK_SECONDS = 10.0
_COMMAND_SECONDS = 60.0
_CLOSE_SECONDS = 15.0  # at the end of a launch, for what is still on its way


def problems(notifications: Sequence[Notification]) -> Iterator[str]:
    """What is wrong with the environment that they refer to. Values are not shown."""
    for index, notification in enumerate(notifications):
        if notification.webhook and notification.webhook.startswith("$"):
            name = notification.webhook[1:]
            value = os.environ.get(name)
            if value is None:
                yield f"resilience.notify.{index}.webhook: {name} is not set; export it here, then launch again"
            elif not value.startswith(("http://", "https://")):
                yield f"resilience.notify.{index}.webhook: {name} holds no http:// or https:// URL"


class Notifier:
    """Call `tick` often and `close` at the end. Only what happens after its creation is news."""

    def __init__(self, run: RunDirectory, notifications: Sequence[Notification]) -> None:
        self._run, self._notifications = run, notifications
        self._warnings = run.event_writer("notify")
        self._readers = [LineReader(run.events_dir / f"{name}.jsonl") for name in ("supervisor", "rank0")]
        self._failed: Json | None = None  # the last failure that no step has followed yet
        self._threads: list[threading.Thread] = []
        self._next_read = 0.0
        for _ in self._news():
            pass

    def tick(self) -> None:
        """Send what is new, without waiting for it; looks at most twice a second."""
        if not self._notifications or time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + _READ_SECONDS
        for message in self._news():
            self._send(message)

    def close(self) -> None:
        """Send the rest and wait a little for what is on its way."""
        self._next_read = 0.0
        self.tick()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _news(self) -> Iterator[Json]:
        new = sorted((e for reader in self._readers for e in read_if_there(reader)), key=lambda e: float(e["time"]))
        for event in new:
            value = self._message(event)
            if value is not None:
                where = {"run": str(self._run.path), "name": self._run.name}
                yield {**where, "time": event["time"], "attempt": event.get("attempt"), **value}

    def _message(self, event: Json) -> Json | None:
        name, kind, verdict = self._run.name, event["event"], None
        if kind == "failure":
            self._failed = event
            keys = ("class", "rank", "node", "step", "message", "action")
            text = f"{name}: {describe_failure(event)}" + ("; trying again" if event.get("action") == "retry" else "")
            return {"event": "failure", "text": text, **{key: event.get(key) for key in keys}}
        if kind == "bad_node":
            text = f"{name}: node {event['node']} is left out for {event['hours']:g} h: {event['why']}"
            return {"event": "bad_node", "text": text, **{key: event[key] for key in ("node", "why", "hours")}}
        if kind == "first_step" and self._failed is not None:
            seconds = float(event["time"]) - float(self._failed["time"])
            self._failed = None
            text = f"{name}: goes on with step {event['step']}, {seconds:.0f} s after the failure"
            return {"event": "recovery", "text": text, "step": event["step"], "seconds": seconds}
        if kind in ("finished", "failed", "stopped") and "step" not in event:
            with contextlib.suppress(OSError):  # storage away for a moment
                verdict = read_json(self._run.verdict_path(int(event.get("attempt") or 0)))
            if verdict and verdict.get("requeue"):  # the run goes on in the next job
                return None
            reason = str(event.get("reason") or "")
            text = f"{name}: {kind}" + (f" ({reason})" if reason else "")
            return {"event": "end", "text": text, "state": kind, "reason": reason, "exit_code": event.get("exit_code")}
        return None

    def _send(self, message: Json) -> None:
        for index, notification in enumerate(self._notifications):
            if message["event"] in notification.events:
                arguments = (index, notification, message)
                # a daemon: a receiver that hangs does not keep the launcher
                self._threads.append(threading.Thread(target=self._deliver, args=arguments, daemon=True))
                self._threads[-1].start()

    def _deliver(self, index: int, notification: Notification, message: Json) -> None:
        try:
            problem = _run(notification.command, message) if notification.command else _post(notification, message)
        except Exception as error:  # its text may hold the URL
            problem = error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
        if problem:
            text = f"resilience.notify.{index} was not told of `{message['event']}`: {problem}"
            with contextlib.suppress(OSError):
                self._warnings.write("warning", message=text)


def _run(command: Sequence[str], message: Json) -> str | None:
    """What went wrong, or None. The command's output goes to the launcher's error stream."""
    names = {"event": "EVENT", "name": "RUN_NAME", "run": "RUN", "attempt": "ATTEMPT", "text": "TEXT", "state": "STATE"}
    names["node"] = "NODE"
    variables = {f"DSFT_{name}": str(message[key]) for key, name in names.items() if message.get(key) is not None}
    process = subprocess.Popen(
        command,
        # without the mark by which leftovers of a run are found and killed
        env={k: v for k, v in os.environ.items() if k != RUN_VARIABLE} | variables,
        stdin=subprocess.PIPE,
        stdout=2,
        start_new_session=True,
    )
    try:
        process.communicate(json.dumps(message).encode(), timeout=_COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"the command did not end within {_COMMAND_SECONDS:.0f} s"
    return f"the command ended with exit code {process.returncode}" if process.returncode else None


def _post(notification: Notification, message: dict[str, Any]) -> str | None:
    """What went wrong, or None."""
    import urllib.error
    import urllib.request

    assert notification.webhook is not None
    url = notification.webhook
    url = os.environ[url[1:]] if url.startswith("$") else url
    headers = {"Content-Type": "application/json", "User-Agent": "dsft"}
    request = urllib.request.Request(url, json.dumps(message).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}"
    except urllib.error.URLError as error:
        return (
            error.reason.strerror or type(error.reason).__name__ if isinstance(error.reason, OSError) else "no answer"
        )
