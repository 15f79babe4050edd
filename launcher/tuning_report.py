"""What a study has found: a table, the best config, and one HTML file with plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.console import print_table, printable
from launcher.html_report import fill
from launcher.plots import Line, chart
from launcher.state import run_state
from launcher.trials import text
from launcher.tuning import Search, Study
from trainer.config.tuning import Categorical, LogUniform
from trainer.rundir import Json, write_json, write_text

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

UNDER_WAY = ("running", "interrupted")  # an interrupted one goes on when the study does
_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


def summary(study: Study) -> Json:
    """The study as JSON: {study, metric, maximise, finished, count, trials: [...], best: a trial or None}."""
    search = study.search
    trials = [_trial(search, trial) for trial in study.trials()]
    done = [trial for trial in trials if trial["state"] == "finished"]
    sign = 1.0 if search.maximise else -1.0
    return {
        "study": str(search.folder),
        "metric": search.metric,
        "maximise": search.maximise,
        "finished": len(trials) >= search.count and not any(trial["state"] in UNDER_WAY for trial in trials),
        "count": search.count,
        "trials": trials,
        "best": max(done, key=lambda trial: (sign * trial["value"], -trial["number"]), default=None),
    }


def _trial(search: Search, trial: FrozenTrial) -> Json:
    steps, run = trial.intermediate_values, search.run(trial.number)
    duration, state = trial.duration, _STATES[trial.state.name]
    if state == "running" and run_state(run).state in ("stopped", "failed"):
        state = "interrupted"
    return {
        "number": trial.number,
        "state": state,
        "value": trial.value if trial.value is not None else steps[max(steps)] if steps else None,
        "step": trial.user_attrs.get("step", max(steps, default=None)),
        "values": search.values(trial.params),
        "seconds": None if duration is None else duration.total_seconds(),
        "run": str(run.path),
        "class": trial.user_attrs.get("class"),
        "message": trial.user_attrs.get("message"),
    }


def write_results(study: Study) -> Json:
    """Write tune.html and, once a trial has finished, best.json into the study's folder; returns the summary."""
    value, folder = summary(study), study.search.folder
    best_path = folder / "best.json"
    if value["best"] is not None:
        write_json(best_path, study.search.best_config(value["best"]["values"]), indent=2)
        value |= {"best_config": str(best_path), "launch": f"dsft launch {best_path}"}
    page = folder / "tune.html"
    write_text(page, render(study.search, value))
    return {**value, "html": str(page)}


def show(value: Json) -> None:
    """Print the trials as a table, and how to launch the best."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    keys = list(value["trials"][0]["values"]) if value["trials"] else []
    table = Table(box=None, header_style="dim")
    for name in ("trial", "state", value["metric"], "step", *_short(keys), ""):
        table.add_column(escape(name), justify="left" if name in ("state", "") else "right", overflow="fold")
    for trial in value["trials"]:
        best = value["best"] is not None and trial["number"] == value["best"]["number"]
        cells = [trial["number"], trial["state"], trial["value"], trial["step"], *trial["values"].values()]
        words = ["" if cell is None else text(cell) for cell in cells]
        note = f"{trial['class']}: {printable(trial['message'])[:200]}" if trial["message"] else "best" * best
        table.add_row(*(escape(word) for word in (*words, note)), style="bold" if best else None)
    console = Console(highlight=False)
    print_table(console, table)
    console.print(f"plots: {value['html']}", soft_wrap=True, markup=False)
    if "launch" in value:
        console.print(f"best: trial {value['best']['number']}; {value['launch']}", soft_wrap=True, markup=False)


def _short(keys: list[str]) -> list[str]:
    """The last parts of keys, where they tell them apart."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def render(search: Search, value: Json) -> str:
    """The HTML page. Everything from outside is escaped."""
    from markupsafe import Markup

    return fill(
        "tune.html",
        {"text": text},
        value=value,
        name=search.config.name,
        keys=list(search.settings.space),
        plots=[(title, Markup(svg)) for title, svg in _plots(search, value) if svg],
    )


def _plots(search: Search, value: Json) -> Iterator[tuple[str, str]]:
    """(title, svg): the values by trial with the best so far, then against each parameter."""
    known = [trial for trial in value["trials"] if trial["value"] is not None]
    done = [trial for trial in known if trial["state"] == "finished"]
    better = max if search.maximise else min
    so_far: list[tuple[float, float]] = []
    for trial in done:
        so_far.append((trial["number"], better(trial["value"], so_far[-1][1]) if so_far else trial["value"]))
    dots = Line(search.metric, "second", [(trial["number"], trial["value"]) for trial in known], dots=True)
    yield f"{search.metric} by trial", chart("history", [Line("best so far", "first", so_far), dots], x_name="trial")
    for key, of in search.settings.space.items():
        logarithmic = isinstance(of, LogUniform)
        places = [json.dumps(choice) for choice in of.choices] if isinstance(of, Categorical) else []

        def place(chosen: Any, places: list[str] = places, logarithmic: bool = logarithmic) -> float:
            return places.index(json.dumps(chosen)) if places else math.log10(chosen) if logarithmic else chosen

        def written(x: float, places: list[str] = places, logarithmic: bool = logarithmic) -> str:
            if places:
                return places[round(x)] if x == round(x) and 0 <= x < len(places) else ""
            return f"{10**x:.3g}" if logarithmic else f"{x:.4g}"

        points = sorted((place(trial["values"][key]), trial["value"]) for trial in known)
        yield (
            f"{search.metric} against {key}",
            chart(key, [Line(search.metric, "second", points, dots=True)], x_name=key, x_text=written),
        )
