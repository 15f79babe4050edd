"""Finding a run by name: a small file per run this user has launched, under $XDG_STATE_HOME/dsft/runs."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import time
from pathlib import Path

from trainer.failures import UserError
from trainer.rundir import RunDirectory, read_json, write_json


def registry_dir() -> Path:
    """Where the registry lives; it need not exist."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dsft" / "runs"


def register(run: RunDirectory) -> None:
    """Remember `run`. A home that cannot be written costs the lookup by name, not the run."""
    folder = registry_dir()
    name = hashlib.sha256(str(run.path).encode()).hexdigest()[:20]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", {"path": str(run.path), "name": run.name, "time": time.time()})


def known_runs() -> list[RunDirectory]:
    """The runs that were registered and still are there, the newest launch first."""
    entries: list[tuple[float, str]] = []
    for path in registry_dir().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a broken entry hides one run, not all
            entry = read_json(path)
            entries.append((float(entry["time"]), str(entry["path"])))
    found: dict[tuple[int, int], RunDirectory] = {}  # by what it is: links may lead to it under other names
    for run in (RunDirectory(Path(path)) for _, path in sorted(entries, reverse=True)):
        with contextlib.suppress(OSError):  # in a folder that others may not enter
            if run.exists():
                there = run.path.stat()
                found.setdefault((there.st_dev, there.st_ino), run)
    return list(found.values())


def label(path: Path) -> str:
    """A run's name; of a trial with its study's, since all of them are called after numbers."""
    return "/".join(path.parts[-3:]) if path.parent.name == "trials" else path.name


def find_run(text: str) -> RunDirectory:
    """The run that `text` names: a run directory, or a name below the current output_dir, or one launched before.

    Raises UserError, with what is known, if there is none.
    """
    places = [Path(text), *(folder / text for folder in _output_dirs() if os.sep not in text)]
    for place in places:
        if RunDirectory(place).exists():
            return RunDirectory(place)
    for run in (known := known_runs()):
        if text in (run.name, label(run.path)):
            return run
    for place in (*places, *(run.path.parents[1] for run in known if label(run.path).startswith(f"{text}/trials/"))):
        if (place / "study.journal").exists():
            raise UserError(
                f"{place} is a study: `dsft tune` with its config shows and continues it; its trials are runs, "
                f"{place / 'trials' / '0000'} and so on"
            )
    names = list(dict.fromkeys(label(run.path) for run in known))  # the newest launch first
    close = difflib.get_close_matches(text, names, n=3)
    others = f"; did you mean {' or '.join(close)}?" if close else f"; known runs: {', '.join(names[:5])}" * bool(names)
    raise UserError(f"no run {text!r}: give a run directory (it holds config.json) or the name of a run{others}")


def _output_dirs() -> list[Path]:
    """`output_dir` of ./config.json, then ./runs."""
    folders = []
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(Path("config.json").read_text(encoding="utf-8"))
        if isinstance(value, dict) and isinstance(value.get("output_dir"), str):
            folders.append(Path(value["output_dir"]))
    return [*folders, Path("runs")]
