"""What became of a run: the whole account as one JSON value, and as tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.console import gib, print_table, print_whole, printable
from launcher.goodput import failure_times
from launcher.reporting import status
from launcher.state import failures
from launcher.watch import describe_evaluation, duration, number
from trainer.rundir import Json, RunDirectory

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_BAR_WIDTH = 30
_NO_TIMES = {"time": None, "injected": None, "detection_seconds": None, "recovery_seconds": None}


def report(run: RunDirectory) -> Json:
    """State, steps, losses, evaluations, goodput, failures and where things are.

    What `status` tells is in it; each of `failures` has what the verdict says and `failure_times` adds.
    """
    steps, evaluations, events = run.step_lines(), run.evaluation_lines(), run.merged_events()
    times = failure_times(events)
    value = status(run)
    return {
        **value,
        "steps": steps[-1]["step"] if steps else 0,
        "loss_first": steps[0]["loss"] if steps else None,
        "loss_last": steps[-1]["loss"] if steps else None,
        "evaluation": evaluations[-1]["evaluation"] if evaluations else None,
        "evaluations": [{"step": line["step"], **line["evaluation"]} for line in evaluations],
        "failures": [{**failure, **times.get(failure["attempt"], _NO_TIMES)} for failure in failures(run)],
        "memory": _memory(events),
        "drills": [event for event in events if event["event"] == "drill"],  # also of those that left no failure
        "sizes": [event for event in events if event["event"] == "resized"],
        "bad_nodes": [event for event in events if event["event"] == "bad_node"],
        "checkpoints": run.published_checkpoints(),
        "export": str(run.export_dir) if (run.export_dir / "config.json").is_file() else None,
        "tensorboard": str(run.tensorboard_dir) if run.tensorboard_dir.is_dir() else None,
    }


def _memory(events: list[Json]) -> Json | None:
    """The ranks' peaks in the last attempt that told them, beside the plan; `error` is planned / peak - 1."""
    told = next((event for event in reversed(events) if event["event"] == "memory"), None)
    if told is None:
        return None
    value = {key: told[key] for key in ("peak_bytes", "rank", "least_bytes", "planned_bytes", "counted")}
    planned = told["planned_bytes"]
    return {**value, "error": planned / told["peak_bytes"] - 1 if planned else None}


def memory_line(memory: Json) -> str:
    """`at most 1.4 GiB resident (rank 1), at least 1.3 GiB; planned 1.6 GiB (14 % more)`."""
    text = f"at most {gib(memory['peak_bytes'])} {memory['counted']} (rank {memory['rank']})"
    text += f", at least {gib(memory['least_bytes'])}"
    if memory["error"] is None:
        return text
    more = f"{abs(100 * memory['error']):.0f} % {'more' if memory['error'] >= 0 else 'less'}"
    return f"{text}; planned {gib(memory['planned_bytes'])} ({more})"


def show_report(value: Json) -> None:
    """Print the account on stdout: in a terminal's width, or without breaking lines where it is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)
    _show(console, value)


def _show(console: Console, value: Json) -> None:
    reason = f" ({value['reason']})" if value["reason"] else ""
    console.print(_text(f"{value['name']}: {value['state']} at step {value['steps']}{reason}"))
    for name, text in _facts(value):
        console.print(_text(f"  {name:<12} {text}"))
    if value["goodput"]["wall_seconds"]:
        print_whole(console, _parts(value["goodput"]))
    if value["failures"]:
        print_table(console, _failures(value["failures"]))
    found = {failure["attempt"] for failure in value["failures"]}
    for drill in value["drills"]:
        if drill.get("attempt") not in found:
            console.print(_text(f"  drill {drill.get('fault')} at step {drill.get('step')}: no failure was found"))


def _facts(value: Json) -> Iterator[tuple[str, Any]]:
    yield "run", value["run"]
    if value["loss_last"] is not None:
        yield "loss", f"{number(value['loss_first'])} -> {number(value['loss_last'])}"
    scored = value["evaluations"]
    for entry in [scored[0], scored[-1]] if len(scored) > 1 else scored:
        line = {"step": entry["step"], "evaluation": {k: v for k, v in entry.items() if k != "step"}}
        yield "evaluation", describe_evaluation(line)
    if value["goodput"]["ettr"] is not None:
        yield "goodput", goodput_line(value["goodput"])
    if value["memory"]:
        yield "memory", memory_line(value["memory"])
    if value["sizes"]:
        told = (f"{e['nodes']} of {e['planned_nodes']} from attempt {e['attempt']}" for e in value["sizes"])
        yield "nodes", ", ".join(told)
    for bad in value["bad_nodes"]:
        yield "bad node", f"{bad['node']}: {bad['why']}"
    if value["checkpoints"]:
        yield "checkpoints", f"{value['run']}/checkpoints (steps {', '.join(map(str, value['checkpoints']))})"
    for key in ("export", "tensorboard", "html"):
        if value.get(key):
            yield key, value[key]


def goodput_line(goodput: Json) -> str:
    """`ETTR 87 %: 0:52:10 of 1:00:00 in steps that count`."""
    share, useful = 100 * goodput["ettr"], goodput["useful_seconds"]
    waited = goodput["seconds"]["queue"] + goodput["seconds"]["idle"]
    more = f"; {seconds(waited)} more in the queue or idle" if waited >= 0.05 else ""
    there = seconds(goodput["wall_seconds"] - waited)
    return f"ETTR {share:.1f} %: {seconds(useful)} of {there} in steps that count{more}"


def seconds(value: float | None) -> str:
    """`12.3 s` up to a minute, then h:mm:ss; `-` for None."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value < 60 else duration(value)


def _parts(goodput: Json) -> Table:
    """The parts of the wall time, the largest first."""
    wall = goodput["wall_seconds"]
    table = _table("time", "", "share", "")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, spent in sorted(goodput["seconds"].items(), key=lambda item: -item[1]):
        if spent > 0:
            bar = "█" * round(_BAR_WIDTH * spent / wall)
            table.add_row(_text(name), seconds(spent), f"{100 * spent / wall:.1f} %", _text(bar, "blue"))
    table.add_row("wall", seconds(wall), "", "", style="bold")
    return table


def _failures(found: list[Json]) -> Table:
    table = _table("failure", "class", "rank", "node", "step", "injected", "detected", "next step", "message")
    for failure in found:
        cells = [f"attempt {failure['attempt']}", str(failure["class"]).replace("_", " ")]
        cells += ["-" if failure[key] is None else str(failure[key]) for key in ("rank", "node", "step")]
        cells += [failure["injected"] or "no", seconds(failure["detection_seconds"])]
        message = str(failure["message"])
        cells += [seconds(failure["recovery_seconds"]), message if len(message) <= 300 else message[:300] + "..."]
        table.add_row(*map(_text, cells))
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Column, Table

    return Table(*(Column(name, overflow="fold") for name in columns), box=box.SIMPLE_HEAD)


def _text(value: Any, style: str = "") -> RenderableType:
    """As it is: no markup, and nothing that would drive a terminal."""
    from rich.text import Text

    return Text(printable(str(value)), style)
