"""A run's checkpoints as files: listing, verifying, comparing, keeping and setting aside. Torch-free.

The layout of a checkpoint is in `trainer.checkpoint`, which writes and loads them; docs/checkpoints.md is for users.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainer.config.schema import LaunchConfig
from trainer.failures import StorageError, UserError
from trainer.rundir import RunDirectory, read_json, write_json

_PREFIX = "step-"


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A folder below checkpoints/.

    Attributes:
        step: completed optimizer steps.
        status: ``published`` (its manifest is there), ``unpublished`` (a save under way, or cut short) or
            ``abandoned`` (damaged, or gone back behind); only published ones are ever loaded.
        size: bytes, as the manifest says; of the files that are there, without one.
        world_size: ranks that wrote it; None without a manifest.
        scores: of the evaluation at this step, if there was one.
    """

    folder: Path
    step: int
    status: str
    size: int
    world_size: int | None
    scores: Mapping[str, float]


def list_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """Everything below checkpoints/, by step; abandoned ones included."""
    found = []
    if run.checkpoints_dir.is_dir():
        for folder in sorted(run.checkpoints_dir.glob(f"{_PREFIX}*")):
            number, _, rest = folder.name.removeprefix(_PREFIX).partition(".")
            if number.isdecimal() and folder.is_dir():
                found.append(_describe(folder, int(number), rest))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.folder.name))


def _describe(folder: Path, step: int, rest: str) -> Checkpoint:
    try:
        manifest = read_json(folder / "manifest.json")
        size = sum(int(entry["bytes"]) for entry in manifest["files"].values()) if manifest else 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: `verify` says how
        manifest, size = {}, 0
    status = "published" if manifest is not None else "unpublished"
    if rest:
        status = rest.partition("-")[0]
    if not manifest:
        with suppress(FileNotFoundError):  # it is being removed
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    evaluation = (manifest or {}).get("evaluation") or {}
    return Checkpoint(folder, step, status, size, (manifest or {}).get("world_size"), evaluation)


