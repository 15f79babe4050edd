"""Shows how a run goes: a live view on a terminal, plain lines in a log. Reads the run directory and nothing else."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from launcher.console import gib, printable
from trainer.rundir import Json, LineReader, RunDirectory, read_json

_READ_SECONDS, _READ_FOR_LOG_SECONDS = 0.5, 2.0  # between two looks at half a dozen files of shared storage
_PLAIN_SECONDS = 5.0  # between two lines about steps in a log
_RECENT_STEPS = 20  # rates are means over these


@dataclass
class Progress:
    """The newest step and the rates over the last ones."""

    epochs: float | None = None
    last: Json | None = None
    recent: deque[Json] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))

    def add(self, line: Json) -> None:
        """Take in a step line of metrics.jsonl."""
        if self.last is not None and line["step"] <= self.last["step"]:
            self.recent.clear()  # a restart: the steps after it are timed anew
        self.last = line
        self.recent.append(line)

    @property
    def fraction(self) -> float | None:
        """Done part of the training, 0 to 1; None where the line does not tell."""
        if self.last is None:
            return None
        if total := self.last.get("total_steps"):
            return min(1.0, float(self.last["step"]) / float(total))
        if self.epochs and "progress" in self.last:
            return min(1.0, float(self.last["progress"]) / self.epochs)
        return None

    def rate(self, key: str) -> float:
        """Mean per second of a per-step count over recent steps."""
        seconds = sum(float(line["step_seconds"]) for line in self.recent)
        return sum(float(line.get(key, 0)) for line in self.recent) / seconds if seconds else 0.0

    def eta_seconds(self) -> float | None:
        """Time to the last step at the recent pace; without the last evaluation and the export."""
        fraction = self.fraction
        if self.last is None or not fraction or not self.recent:
            return None
        per_step = sum(float(line["step_seconds"]) for line in self.recent) / len(self.recent)
        return per_step * float(self.last["step"]) * (1 - fraction) / fraction

    def values(self) -> Iterator[tuple[str, str]]:
        """(name, value) of everything there is to show about the newest step."""
        line = self.last
        if line is None:
            return
        yield "loss", number(line.get("loss"))
        yield "lr", f"{line.get('learning_rate', math.nan):.3g}"
        yield "grad norm", number(line.get("grad_norm"))
        yield "target tokens/s", f"{self.rate('target_tokens'):,.0f}"
        yield "tokens/s", f"{self.rate('tokens'):,.0f}"
        if line.get("mfu") is not None:
            yield "MFU", f"{100 * float(line['mfu']):.1f} %"
        if line.get("memory_bytes"):
            yield "memory", gib(line["memory_bytes"])
        if (eta := self.eta_seconds()) is not None:
            yield "ETA", duration(eta)

    def position(self) -> str:
        """`step 3/200`, or with epochs `step 3 (12 %)`."""
        if self.last is None:
            return "starting"
        if total := self.last.get("total_steps"):
            return f"step {self.last['step']}/{total}"
        done = f" ({100 * self.fraction:.0f} %)" if self.fraction is not None else ""
        return f"step {self.last['step']}{done}"


class Watch:
    """Follows a run; call `tick` often and `close` at the end. Output that cannot be written never stops a run."""

    def __init__(self, run: RunDirectory, stream: TextIO) -> None:
        self._run = run
        self._stream: TextIO | None = stream
        self._metrics = LineReader(run.metrics_path)
        self._events: dict[str, LineReader] = {}
        self.progress = Progress(epochs_of(run))
        self._next_read = 0.0
        self._next_plain = 0.0
        self._printed_step: int | None = None
        for _ in self._new_events():  # the past of a resumed run is not news
            pass
        with contextlib.suppress(OSError):
            self._metrics.skip()
            for line in run.last_steps(1):
                self.progress.last = line
                self._printed_step = line["step"]
        self._live: Any = None
        if stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=stream)
            if not console.is_dumb_terminal:  # TERM=dumb: Live would show nothing at all
                self._live = Live(console=console, auto_refresh=False, transient=True)
                self._live.start()

    def tick(self) -> None:
        """Show what is new, at most twice a second, in a log more rarely."""
        if time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + (_READ_SECONDS if self._live else _READ_FOR_LOG_SECONDS)
        self._show()

    def close(self) -> None:
        """Show the rest and leave the terminal as it was."""
        self._next_plain = 0.0
        self._show()
        self._end_live()

    def _end_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """A closed pipe or terminal ends what is shown, and nothing else."""
        try:
            yield
        except OSError:
            self._stream = None
            self._end_live()

    def _show(self) -> None:
        events = list(self._new_events())
        notes = [text for event in events if (text := describe(event))]
        for line in read_if_there(self._metrics):
            if "evaluation" in line:
                notes.append(describe_evaluation(line))
            elif "loss" in line:
                self.progress.add(line)
        if any(event["event"] == "failure" for event in events):  # how far it came, before the next attempt is told of
            self._next_plain = 0.0
            self._show_plain()
        for note in notes:
            self.say(note)
        with self._output():
            if self._live is not None:
                self._live.update(self._view(), refresh=True)
        self._show_plain()

    def _show_plain(self) -> None:
        line = self.progress.last
        if self._live is not None or line is None or line["step"] == self._printed_step:
            return
        if time.monotonic() < self._next_plain:
            return
        self._next_plain = time.monotonic() + _PLAIN_SECONDS
        self._printed_step = line["step"]
        self.say(self.progress.position() + "".join(f"  {name} {value}" for name, value in self.progress.values()))

    def _new_events(self) -> Iterator[Json]:
        new: list[Json] = []
        with contextlib.suppress(OSError):
            for path in sorted(self._run.events_dir.glob("*.jsonl")):
                self._events.setdefault(path.name, LineReader(path))
        for reader in self._events.values():
            new += read_if_there(reader)
        yield from sorted(new, key=lambda event: float(event.get("time", 0)))

    def say(self, text: str) -> None:
        """A line above the live view, or in the log."""
        with self._output():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif self._stream is not None:
                print(text, file=self._stream, flush=True)

    def _view(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._run.name, style="bold"),
            ProgressBar(total=1.0, completed=self.progress.fraction or 0.0, width=30),
            Text(self.progress.position()),
        )
        values = Table.grid(padding=(0, 3))
        shown = list(self.progress.values())
        values.add_row(*(Text(name, style="dim") for name, _ in shown))
        values.add_row(*(Text(value) for _, value in shown))
        view = Table.grid()
        view.add_row(head)
        view.add_row(values)
        return view


def epochs_of(run: RunDirectory) -> float | None:
    """`training.epochs` of a run's config."""
    epochs = (read_json(run.config_path) or {}).get("training", {}).get("epochs")
    return None if epochs is None else float(epochs)


