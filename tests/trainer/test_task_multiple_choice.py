"""Multiple choice: layouts, records with different numbers of choices, and whole runs at several world sizes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_runs import last_scores, make_config, make_workspace, run_at, same_runs, task_of

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.encoding import SourceEncoder
from trainer.data.sources import open_source
from trainer.rundir import RunDirectory

COLOURS = ["black", "blue", "green", "white"]


def riddles(count: int, seed: int) -> list[dict[str, Any]]:
    """Which of two to four colours is the brightest."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        choices = draw.sample(COLOURS, draw.randint(2, 4))
        label = choices.index(max(choices, key=COLOURS.index))
        context = f"which is the brightest, said the {draw.choice(['house', 'car', 'old bridge'])}"
        records.append({"context": context, "choices": [f"it is {choice}" for choice in choices], "label": label})
    return records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text for record in riddles(50, 2) for text in (record["context"], *record["choices"])]
    return make_workspace(tmp_path_factory.mktemp("workspace"), texts, train=riddles(80, 0), test=riddles(21, 1))


@pytest.fixture(scope="module")
def config(workspace: Path) -> LaunchConfig:
    return make_config(workspace, {"type": "multiple-choice"}, data={"sequence_length": 24})


@pytest.fixture(scope="module")
def finished(config: LaunchConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_at(tmp_path_factory.mktemp("runs") / "one", config, 1, 12)


LAYOUTS = [
    {
        "premise": "It fell.",
        "question": "cause",
        "choice1": "I pushed it.",
        "choice2": "It broke.",
        "label": 0,
        "idx": 7,
    },
    {"context": "It fell. What was the cause of this?", "choices": ["I pushed it.", "It broke."], "label": "A"},
    {
        "context": "It fell.",
        "question": "What was the cause of this?",
        "choices": {"label": ["A", "B"], "text": ["I pushed it.", "It broke."]},
        "label": "0",
    },
    {
        "context": "It fell. What was the cause of this?",
        "choices": {"label": ["1", "2"], "text": ["I pushed it.", "It broke."]},
        "label": "1",
    },
]


@pytest.mark.parametrize("record", LAYOUTS)
def test_layouts(config: LaunchConfig, tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    task = task_of(config.altered(data={"sequence_length": 64}))
    source = open_source(DataSource(path=str(tmp_path / "one.jsonl")))
    encoder = SourceEncoder(source, task, 64, "error", "error")
    (sample,) = encoder.encode(np.array([0]), [0])[0][0]
    fast = task.tokenizer.backend
    pairs = [("It fell. What was the cause of this?", choice) for choice in ("I pushed it.", "It broke.")]
    expected = [fast.encode(*pair) for pair in pairs]
    assert sample.labels is not None
    assert sample.labels.tolist() == [0]
    assert [row.tolist() for row in sample.split(sample.tokens)] == [encoding.ids for encoding in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["one"]}, "choices: expected a list of two strings or more"),
        ({"label": 2}, "label 2 is none of 2 choices"),
        ({"label": "C"}, "label 'C' is none of 2 choices"),
        ({"label": None}, "label None is none of 2 choices"),
    ],
)
def test_bad_records_are_told(config: LaunchConfig, change: dict[str, Any], message: str) -> None:
    (found,) = task_of(config).encode([{"context": "a", "choices": ["b", "c"], "label": 1, **change}])
    assert isinstance(found, str)
    assert message in found


def test_a_run_learns_and_is_the_same_at_two_ranks(
    finished: RunDirectory, config: LaunchConfig, tmp_path: Path
) -> None:
    lines = finished.step_lines()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    same_runs(run_at(tmp_path / "two", config, 2, 2), finished)


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (3, 2), (2, 6)])
def test_a_run_is_the_same_at_any_number_of_ranks(
    finished: RunDirectory, config: LaunchConfig, tmp_path: Path, ranks: int, micro_batch_size: int
) -> None:
    same_runs(run_at(tmp_path / "other", config, ranks, micro_batch_size), finished)


def test_the_export_predicts_the_same_in_plain_transformers(finished: RunDirectory, workspace: Path) -> None:
    """One record at a time, without choices that fill up."""
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    model = AutoModelForMultipleChoice.from_pretrained(finished.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    right, losses = [], []
    for line in (workspace / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        contexts = [record["context"]] * len(record["choices"])
        rows = [tokenizer(*pair, return_tensors="pt") for pair in zip(contexts, record["choices"], strict=True)]
        with torch.no_grad():
            logits = torch.cat([model(**{k: v[None] for k, v in row.items()}).logits[0] for row in rows])
        right.append(int(logits.argmax()) == record["label"])
        losses.append(-float(logits.log_softmax(-1)[record["label"]]))
    scores = last_scores(finished)
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert scores["samples"] == len(right)
