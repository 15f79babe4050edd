"""One self-contained HTML file about a run: plots, timeline, goodput, failures. No scripts, nothing loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.console import gib
from launcher.goodput import PARTS
from launcher.plots import Line, Mark, chart, timeline_chart
from launcher.report import memory_line, report, seconds
from launcher.reporting import time_line
from launcher.watch import describe_evaluation, describe_failure, number
from trainer.rundir import Json, RunDirectory, read_json, write_text

_MESSAGE_CHARACTERS = 2000


def write_report(run: RunDirectory, path: Path | None = None) -> Path:
    """Write the report to `path` (default: report.html in the run directory) in one step; returns the path."""
    path = path or run.path / "report.html"
    write_text(path, render(run))
    return path


def fill(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A page of HTML: a template beside this file, and what goes into it; strings are escaped."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= filters
    return pages.get_template(template).render(**values)


def render(run: RunDirectory) -> str:
    """The HTML. Everything that comes from the run is escaped."""
    from markupsafe import Markup

    value, events = report(run), run.merged_events()
    spans = time_line(run, value["state"], events)
    attempts = [(int(e["attempt"]), float(e["time"])) for e in events if e["event"] == "attempt"]
    steps = run.step_lines()
    config = read_json(run.config_path) or {}
    metric = str((config.get("evaluation") or {}).get("metric"))
    wall = value["goodput"]["wall_seconds"]
    spent = [(part, value["goodput"]["seconds"][part]) for part in PARTS]
    return fill(
        "report.html",
        {"seconds": seconds, "number": number},
        value=value,
        timeline=Markup(timeline_chart(spans, attempts, list(_marks(events, value["evaluations"])))),
        plots=[(title, note, Markup(svg)) for title, note, svg in _plots(steps, value["evaluations"], metric) if svg],
        parts=[(part, s, 100 * s / wall) for part, s in spent if s > 0] if wall else [],
        failures=[{**f, "message": str(f["message"])[:_MESSAGE_CHARACTERS]} for f in value["failures"]],
        facts=[
            *_facts(config, read_json(run.plan_path) or {}),
            *([("memory of a rank", memory_line(value["memory"]))] if value["memory"] else []),
        ],
        config=json.dumps(config, indent=2, ensure_ascii=False),
        scores=[{k: v for k, v in entry.items() if isinstance(v, int | float)} for entry in value["evaluations"]],
    )


def _plots(steps: Sequence[Json], evaluations: Sequence[Json], metric: str) -> Iterator[tuple[str, str, str]]:
    """(title, what the lines are, svg) of each; the score is `metric`, or the first where that is the loss."""

    def series(key: str, factor: float = 1.0, of: Sequence[Json] = steps) -> list[tuple[float, float]]:
        return [(float(s["step"]), factor * float(s[key])) for s in of if isinstance(s.get(key), int | float)]

    def rates(key: str) -> list[tuple[float, float]]:
        known = (s for s in steps if s.get("step_seconds") and isinstance(s.get(key), int | float))
        return [(float(s["step"]), float(s[key]) / float(s["step_seconds"])) for s in known]

    scored = series("loss", of=evaluations)
    note = "line: training, by step" + ("; dots: evaluation" if scored else "")
    losses = [Line("training loss", "first", series("loss")), Line("evaluation loss", "second", scored, dots=True)]
    yield "Loss", note, chart("loss", losses)
    found = [name for entry in evaluations for name, value in entry.items() if isinstance(value, float)]  # no counts
    scores = [name for name in found if name not in ("loss", "perplexity")]
    score = metric if metric in scores else next(iter(scores), None)
    if score is not None:
        dots = Line(score, "second", series(score, of=evaluations), dots=True)
        yield "Score", f"{score}, by step", chart(score, [dots])
    yield "Learning rate", "", chart("learning rate", [Line("learning rate", "first", series("learning_rate"))], True)
    rate = [Line("tokens", "first", rates("tokens")), Line("target tokens", "second", rates("target_tokens"))]
    yield (
        "Throughput",
        "tokens per second, all ranks; solid: without padding, dashed: learned",
        chart("rate", rate, True),
    )
    memory = [Line("memory", "first", series("memory_bytes", 1 / 2**30))]
    yield "Memory", "GiB, peak of rank 0 so far", chart("memory", memory, True)


def _marks(events: Sequence[Json], evaluations: Sequence[Json]) -> Iterator[Mark]:
    scores = {entry["step"]: {k: v for k, v in entry.items() if k != "step"} for entry in evaluations}
    for event in events:
        time, step = float(event["time"]), event.get("step")
        match event["event"]:
            case "failure":
                yield Mark(time, "failure", f"attempt {event.get('attempt')}: {describe_failure(event)}"[:400])
            case "drill":
                yield Mark(time, "drill", f"drill: {event.get('fault')} at step {step}")
            case "checkpoint":
                yield Mark(time, "checkpoint", f"checkpoint of step {step}, {gib(event.get('bytes', 0))}")
            case "evaluation":
                line = {"step": step, "evaluation": scores.get(step, {})}
                yield Mark(time, "evaluation", describe_evaluation(line))


def _facts(config: Json, plan: Json) -> Iterator[tuple[str, str]]:
    """What the run was."""
    section: dict[str, dict[str, Any]] = {k: v if isinstance(v, dict) else {} for k, v in config.items()}
    model, data, training = (section.get(key, {}) for key in ("model", "data", "training"))
    cluster, optimizer = section.get("cluster", {}), training.get("optimizer") or {}
    found = {
        "task": section.get("task", {}).get("type"),
        "model": model.get("path") or (model.get("config") or {}).get("model_type"),
        "dtype": model.get("dtype"),
        "data": ", ".join(str(source.get("path")) for source in data.get("train") or ()),
        "sequence length": data.get("sequence_length"),
        "global batch": training.get("global_batch_size"),
        "length": f"{training.get('max_steps')} steps"
        if training.get("max_steps")
        else f"{training.get('epochs')} epochs",
        "learning rate": optimizer.get("learning_rate"),
        "schedule": (training.get("schedule") or {}).get("type"),
        "backend": cluster.get("backend"),
        "ranks": plan.get("world_size"),
        "ZeRO stage": plan.get("deepspeed", {}).get("zero_optimization", {}).get("stage"),
    }
    yield from ((name, str(value)) for name, value in found.items() if value)
