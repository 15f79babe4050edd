"""The trials of a study: each is a `dsft launch` of its own, watched through its run directory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.backends.slurm import in_allocation
from launcher.commands.cancel import cancel
from launcher.detach import log_path
from launcher.state import run_state
from launcher.supervisor import StopSignals
from launcher.tuning import Search, Study, score, score_of
from trainer.failures import EXIT_TEMPORARY, EXIT_USER, DsftError, UserError
from trainer.lease import Lease
from trainer.processes import child_environment
from trainer.rundir import Json, LineReader, RunDirectory

if TYPE_CHECKING:
    import optuna

_POLL_SECONDS = 0.2
_ASK_SECONDS = 2.0  # between two tries to take a trial's job out of the queue
_LAUNCHES = 3  # of one trial: a launch that dies without a verdict says nothing about the trial's values
_TAIL_LINES = 5


@dataclass
class Running:
    """A trial that this process sees through."""

    trial: optuna.Trial
    run: RunDirectory
    values: Json
    lease: Lease
    lines: LineReader
    process: subprocess.Popen[bytes] | None = None
    launches: int = 0
    attempts: int = 0  # of the run before its last launch here
    start_at: float = 0.0  # time.monotonic()
    pruned: bool = False
    reported: set[int] = field(default_factory=set)


@dataclass
class Tuner:
    """Keeps `tune.parallel` trials going until the study has all of them."""

    study: Study
    signals: StopSignals
    say: Callable[[str], None]
    changed: Callable[[], object]  # called whenever a trial has ended
    is_task: bool = False  # a job of an array: it sees one trial through
    again: bool = False  # out: the trial is to go on in the same job, requeued
    running: list[Running] = field(default_factory=list)
    _told: int = 0
    _next_ask: float = 0.0

    @property
    def search(self) -> Search:
        return self.study.search

    def run(self) -> None:
        """Returns when no more trials are to be had, or after a signal, when all of this process have stopped.

        Raises UserError if a trial fails by the user's mistake before any has succeeded.
        """
        patient, room = True, 1 if self.is_task else sys.maxsize
        try:
            while True:
                while room and not self.signals.count and len(self.running) < self.search.settings.parallel:
                    taken = self.study.take(patient)
                    patient, room = False, room - 1
                    if taken is None:
                        break
                    self.running.append(self._begin(*taken))
                if not self.running:
                    return
                self._pass_on_signals()
                for running in list(self.running):
                    self._look(running)
                time.sleep(_POLL_SECONDS)
        except BaseException:  # nothing of this process goes on
            self.signals.count = max(self.signals.count, 1)
            while self.running:
                self._pass_on_signals()
                self.running = [running for running in self.running if not self._is_over(running)]
                time.sleep(_POLL_SECONDS)
            raise

    def _begin(self, trial: optuna.Trial, lease: Lease) -> Running:
        run = self.search.run(trial.number)
        running = Running(trial, run, self.search.values(trial.params), lease, LineReader(run.metrics_path))
        frozen = self.study.trials()[trial.number]
        running.reported |= set(frozen.intermediate_values)
        running.pruned = bool(frozen.user_attrs.get("pruned"))
        again = "goes on" if run.exists() else "begins"
        self.say(f"trial {trial.number} {again}: {shown(running.values)}")
        return running

    def _launch(self, running: Running) -> None:
        sets = (("--set", item) for item in self.search.trial_overrides(running.run, running.values))
        words = [str(self.search.path), *(word for pair in sets for word in pair)]
        if self._is_queued():
            words.append("--watch")  # the job outlives its watcher, and is found again
        if not self.is_task:
            words.append("--parent-stops")
        running.run.path.mkdir(parents=True, exist_ok=True)
        running.attempts = len(running.run.attempts())
        with open(log_path(running.run), "ab") as log:
            running.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launcher", "launch", *words, f"--parent-pid={os.getpid()}"],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is passed on, once
            )
        running.launches += 1

    def _is_queued(self) -> bool:
        return self.search.config.cluster.backend == "slurm" and not in_allocation()

    def _look(self, running: Running) -> None:
        """Start, prune or end a trial, as is due."""
        if running.process is None:
            if self.signals.count:
                self._let_go(running)
            elif time.monotonic() >= running.start_at:
                self._launch(running)
            return
        code = running.process.poll()
        self._read(running)
        if code is not None:
            self._ended(running, code)
        elif running.pruned and not self.signals.count:
            self._stop_pruned(running)

    def _read(self, running: Running) -> None:
        """Report new evaluations to the study; the pruner may then end the trial."""
        for line in running.lines.read():
            if "evaluation" not in line or line["step"] in running.reported:
                continue
            value, step = score_of(self.search, line), int(line["step"])
            running.reported.add(step)
            if not math.isfinite(value):
                continue
            running.trial.report(value, step)
            self.say(f"trial {running.trial.number}: {self.search.metric} {value:.5g} at step {step}")
            if not running.pruned and running.trial.should_prune():
                running.pruned = True
                running.trial.set_user_attr("pruned", True)

    def _stop_pruned(self, running: Running) -> None:
        attempts = running.run.attempts()
        if attempts and running.run.stop_request(attempts[-1]) is None:
            running.run.request_stop(attempts[-1], "cancel")

    def _ended(self, running: Running, code: int) -> None:
        """Tell the study how a trial's launch ended, or launch it again."""
        from optuna.trial import TrialState

        state = run_state(running.run)
        if state.state == "finished":
            step, value = score(self.search, running.run)
            if math.isfinite(value):
                running.trial.set_user_attr("step", step)
                self._tell(running, TrialState.COMPLETE, f"{self.search.metric} {value:.5g}", value)
            else:
                self._fail(running, "numeric", f"{self.search.metric} is {value} at the end")
            return
        if running.pruned:
            self._tell(running, TrialState.PRUNED, f"pruned at step {max(running.reported)}")
            return
        if self.is_task and code == EXIT_TEMPORARY:  # the time limit, a preemption, nodes that are gone
            self.again = True
        if self.signals.count or self.again:
            self._let_go(running)
            return
        failure, message = _failure(running.run, running.attempts, code, state.reason)
        if failure is None and running.launches < _LAUNCHES:
            self.say(f"trial {running.trial.number}: {message}; it is launched again, and goes on where it was")
            running.process, running.start_at = None, time.monotonic() + 2.0**running.launches
            return
        self._fail(running, failure or "unknown", message)
        if failure in ("user", "data") and not any(trial.value is not None for trial in self.study.trials()):
            raise UserError(f"trial {running.trial.number} cannot run, so that others would not either: {message}")

    def _fail(self, running: Running, failure: str, message: str) -> None:
        from optuna.trial import TrialState

        running.trial.set_user_attr("class", failure)
        running.trial.set_user_attr("message", message)
        self._tell(running, TrialState.FAIL, f"failed ({failure}): {message}")

    def _tell(self, running: Running, state: optuna.trial.TrialState, words: str, value: float | None = None) -> None:
        self.study.study.tell(running.trial.number, value, state)
        self.say(f"trial {running.trial.number}: {words}")
        if not self.search.settings.keep_checkpoints:
            shutil.rmtree(running.run.checkpoints_dir, ignore_errors=True)
        self._let_go(running)
        self.changed()

    def _let_go(self, running: Running) -> None:
        running.lease.release()
        self.running.remove(running)

    # -- stopping

    def _pass_on_signals(self) -> None:
        """Have all trials stop, each as its backend does it; a second signal means at once."""
        if not self.signals.count:
            return
        if self._is_queued():
            if time.monotonic() < self._next_ask:
                return
            self._next_ask = time.monotonic() + _ASK_SECONDS
            for running in self.running:
                # not submitted yet, or over already: the next try or the watcher tells
                with contextlib.suppress(DsftError):
                    cancel(running.run, now=self.signals.count > 1)
        elif self.is_task and self.signals.reason == "terminate":
            return  # SLURM has told the launch as well
        elif self._told < min(self.signals.count, 2):
            if self._told == 0 and self.running:
                self.say("stopping the trials; `dsft tune` goes on with them")
            self._told += 1
            number = signal.SIGUSR1 if self.is_task and self.signals.reason == "time_limit" else signal.SIGINT
            for running in self.running:
                if running.process is not None and running.process.poll() is None:
                    running.process.send_signal(number)

    def _is_over(self, running: Running) -> bool:
        if running.process is not None and running.process.poll() is None:
            return False
        running.lease.release()
        return True


