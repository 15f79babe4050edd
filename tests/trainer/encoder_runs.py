"""Small whole runs of the tasks that read a text at once: a tiny BERT, and a WordPiece tokenizer of its data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_runs import launch, logs

from launcher.facts import gather_facts
from launcher.plan import make_plan
from trainer.config.schema import LaunchConfig
from trainer.rundir import RunDirectory, write_json
from trainer.tasks import Task, get_task
from trainer.tokenizer import load_tokenizer


def make_workspace(folder: Path, texts: Iterable[str], **files: Sequence[dict[str, Any]]) -> Path:
    """tokenizer.json, trained on texts, and a JSON-lines file of records for each further name."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import BertProcessing

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=300, min_frequency=1, show_progress=False)
    cls, sep = ((str(name), tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]"))
    tokenizer._tokenizer.post_processor = BertProcessing(sep, cls)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def make_config(workspace: Path, task: dict[str, Any], **changes: Any) -> LaunchConfig:
    """A config that learns train.jsonl and is scored on test.jsonl; ``changes`` are of its sections."""
    sections: dict[str, Any] = {
        "name": "run",
        "task": task,
        "model": {
            "config": {
                "model_type": "bert",
                "vocab_size": 320,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            "tokenizer": str(workspace / "tokenizer.json"),
            "dtype": "float32",
        },
        "data": {
            "train": [{"path": str(workspace / "train.jsonl")}],
            "evaluation": [{"path": str(workspace / "test.jsonl")}],
            "sequence_length": 48,
            "workers": 0,
        },
        "training": {
            "global_batch_size": 12,
            "micro_batch_size": 4,
            "max_steps": 40,
            "optimizer": {"learning_rate": 5e-3},
            "schedule": {"type": "linear", "warmup_steps": 2},
        },
        "checkpoint": {"interval_steps": None},
        "evaluation": {"interval_steps": 20},
        "logging": {"tensorboard": False},
        "cluster": {"environment": {"DS_ACCELERATOR": "cpu"}},
    }
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return LaunchConfig.model_validate(sections)


def run_at(folder: Path, config: LaunchConfig, ranks: int, micro_batch_size: int) -> RunDirectory:
    """A finished run of a config."""
    changed = config.model_dump(mode="json")
    changed |= {"name": folder.name, "output_dir": str(folder.parent)}
    changed["training"]["micro_batch_size"] = micro_batch_size
    changed["cluster"]["processes_per_node"] = ranks
    config = LaunchConfig.model_validate(changed)
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    write_json(run.config_path, config.model_dump(mode="json"))
    write_json(run.plan_path, make_plan(config, gather_facts(config)).to_json())
    assert launch(run, ranks) == 0, logs(run)
    return run


def same_runs(run: RunDirectory, other: RunDirectory) -> None:
    """Losses and scores of two runs differ by rounding alone, which 40 steps at a high learning rate let grow."""
    assert [line["batch_digest"] for line in run.step_lines()] == [line["batch_digest"] for line in other.step_lines()]
    losses = [line["loss"] for line in run.step_lines()]
    assert losses == pytest.approx([line["loss"] for line in other.step_lines()], rel=2e-2)
    assert losses[:5] == pytest.approx([line["loss"] for line in other.step_lines()][:5], rel=1e-5)
    for line, its in zip(run.evaluation_lines(), other.evaluation_lines(), strict=True):
        assert line["evaluation"] == pytest.approx(its["evaluation"], rel=1e-3)


def task_of(config: LaunchConfig) -> Task:
    return get_task(config, load_tokenizer(config.model))


def last_scores(run: RunDirectory) -> dict[str, float]:
    scores: dict[str, float] = run.evaluation_lines()[-1]["evaluation"]
    return scores