def read_if_there(reader: LineReader) -> list[Json]:
    """New lines; none while the storage is away, which is for the supervisor to judge."""
    try:
        return reader.read()
    except OSError:
        return []


def describe(event: Json) -> str | None:
    """An event as a line for a person, or None if it is not worth one."""
    match event["event"]:
        case "attempt" if event.get("attempt", 1) > 1:
            return f"attempt {event['attempt']} starts"
        case "checkpoint":
            return f"checkpoint of step {event['step']} written ({gib(event['bytes'])} in {event['seconds']:.1f} s)"
        case "drill":
            return f"drill: {event['fault']} at step {event['step']}"
        case "warning":
            return f"warning: {event['message']}"
        case "resized":
            return f"{event['nodes']} of {event['planned_nodes']} nodes ({event['ranks']} ranks), the same global batch"
        case "less_memory":
            return f"a rank ran out of memory: on with {_less_memory(event)}, the same global batch"
        case "restart":
            return f"attempt {event['attempt']} has ended after a checkpoint: {event['reason']}"
        case "bad_node":
            return f"node {event['node']} is left out for {event['hours']:g} h: {event['why']}"
        case "exported":
            return f"model exported to {event.get('path', 'export/')} in {event.get('seconds', 0.0):.1f} s"
        case "failure":
            what_next = "; trying again" if event.get("action") == "retry" else ""
            return f"failure: {describe_failure(event)}{what_next}"
    return None


def _less_memory(event: Json) -> str:
    if event["micro_batch_size"] == event["was"]:
        return "recomputed activations"
    return f"micro-batches of {event['micro_batch_size']} in place of {event['was']}"


def describe_failure(failure: Json) -> str:
    """`data error on rank 3 (node n1), step 12: message`. The message may quote a rank's output, which is anything."""
    where = f" on rank {failure['rank']}" if failure.get("rank") is not None else ""
    node = f" (node {failure['node']})" if failure.get("node") else ""
    step = f", step {failure['step']}" if failure.get("step") is not None else ""
    return f"{str(failure['class']).replace('_', ' ')} error{where}{node}{step}: {printable(str(failure['message']))}"


def describe_evaluation(line: Json) -> str:
    """`step 50: evaluation loss 2.31, perplexity 10.1`."""
    scores = (f"{name} {number(value)}" for name, value in line["evaluation"].items() if isinstance(value, int | float))
    return f"step {line['step']}: evaluation {', '.join(scores)}"


def number(value: Any) -> str:
    """Counts in full, else four significant digits; nan and inf are shown as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else f"{float(value):.4g}"


def duration(seconds: float) -> str:
    """h:mm:ss, with days before it from one day on."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text
