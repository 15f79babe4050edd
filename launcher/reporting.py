"""What a run has come to, as one JSON value and as text: the end of `dsft launch`, `dsft status` and `dsft report`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from launcher.state import failures, run_state
from launcher.watch import Progress, describe_evaluation, describe_failure, duration, number
from trainer.rundir import Json, RunDirectory, read_json, read_lines


def status(run: RunDirectory) -> Json:
    """State, position and rates, without reading the whole past of the run where that is not needed."""
    state = run_state(run)
    if (run.events_dir / "submission.jsonl").exists():  # the import is slow for those who have no SLURM
        from launcher.backends.slurm import in_queue

        state = in_queue(run, state)
    progress = Progress(_epochs(run))
    for line in run.step_lines()[-20:]:
        progress.add(line)
    checkpoints = run.published_checkpoints()
    last = progress.last or {}
    return {
        "run": str(run.path),
        "name": run.name,
        "state": state.state,
        "reason": state.reason,
        "node": state.holder.node if state.holder else None,
        "attempt": max(run.attempts(), default=0),
        "restarts": sum(1 for verdict in run.verdicts() if verdict.get("action") == "retry"),
        "step": last.get("step", 0),
        "total_steps": last.get("total_steps"),
        "loss": last.get("loss"),
        "eta_seconds": progress.eta_seconds() if state.state == "running" else None,
        "last_checkpoint": checkpoints[-1] if checkpoints else None,
    }


def report(run: RunDirectory) -> Json:
    """The whole account: state, steps, losses, evaluations, goodput, failures and where things are."""
    steps, evaluations = run.step_lines(), run.evaluation_lines()
    return {
        **status(run),
        "steps": steps[-1]["step"] if steps else 0,
        "loss_first": steps[0]["loss"] if steps else None,
        "loss_last": steps[-1]["loss"] if steps else None,
        "evaluation": evaluations[-1]["evaluation"] if evaluations else None,
        "evaluations": [{"step": line["step"], **line["evaluation"]} for line in evaluations],
        "goodput": goodput(run, steps),
        "failures": failures(run),
        "checkpoints": run.published_checkpoints(),
        "export": str(run.export_dir) if (run.export_dir / "config.json").is_file() else None,
        "tensorboard": str(run.tensorboard_dir) if run.tensorboard_dir.is_dir() else None,
    }


def goodput(run: RunDirectory, steps: list[Json]) -> Json:
    """Seconds of the steps that count (each once) over the time that launches of this run were up.

    Where only every k-th step is logged, the steps between are taken to last as long as the logged ones.
    """
    logged = sum(float(line["step_seconds"]) for line in steps)
    useful = logged * (steps[-1]["step"] / len(steps)) if steps else 0.0
    wall = sum(end - start for start, end in _launches(run))
    return {"useful_seconds": useful, "wall_seconds": wall, "ratio": min(1.0, useful / wall) if wall else None}


def _launches(run: RunDirectory) -> Iterator[tuple[float, float]]:
    """(start, end) in unix seconds of each launch of the run."""
    ledger = read_lines(run.events_dir / "supervisor.jsonl")
    times = [float(event["time"]) for event in run.merged_events()]
    times += [float(line["time"]) for line in read_lines(run.metrics_path) if "time" in line]
    times.sort()
    start: float | None = None
    before = ""
    for event in ledger:
        now = float(event["time"])
        if event["event"] == "attempt":
            if start is not None and before == "attempt":  # its launcher was killed: it lasted to its last sign of life
                yield start, max((t for t in times if t < now), default=start)
                start = None
            start = now if start is None else start
        elif event["event"] in ("finished", "failed", "stopped") and start is not None:
            yield start, now
            start = None
        before = event["event"]
    if start is not None:
        yield start, time.time() if run_state(run).state == "running" else times[-1]


def _epochs(run: RunDirectory) -> float | None:
    config = read_json(run.config_path) or {}
    value = config.get("training", {}).get("epochs")
    return float(value) if value else None


def render_status(value: Json) -> str:
    """A line about a run."""
    total = f"/{value['total_steps']}" if value["total_steps"] else ""
    parts = [f"{value['name']}: {value['state']}", f"step {value['step']}{total}"]
    if value["loss"] is not None:
        parts.append(f"loss {number(value['loss'])}")
    if value["eta_seconds"] is not None:
        parts.append(f"ETA {duration(value['eta_seconds'])}")
    if value["last_checkpoint"] is not None:
        parts.append(f"last checkpoint {value['last_checkpoint']}")
    if value["restarts"]:
        parts.append(f"restarts {value['restarts']}")
    if value["node"]:
        parts.append(f"on {value['node']}")
    text = ", ".join(parts)
    return f"{text} ({value['reason']})" if value["reason"] else text


def render_report(value: Json) -> str:
    """The account as lines."""
    return "\n".join(_report_lines(value))


def _report_lines(value: Json) -> Iterator[str]:
    yield f"{value['name']}: {value['state']} at step {value['steps']}" + (
        f" ({value['reason']})" if value["reason"] else ""
    )
    rows: list[tuple[str, Any]] = [("run", value["run"])]
    if value["loss_last"] is not None:
        rows.append(("loss", f"{number(value['loss_first'])} -> {number(value['loss_last'])}"))
    scored = value["evaluations"]
    if scored:
        shown = [scored[0], scored[-1]] if len(scored) > 1 else scored
        for entry in shown:
            line = {"step": entry["step"], "evaluation": {k: v for k, v in entry.items() if k != "step"}}
            rows.append(("evaluation", describe_evaluation(line)))
    if value["goodput"]["ratio"] is not None:
        share, wall = 100 * value["goodput"]["ratio"], duration(value["goodput"]["wall_seconds"])
        rows.append(("goodput", f"{share:.0f} % of {wall} in steps that count"))
    if value["checkpoints"]:
        rows.append(("checkpoints", f"{value['run']}/checkpoints (steps {', '.join(map(str, value['checkpoints']))})"))
    rows += [(key, value[key]) for key in ("export", "tensorboard") if value[key]]
    for name, text in rows:
        yield f"  {name:<12} {text}"
    for failure in value["failures"]:
        yield f"  attempt {failure['attempt']}: {describe_failure(failure)}"
