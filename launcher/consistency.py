"""What may not change between launches of one run, once it has trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.rundir import RunDirectory, read_json

# The table of docs/checkpoints.md. Sections that make up what is trained are fixed, but for the keys here, which change
# speed, memory or what is watched, not the result ...
_FIXED: dict[str, frozenset[str]] = {
    "task": frozenset(),
    "model": frozenset(
        {
            "attention",
            "gradient_checkpointing",
            "activation_offload",
            "compile",
            "kernels",
            "fused_loss",
            "sequence_parallel",
            "trust_remote_code",
        }
    ),
    "data": frozenset({"evaluation", "workers", "prepared", "allow_changed"}),
    "training": frozenset({"micro_batch_size", "deterministic", "on_nonfinite", "loss_spike", "max_rollbacks"}),
}
# ... and these may change from one launch to the next; `name` and `output_dir` say which run it is.
FREE = frozenset(
    {
        "name",
        "output_dir",
        "deepspeed",
        "checkpoint",
        "evaluation",
        "export",
        "tune",
        "logging",
        "cluster",
        "resilience",
    }
)


def refuse_changes(run: RunDirectory, config: dict[str, Any]) -> None:
    """Raise UserError if `config` (resolved) would train something else than `run` has begun to train."""
    before = read_json(run.config_path)
    if before is None or not (run.step_lines() or run.published_checkpoints()):
        return
    before, config = _complete(before), _complete(config)
    if config.get("data", {}).get("allow_changed"):
        before["data"] = {**before["data"], "train": config["data"]["train"]}
    changes = [
        f"  {path}: the run has {json.dumps(old, ensure_ascii=False)}, the config {json.dumps(new, ensure_ascii=False)}"
        for section, free in _FIXED.items()
        for path, old, new in differences(section, before.get(section), config.get(section))
        if path.removeprefix(f"{section}.").split(".")[0] not in free and not _moved(path, old, new)
    ]
    if changes:
        raise UserError(
            f"{run.path} has begun to train something else:\n"
            + "\n".join(changes)
            + "\nGive the new run another `name`, or undo the change to continue the old one"
            + f"; a new one can start from its weights: `model.path` {run.export_dir}" * run.export_dir.is_dir()
        )


def _moved(path: str, old: Any, new: Any) -> bool:
    """Whether two values name one place, as over a link, or a model or tokenizer that is where it was no more.

    Ranks compare the tokenizer, and the weights that a checkpoint takes from the model, with what they were.
    """
    if path not in ("model.path", "model.tokenizer") or not all(
        isinstance(v, str) and os.path.isabs(v) for v in (old, new)
    ):
        return False
    return os.path.realpath(old) == os.path.realpath(new) or not os.path.exists(old)


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that it lacks, being of a version without them; as it is where it is valid no more.

    Without the paths of training data: it may have moved, and ranks compare its content with the checkpoint's.
    """
    with suppress(ValidationError):
        config = LaunchConfig.model_validate(config).model_dump(mode="json")
    data = config.get("data", {})
    moved = ("path", "source_path", "target_path")
    sources = [{key: value for key, value in of.items() if key not in moved} for of in data.get("train", ())]
    return {**config, "data": {**data, "train": sources}}


def differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of what differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(f"{path}.{key}", old.get(key), new.get(key))
    elif _objects(old) and _objects(new) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(f"{path}.{index}", one, other)
    elif old != new:
        yield path, old, new


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