def published(run: RunDirectory, step: int | None = None) -> Path:
    """The folder of a published checkpoint: of ``step``, or the newest. Raises UserError if there is none."""
    steps = run.published_checkpoints()
    if not steps:
        raise UserError(f"{run.checkpoints_dir}: this run has no checkpoint yet")
    if step is not None and step not in steps:
        raise UserError(f"{run.checkpoints_dir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return run.checkpoints_dir / folder_name(steps[-1] if step is None else step)


def add_scores(run: RunDirectory, step: int, scores: Mapping[str, float]) -> None:
    """To the checkpoint of a step that was evaluated after it was published; nothing where there is none."""
    path = run.checkpoints_dir / folder_name(step) / "manifest.json"
    if manifest := read_json(path):
        write_json(path, {**manifest, "evaluation": dict(scores)})


# -- damage --------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def damage(folder: Path, share: Callable[[int], bool] = lambda _: True) -> str | None:
    """What is wrong with a published checkpoint, or None.

    ``share`` picks the files to look at, by their index: of W ranks that would all look at W files, a file system with
    one metadata server sees W * W questions.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, ranks = manifest["files"], int(manifest["world_size"])
        if folder.name != folder_name(int(manifest["step"])):
            return f"{folder} holds the checkpoint of step {manifest['step']}"
        if unlisted := {"state.json", *(rank_file(rank, ranks) for rank in range(ranks))} - files.keys():
            return f"{folder / 'manifest.json'} does not list {min(unlisted)}"
        for index, (name, entry) in enumerate(sorted(files.items())):
            if not share(index):
                continue
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if checksum(path) != entry["xxh3_128"]:
                return f"{path} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder}: {type(error).__name__}: {error}"
    return None


# -- what stays and what goes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """Which published checkpoints are kept: the newest, the best by a score, and one of every so many steps."""

    keep_last: int
    keep_best: int = 0
    keep_every_steps: int | None = None
    metric: str = "loss"
    maximise: bool = False


def retention_of(config: LaunchConfig) -> Retention:
    """What a config asks for."""
    kept, judged = config.checkpoint, config.evaluation
    return Retention(kept.keep_last, kept.keep_best, kept.keep_every_steps, judged.metric, judged.maximise)


def exported_step(run: RunDirectory, config: LaunchConfig) -> int | None:
    """The step of the checkpoint that the config wants exported; None: the newest one."""
    if config.export.checkpoint == "last":
        return None
    ranked = by_score(list_checkpoints(run), retention_of(config))
    return ranked[0].step if ranked else None


def by_score(checkpoints: Sequence[Checkpoint], retention: Retention) -> list[Checkpoint]:
    """Published checkpoints that were scored, the best first; of equal ones the earlier, as early stopping has it."""
    sign = -1.0 if retention.maximise else 1.0
    scored = [
        c for c in checkpoints if c.status == "published" and not math.isnan(c.scores.get(retention.metric, math.nan))
    ]
    return sorted(scored, key=lambda c: (sign * c.scores[retention.metric], c.step))


def superfluous(checkpoints: Sequence[Checkpoint], retention: Retention) -> list[Checkpoint]:
    """The published checkpoints that ``retention`` does not keep; never the newest one. Pure."""
    candidates = sorted((c for c in checkpoints if c.status == "published"), key=lambda c: c.step)
    kept = {c.step for c in candidates[-max(retention.keep_last, 1) :]}
    kept |= {c.step for c in by_score(candidates, retention)[: retention.keep_best]}
    if retention.keep_every_steps is not None:
        # The first one at or after each multiple: saves need not fall on multiples. The first of a block stays the
        # first for ever, since it is kept from then on.
        blocks: dict[int, int] = {}
        for candidate in candidates:
            blocks.setdefault(candidate.step // retention.keep_every_steps, candidate.step)
        blocks.pop(0, None)
        kept |= set(blocks.values())
    return [c for c in candidates if c.step not in kept]


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill in between leaves nothing that could be taken for one."""
    doomed = folder.with_name(folder.name + ".deleting")
    folder.rename(doomed)
    _delete(doomed)


def _delete(folder: Path) -> None:
    """Delete a folder as far as that goes; of a link to one, which somebody has moved elsewhere, the link alone."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_unpublished(checkpoints: Path) -> list[str]:
    """Remove what a killed save or removal has left; names of the folders removed."""
    removed = []
    if checkpoints.is_dir():
        for folder in sorted(checkpoints.iterdir()):
            suffix = folder.name.removeprefix(_PREFIX)
            unpublished = suffix.isdigit() and not (folder / "manifest.json").is_file()
            if folder.name.startswith(_PREFIX) and (unpublished or suffix.endswith(".deleting")):
                _delete(folder)
                removed.append(folder.name)
    return removed


def abandon(folder: Path) -> Path:
    """Set a checkpoint aside under a name that is never taken for one; nothing is deleted."""
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.abandoned-{number}")
        if not target.exists():
            return folder.rename(target)
    raise StorageError(f"too many abandoned checkpoints beside {folder}: remove some")


def fast_list(run: RunDirectory) -> Path:
    """Which checkpoints on node-local storage count; see `trainer.fast_tier`."""
    return run.checkpoints_dir / "fast.json"


def abandon_after(run: RunDirectory, step: int) -> list[str]:
    """Set aside the published checkpoints of later steps, the newest first; their new names.

    Checkpoints of the fast tier count no more.
    """
    fast_list(run).unlink(missing_ok=True)
    later = [number for number in run.published_checkpoints() if number > step]
    return [abandon(run.checkpoints_dir / folder_name(number)).name for number in reversed(later)]


# -- comparing -----------------------------------------------------------------------------------------------------


def differences(a: Path, b: Path) -> Iterator[tuple[str, Any, Any]]:
    """(what, in a, in b) wherever two checkpoints' states or files differ; slices are compared by checksum."""
    for key, old, new in _leaves("", read_json(a / "state.json") or {}, read_json(b / "state.json") or {}):
        yield f"state.{key}", old, new
    files = [(read_json(folder / "manifest.json") or {}).get("files", {}) for folder in (a, b)]
    for name in sorted((files[0].keys() | files[1].keys()) - {"state.json"}):
        old, new = (entries.get(name, {}).get("xxh3_128") for entries in files)
        if old != new:
            yield f"files.{name}", old, new


def _leaves(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _leaves(f"{path}.{key}".lstrip("."), old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