def _failure(run: RunDirectory, before: int, code: int, reason: str) -> tuple[str | None, str]:
    """(class, message) of a launch that did not finish; class None: it is worth another launch."""
    attempts = run.attempts()[before:]  # those of this launch
    request = run.stop_request(attempts[-1]) if attempts else None
    if request is not None and request.get("reason") == "cancel":
        return "cancelled", "cancelled by a user"
    verdict = next((v for v in run.verdicts() if v["attempt"] == attempts[-1]), None) if attempts else None
    if verdict is not None and verdict["outcome"] == "failed" and code != EXIT_TEMPORARY:
        return str(verdict["class"]), str(verdict["message"])
    if code == EXIT_USER:
        return "user", _tail(run)
    return None, reason or f"its launch ended with code {code}: {_tail(run)}"


def _tail(run: RunDirectory) -> str:
    """The error that a launch ended with, from its log."""
    try:
        lines = log_path(run).read_text(errors="replace").splitlines()
    except OSError:
        return "no word of it"
    begin = next((i for i in reversed(range(len(lines))) if lines[i].startswith("error: ")), len(lines) - _TAIL_LINES)
    return "\n".join(lines[max(begin, 0) :]).removeprefix("error: ")


def shown(values: Json) -> str:
    """Values of a trial in a line."""
    return ", ".join(f"{key} {text(value)}" for key, value in values.items())


def text(value: object) -> str:
    """One value, short."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
