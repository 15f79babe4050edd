"""What may change on resume: every key of the config is in the table, and the table does what it says."""

from __future__ import annotations

import copy
import json
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
        ("data.workers", 3, True),
        ("data.prepared", "/prepared", True),
        ("data.train.0.path", "/moved", True),
        ("data.train.0.epochs", 2.0, False),
        ("model.freeze", ["a"], False),
    ],
)
def test_the_table_is_kept(path: str, value: Any, allowed: bool, run: RunDirectory) -> None:
    config = copy.deepcopy(json.loads(run.config_path.read_text()))
    *sections, key = path.split(".")
    node = config
    for section in sections:
        node = node[int(section) if section.isdigit() else section]
    assert node[key] != value
    node[key] = value
    if allowed:
        refuse_changes(run, config)
    else:
        with pytest.raises(UserError, match=path.partition(".0")[0].replace(".", r"\.")):
            refuse_changes(run, config)


def test_other_data_is_for_those_who_allow_it(run: RunDirectory) -> None:
    config = json.loads(run.config_path.read_text())
    config["data"]["train"].append({"path": "/more"})
    with pytest.raises(UserError, match=r"data\.train"):
        refuse_changes(run, config)
    config["data"]["allow_changed"] = True
    refuse_changes(run, config)


def test_keys_of_a_newer_version_are_no_change_at_their_defaults(run: RunDirectory) -> None:
    """A run begun by an older version, whose config.json lacks keys in every section, and in lists."""
    old = json.loads(run.config_path.read_text())
    newer = copy.deepcopy(old)
    for section, key in (("model", "train_only"), ("model", "adapter"), ("data", "prepared"), ("training", "seed")):
        del old[section][key]
    del old["training"]["optimizer"]["groups"], old["data"]["train"][0]["quoting"]
    write_json(run.config_path, old)
    refuse_changes(run, newer)
    newer["training"]["optimizer"]["groups"] = [{"match": ["a"], "weight_decay": 0.5}]
    with pytest.raises(UserError, match=r"training\.optimizer\.groups: the run has \[\]"):
        refuse_changes(run, newer)


def test_a_run_whose_config_is_valid_no_more_is_still_compared(run: RunDirectory) -> None:
    old = json.loads(run.config_path.read_text())
    newer = copy.deepcopy(old)
    old["model"]["gone"] = 1
    write_json(run.config_path, old)
    with pytest.raises(UserError, match=r"model\.gone: the run has 1, the config null"):
        refuse_changes(run, newer)


def test_a_model_may_be_reached_by_a_link_and_may_have_moved(run: RunDirectory, tmp_path: Path) -> None:
    def begun_with(path: Path, now: Path) -> None:
        config = json.loads(run.config_path.read_text())
        config["model"]["path"] = str(path)
        write_json(run.config_path, config)
        refuse_changes(run, {**config, "model": {**config["model"], "path": str(now)}})

    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    begun_with(tmp_path / "model", tmp_path / "link")
    begun_with(tmp_path / "on-another-cluster", tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.path: the run has"):
        begun_with(tmp_path / "model", tmp_path / "other")


def test_a_finished_run_is_a_start_for_another(run: RunDirectory) -> None:
    config = json.loads(run.config_path.read_text())
    config["training"]["max_steps"] = 16
    run.export_dir.mkdir()
    with pytest.raises(UserError, match=f"can start from its weights: `model.path` {run.export_dir}$"):
        refuse_changes(run, config)


def test_of_a_source_what_differs_is_told_and_no_more(run: RunDirectory) -> None:
    config = json.loads(run.config_path.read_text())
    config["data"]["train"][0]["columns"] = {"text": "body"}
    with pytest.raises(UserError, match=r'data\.train\.0\.columns\.text: the run has null, the config "body"\n'):
        refuse_changes(run, config)
