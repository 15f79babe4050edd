"""What may change on resume: every key of the config is in the table, and the table does what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from launcher.consistency import _FIXED, FREE, refuse_changes
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.rundir import RunDirectory, append_line, write_json

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_every_section_is_decided_and_documented() -> None:
    assert not _FIXED.keys() & FREE
    assert set(LaunchConfig.model_fields) <= _FIXED.keys() | FREE, "decide: may it change on resume?"
    text = DOCUMENT.read_text()
    for section, free in _FIXED.items():
        fields: Any = LaunchConfig.model_fields[section].annotation
        for key in free:
            assert key in fields.model_fields, f"{section}.{key} is no key of the config"
            assert f"`{section}.{key}`" in text
    assert all(f"`{section}`" in text for section in FREE)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    config = {
        "name": "r",
        "task": {"type": "causal-lm"},
        "model": {"path": "/m"},
        "data": {"train": [{"path": "/d"}], "sequence_length": 8},
        "training": {"global_batch_size": 1, "max_steps": 8},
    }
    write_json(run.config_path, LaunchConfig.model_validate(config).model_dump(mode="json"))
    append_line(run.metrics_path, {"step": 1, "loss": 1.0})
    return run


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("training.on_nonfinite", "rollback", True),
        ("training.loss_spike", {"window": 16}, True),
        ("training.micro_batch_size", 1, True),
        ("checkpoint.keep_last", 9, True),
        ("deepspeed.zero_stage", 2, True),
        ("cluster.processes_per_node", 4, True),
        ("training.global_batch_size", 2, False),
        ("training.optimizer.learning_rate", 1.0, False),
        ("training.max_steps", 9, False),
        ("data.seed", 5, False),
        ("model.freeze", ["a"], False),
    ],
)
def test_the_table_is_kept(path: str, value: Any, allowed: bool, run: RunDirectory) -> None:
    import json

    config = copy.deepcopy(json.loads(run.config_path.read_text()))
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    assert node[key] != value
    node[key] = value
    if allowed:
        refuse_changes(run, config)
    else:
        with pytest.raises(UserError, match=path.replace(".", r"\.")):
            refuse_changes(run, config)
