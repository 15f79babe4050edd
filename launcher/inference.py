"""What `dsft predict` and `dsft eval` share: a trained model's folder and config, and ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends.local import LocalBackend
from launcher.gpus import find_gpus
from launcher.registry import find_run
from launcher.watch import duration
from trainer.checkpoint_files import published
from trainer.config.schema import LaunchConfig
from trainer.failures import DataError, DsftError, UserError
from trainer.processes import child_environment
from trainer.rundir import EXPORT_ABOUT, LineReader, RunDirectory, read_json, write_json

_POLL_SECONDS = 0.05
_SHOW_SECONDS = 1.0
_LOG_LINES = 20


@dataclass(frozen=True)
class Trained:
    """A model to be used.

    Attributes:
        folder: in the layout of Hugging Face.
        config: as JSON, of its training; `model` names the folder.
        processes: ranks to run where the command line does not say.
        step: optimizer steps, where dsft knows.
        batch_size: samples of a rank's forward pass, where the command line does not say.
        environment: variables of the ranks.
    """

    folder: Path
    config: dict[str, Any]
    processes: int
    step: int | None
    batch_size: int
    environment: dict[str, str]


def find_trained(text: str, step: int | None, export: Path | None, task: str | None, work: Path) -> Trained:
    """The model that the command line names: a run (its newest checkpoint, or another), or an export's folder.

    Args:
        text: run directory, name of a run, or a Hugging Face folder.
        step: of the run's checkpoint; None: the newest.
        export: folder to be used instead of a checkpoint of the run.
        task: type of the task, where the folder does not say.
        work: where a checkpoint is exported to, unless it has been.

    Raises:
        UserError: there is no such thing.
    """
    if (Path(text) / "config.json").is_file() and "model_type" in (read_json(Path(text) / "config.json") or {}):
        if step is not None or export is not None:
            raise UserError(f"{text} is an exported model, not a run: --step and --export do not apply")
        return _from_export(Path(text), task)
    run = find_run(text)
    config = read_json(run.config_path)
    plan = read_json(run.plan_path) or {}
    if export is None:
        export, step = _exported(run, step, work)
    else:
        step = (read_json(export / EXPORT_ABOUT) or {}).get("step")
    if not (export / "config.json").is_file():
        raise UserError(f"{export} is no exported model: it has no config.json")
    cluster = config.get("cluster", {})
    return Trained(
        export,
        _use(config, export),
        int(plan.get("processes_per_node") or 1) if plan.get("nodes", 1) == 1 else _own_processes(),
        step,
        int(plan.get("batch", {}).get("micro_batch_size") or 8),
        dict(cluster.get("environment", {})) if cluster.get("backend") == "local" else {},
    )


def _own_processes() -> int:
    return max(1, len(find_gpus(os.environ)))


def _exported(run: RunDirectory, step: int | None, work: Path) -> tuple[Path, int]:
    """(folder, step) of a checkpoint as a Hugging Face folder: the run's export if it is of that step, or a new one."""
    wanted = int(published(run, step).name.removeprefix("step-"))
    whole = (run.export_dir / "config.json").is_file()  # which an adapter by itself has not
    if whole and (read_json(run.export_dir / EXPORT_ABOUT) or {}).get("step") == wanted:
        return run.export_dir, wanted
    folder = work / "model"
    command = [sys.executable, "-P", "-m", "trainer.export", "--run-dir", str(run.path), "--step", str(wanted)]
    command += ["--adapter", "merge"]
    done = subprocess.run(
        [*command, "--output", str(folder)], env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        error = UserError if done.returncode == UserError.exit_code else DsftError
        raise error(done.stderr.strip().rpartition("error: ")[2])
    return folder, wanted


def _from_export(folder: Path, task: str | None) -> Trained:
    about = read_json(folder / EXPORT_ABOUT)
    if about is not None and task in (None, about["config"]["task"]["type"]):
        return Trained(folder, _use(about["config"], folder), _own_processes(), about["step"], 8, {})
    if task is None:
        raise UserError(f"{folder} does not say what it was trained for: name it, as --task text-classification")
    model = read_json(folder / "config.json")
    config = {
        "name": "predict",
        "task": {"type": task} | (_problem(model) if task == "text-classification" else {}),
        "data": {"train": [{"path": str(folder)}], "sequence_length": _longest(folder, model)},
        "training": {"global_batch_size": 8, "max_steps": 1},
    }
    return Trained(folder, _use(config, folder), _own_processes(), None, 8, {})


def _problem(model: dict[str, Any]) -> dict[str, str]:
    """What a sequence classifier's config says of its answers."""
    problem = str(model.get("problem_type") or "")
    if problem == "regression" or (not problem and len(model.get("id2label") or "..") == 1):
        return {"problem": "regression"}
    return {"problem": "multi-label" if problem.startswith("multi") else "single-label"}


def _longest(folder: Path, model: dict[str, Any]) -> int:
    """Tokens that a model takes at once."""
    limit = (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length")
    positions = model.get("max_position_embeddings")
    known = [int(value) for value in (limit, positions) if isinstance(value, int | float) and 0 < value < 1_000_000]
    return min(known, default=512)


def _use(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config whose model is the one in a folder, with the labels that it has."""
    before = config.get("model", {})
    model = {name: before[name] for name in ("attention", "trust_remote_code") if name in before}
    task = dict(config["task"])
    description = read_json(folder / "config.json")
    if "dtype" in before:
        model["dtype"] = before["dtype"]
    elif str(description.get("dtype") or description.get("torch_dtype")) != "bfloat16":
        model["dtype"] = "float32"
    names = description.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if task["type"] in ("text-classification", "token-classification") and task.get("problem") != "regression":
        task["labels"] = [names[key] for key in sorted(names, key=int)]
        task["class_weights"] = task.get("class_weights") or []
    if task["type"] == "image-classification":
        task["labels"] = [names[key] for key in sorted(names, key=int)]
    chosen = {"path": str(folder.absolute()), "gradient_checkpointing": False, **model}
    return {**config, "task": task, "model": chosen, "cluster": {"backend": "local"}}


def sources(
    config: dict[str, Any], paths: Sequence[str], columns: Sequence[str], column_names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Data sources for files, read as the config's own data of the same kind is, else with its columns.

    Args:
        config: of the training.
        paths: files, folders, globs or URLs.
        columns: `--columns`, as in text=sentence.
        column_names: `--column-names`.

    Raises:
        UserError: columns that are not written so.
    """
    data = config["data"]
    known = [*data.get("evaluation", ()), *data["train"]]
    given = {"columns": columns_of(columns), "column_names": column_names}
    found = []
    for path in paths:
        like = next((source for source in known if Path(source["path"]).suffix == Path(path).suffix), None)
        fields = ("columns", "template", "format", "column_names", "quoting", "subset", "split")
        kept = fields if like is not None else fields[:2]
        source = {name: (like or known[0])[name] for name in kept if name in (like or known[0])}
        source |= {name: value for name, value in given.items() if value}
        if columns:
            source.pop("template", None)
        where = path if "://" in path else str(Path(path).absolute())
        if source.get("format") == "parallel":  # lines without targets, which a prediction does not look at
            found.append({"format": "parallel", "source_path": where, "target_path": where})
        else:
            found.append({**source, "path": where})
    return found


def run_ranks(
    module: str, config: LaunchConfig, trained: Trained, batch_size: int | None, processes: int | None, work: Path
) -> None:
    """Run a rank program to its end; it finds the request in `work/request.json`, and its log and failures go there.

    On a terminal it says how many lines the ranks have written to `work/part-*.jsonl` so far.

    Raises:
        DsftError: what the first failing rank says.
    """
    run = RunDirectory(work)
    request = {"config": config.model_dump(mode="json"), "batch_size": batch_size or trained.batch_size}
    write_json(work / "request.json", request)
    backend = LocalBackend(run, processes or trained.processes, trained.environment, module)
    attempt, progress = backend.start(1), _Progress(work)
    try:
        attempt.release()
        while (codes := attempt.poll()) is None:
            time.sleep(_POLL_SECONDS)
            progress.tick()
    finally:
        attempt.kill()
        progress.close()
    if any(codes.values()):
        raise _failure(run)


class _Progress:
    """On a terminal, how long the ranks have worked and how many lines of answers they have written."""

    def __init__(self, work: Path) -> None:
        self._work, self._start, self._next = work, time.monotonic(), _SHOW_SECONDS
        self._parts: dict[Path, LineReader] = {}
        self._lines = 0

    def tick(self) -> None:
        seconds = time.monotonic() - self._start
        if seconds < self._next or not sys.stderr.isatty():
            return
        self._next = seconds + _SHOW_SECONDS
        for part in self._work.glob("part-*.jsonl"):
            self._lines += len(self._parts.setdefault(part, LineReader(part)).read())
        records = f", {self._lines:,} records" if self._lines else ""
        print(end=f"\r{duration(seconds)}{records}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print(end="\r\033[K", file=sys.stderr, flush=True)


def _failure(run: RunDirectory) -> DsftError:
    records = run.failure_records(1)
    if not records:
        logs = sorted((run.attempt_dir(1) / "logs").rglob("*.log"))
        tail = "\n".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return DsftError(f"a rank has ended without a word:\n{tail}")
    record = min(records, key=lambda one: one["class"] == "communication")  # which others follow from
    kinds: dict[str, type[DsftError]] = {"user": UserError, "data": DataError}
    if record["class"] in kinds:
        return kinds[record["class"]](record["message"])
    return DsftError(f"rank {record['rank']}: {record['message']}\n{record['traceback']}")


def columns_of(items: Sequence[str]) -> dict[str, str]:
    """`text=sentence` and the like. Raises UserError."""
    pairs = [item.partition("=") for item in items]
    if any(not (name and equals and column) for name, equals, column in pairs):
        raise UserError(f"--columns {' '.join(items)}: expected TASK_COLUMN=FILE_COLUMN, as in text=sentence")
    return {name: column for name, _, column in pairs}
