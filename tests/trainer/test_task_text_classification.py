"""text-classification: layouts, labels, losses, and real runs by `dsft launch`, scored and used by dsft and without."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import make_tokenizer, tiny_bert
from torch.nn import functional

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.encoding import SourceEncoder
from trainer.data.sample import Sample
from trainer.data.sources import open_source
from trainer.failures import DataError, UserError
from trainer.rundir import RunDirectory
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer

ROOT = str(Path(__file__).resolve().parents[2])
GOOD, BAD = ("good", "fine", "great", "lovely"), ("bad", "poor", "awful", "dull")
FILLERS = ("the", "film", "is", "a", "story", "of", "it", "was", "and", "very")
MODEL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
WORDS = [*GOOD, *BAD, *FILLERS]
NAMES = ("negative", "positive")


def make_records(number: int, seed: int, wrong: float = 0.0) -> list[dict[str, Any]]:
    """Sentences of which one word tells the label; a share of the labels is ``wrong``."""
    draw = random.Random(seed)
    records = []
    for _ in range(number):
        label = draw.randrange(2)
        words = [draw.choice(FILLERS) for _ in range(draw.randrange(3, 12))]
        words.insert(draw.randrange(len(words)), draw.choice((BAD, GOOD)[label]))
        records.append({"sentence": " ".join(words), "label": label ^ (draw.random() < wrong)})
    return records


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    make_tokenizer(folder / "tokenizer", WORDS)
    write(folder / "train.jsonl", make_records(240, 1))
    write(folder / "dev.jsonl", make_records(67, 2, wrong=1.0))
    write(folder / "other.jsonl", make_records(22, 3))
    return folder


def config_of(folder: Path, task: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    evaluation = [{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("dev", "other")]
    return {
        "name": "classify",
        "output_dir": str(folder / "runs"),
        "task": {"type": "text-classification", **(task or {})},
        "model": {
            "config": tiny_bert(len(WORDS), **MODEL),
            "tokenizer": str(folder / "tokenizer"),
            "dtype": "float32",
            "gradient_checkpointing": False,
        },
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "evaluation": evaluation,
            "sequence_length": 32,
            "workers": 0,
        },
        "training": {
            "global_batch_size": 12,
            "micro_batch_size": 4,
            "max_steps": 140,
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"type": "constant", "warmup_steps": 5},
        },
        "evaluation": {"interval_steps": 20, "metric": "dev/matthews", "patience": 3},
        "checkpoint": {"interval_steps": None, "keep_last": 1, "keep_best": 1},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": 1, "environment": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}},
        **changes,
    }


def dsft(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ROOT, "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[int, RunDirectory]:
    """Runs at 1 and 2 ranks, with other micro-batches."""
    found = {}
    for ranks, micro_batch in ((1, 4), (2, 6)):
        config = config_of(folder, {"labels": NAMES, "metrics": ("accuracy", "matthews")}, name=f"ranks{ranks}")
        config["cluster"]["processes_per_node"] = ranks
        config["training"]["micro_batch_size"] = micro_batch
        path = folder / f"ranks{ranks}.json"
        path.write_text(json.dumps(config))
        done = dsft(folder, "launch", str(path))
        assert done.returncode == 0, done.stdout + done.stderr
        found[ranks] = RunDirectory(folder / "runs" / f"ranks{ranks}")
    return found


# -- runs -------------------------------------------------------------------------------------------------------------


def test_it_learns_the_same_at_one_and_two_ranks(runs: dict[int, RunDirectory]) -> None:
    steps = {ranks: run.step_lines() for ranks, run in runs.items()}
    assert [line["batch_digest"] for line in steps[1]] == [line["batch_digest"] for line in steps[2]]
    assert [line["loss"] for line in steps[1]] == pytest.approx([line["loss"] for line in steps[2]], abs=1e-4)
    one, two = (run.evaluation_lines() for run in runs.values())
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(one, two, strict=True):
        assert mine["evaluation"] == pytest.approx(other["evaluation"], rel=1e-3)
    assert one[-1]["evaluation"]["other/accuracy"] > 0.95
    assert one[-1]["evaluation"]["samples"] == 89


def test_it_ends_early_and_keeps_the_best(runs: dict[int, RunDirectory]) -> None:
    """The labels of `dev` are the wrong ones: what is learned makes it worse."""
    lines = runs[1].evaluation_lines()
    values = [line["evaluation"]["dev/matthews"] for line in lines]
    best = values.index(max(values))
    assert len(values) - 1 - best == 3  # the patience
    assert lines[-1]["step"] < 140
    assert values[-1] < values[best]
    assert runs[1].published_checkpoints() == [lines[best]["step"], lines[-1]["step"]]


def test_scores_are_equal_at_three_ranks_and_any_batch_size(folder: Path, runs: dict[int, RunDirectory]) -> None:
    before = runs[2].metrics_path.read_bytes()
    done = dsft(folder, "eval", str(runs[2].path), "--processes", "3", "--batch-size", "5", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    last = runs[2].evaluation_lines()[-1]
    assert found["step"] == last["step"]
    assert found["scores"] == pytest.approx(last["evaluation"], rel=1e-5)
    assert runs[2].metrics_path.read_bytes() == before


def test_another_checkpoint_is_scored_on_other_data(folder: Path, runs: dict[int, RunDirectory]) -> None:
    """Of the best step, which has no export; a set of its own; F1 instead of the accuracy."""
    best, data = runs[1].published_checkpoints()[0], str(folder / "other.jsonl")
    arguments = ("eval", str(runs[1].path), "--step", str(best), "--data", data)
    done = dsft(folder, *arguments, "--set", 'task.metrics=["f1", "accuracy"]', "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (line,) = (line["evaluation"] for line in runs[1].evaluation_lines() if line["step"] == best)
    assert found["scores"]["loss"] == pytest.approx(line["other/loss"], rel=1e-5)
    assert found["scores"]["accuracy"] == line["other/accuracy"]
    assert {"f1", "samples"} < found["scores"].keys()


def test_predictions_are_those_of_plain_transformers(folder: Path, runs: dict[int, RunDirectory]) -> None:
    """From a csv without labels, at two ranks, with a bad record in it; batches, blocks and order come out right."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [record["sentence"] for record in make_records(70, 5)]
    lines = ["sentence,note", *(f"{text},{index}" for index, text in enumerate(texts))]
    lines.insert(8, "only one field")
    (folder / "new.csv").write_text("\n".join(lines) + "\n")
    (folder / "half.jsonl").write_text('{"sentence": "half of a pair: \\ud83d"}\n')
    inputs = ("new.csv", "dev.jsonl", "half.jsonl")
    arguments = ("predict", str(runs[1].path), "--input", *inputs, "--output", "answers.jsonl")
    ranks = ("--processes", "2", "--batch-size", "3")
    done = dsft(folder, *arguments, "--processes", "1")
    assert done.returncode == 2
    assert "new.csv, line 9" in done.stderr
    assert not list(folder.glob("*answers*"))
    done = dsft(folder, *arguments, *ranks, "--set", "data.on_bad_record=skip")
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob(".answers*"))
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["number"] for answer in answers] == list(range(71 + 67 + 1))
    assert "half of a surrogate pair" in answers[-1]["error"]
    assert answers[-1]["input"] == {"sentence": "half of a pair: \ud83d"}
    assert "new.csv, line 9" in answers[7]["error"]
    assert answers[6]["input"] == {"sentence": texts[6], "note": "6"}

    model = AutoModelForSequenceClassification.from_pretrained(runs[1].export_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs[1].export_dir)
    assert model.config.id2label == dict(enumerate(NAMES))
    texts += [json.loads(line)["sentence"] for line in (folder / "dev.jsonl").read_text().splitlines()]
    for text, answer in zip(texts, (a for a in answers if "error" not in a), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        prediction = answer["prediction"]
        assert answer["input"]["sentence"] == text
        assert prediction["label"] == NAMES[int(expected.argmax())]
        assert prediction["probability"] == pytest.approx(float(expected.max()), abs=1e-6)
        assert [*prediction["probabilities"]] == list(NAMES)


# -- records ----------------------------------------------------------------------------------------------------------


def encoded(folder: Path, task: dict[str, Any], records: list[dict[str, Any]], **source: Any) -> list[Sample]:
    path = write(folder / "records.jsonl", records)
    config = config_of(folder, task)
    config["data"]["train"] = [{"path": str(path), **source}]
    checked = LaunchConfig.model_validate(config)
    encoder = get_task(checked, load_tokenizer(checked.model))
    reader = SourceEncoder(open_source(DataSource(path=str(path), **source)), encoder, 32, "split", "error")
    made, _ = reader.encode(np.arange(len(records)), range(len(records)))
    return [sample for place in sorted(made) for sample in made[place]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sentence", None),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("question", "passage"),
        ("text", "text_pair"),
        ("text", None),
    ],
)
def test_layouts_of_glue_and_superglue(folder: Path, tmp_path: Path, first: str, second: str | None) -> None:
    from transformers import AutoTokenizer

    pair = {second: "bad film"} if second else {}
    (sample,) = encoded(folder, {"labels": ["no", "yes"]}, [{"idx": 3, first: "the story", **pair, "label": 1}])
    expected = AutoTokenizer.from_pretrained(folder / "tokenizer")("the story", *pair.values())
    assert sample.tokens.tolist() == expected["input_ids"]
    assert sample.inputs is not None
    assert sample.inputs["token_type_ids"].tolist() == expected["token_type_ids"]
    assert sample.labels is not None
    assert sample.labels.tolist() == [1]
    assert sample.targets.tolist() == [True] + [False] * (len(sample.tokens) - 1)
    same = {"columns": {"text": "text", "label": "label"}}  # as in the starter config
    (again,) = encoded(folder, {"labels": ["no", "yes"]}, [{first: "the story", **pair, "label": 1}], **same)
    assert again.tokens.tolist() == expected["input_ids"]


def test_the_longer_text_of_a_pair_is_cut(folder: Path) -> None:
    record = {"premise": "the " * 60, "hypothesis": "bad film", "label": 0}
    (sample,) = encoded(folder, {"labels": ["no", "yes"]}, [record])
    assert len(sample.tokens) == 32
    assert sample.truncated
    assert sample.inputs is not None
    assert int(sample.inputs["token_type_ids"].sum()) == 3  # bad film [SEP]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 2, 1], ("0", "1", "2")),
        ([10, 9, 2], ("2", "9", "10")),
        (["b", "a", "a"], ("a", "b")),
        ([True, False, True], ("0", "1")),
        ([1.0, float("nan"), 0.0], ("0", "1")),
        ([[], ["x", "z"], ["y"]], ("x", "y", "z")),
    ],
)
def test_labels_are_found_in_the_data(folder: Path, values: list[Any], names: tuple[str, ...]) -> None:
    task = {"problem": "multi-label"} if isinstance(values[0], list) else {}
    path = write(folder / "found.jsonl", [{"text": "a film", "label": value} for value in values])
    config = config_of(folder, task)
    config["data"]["train"] = [{"path": str(path)}]
    checked = LaunchConfig.model_validate(config)
    found = get_task(checked, load_tokenizer(checked.model))
    assert found.config.task.labels == names  # type: ignore[union-attr]
    model = SimpleNamespace(pad_token_id=0)
    found.configure(model)
    assert model.num_labels == len(names)
    assert model.id2label == dict(enumerate(names))
    assert model.label2id == {name: index for index, name in enumerate(names)}
    assert model.problem_type == ("multi_label_classification" if task else "single_label_classification")


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ({"labels": NAMES}, "neutral", r"line 2: label 'neutral' is none of the 2 classes \('negative', 'positive'\)"),
        ({"labels": NAMES}, 2, "line 2: label 2 is none of the 2 classes"),
        ({"labels": ("1", "2", "3")}, 0, "line 2: label 0 is none of the 3 classes"),
        ({"labels": NAMES}, None, "line 2: label None is none of the 2 classes"),
        ({"labels": NAMES}, -1, "line 2: label -1 is none of the 2 classes"),
        ({"problem": "multi-label", "labels": NAMES}, "positive", "line 2: label is str, expected a list"),
        ({"problem": "multi-label", "labels": NAMES}, ["positive", "new"], "line 2: label 'new' is none of"),
        ({"problem": "regression"}, "much", "line 2: label 'much' is no number"),
        ({"problem": "regression"}, float("inf"), "line 2: label inf is not finite"),
    ],
)
def test_bad_labels_name_file_and_line(folder: Path, task: dict[str, Any], label: Any, message: str) -> None:
    right = {"multi-label": ["positive"], "regression": 0.5}.get(task.get("problem", ""), task.get("labels", NAMES)[1])
    records = [{"text": "a film", "label": right}, {"text": "a story", "label": label}]
    with pytest.raises(DataError, match=r"records\.jsonl, " + message):
        encoded(folder, task, records)


def test_a_file_without_a_header_is_told_of(folder: Path) -> None:
    path = folder / "bare.tsv"
    path.write_text("a film\tgood\na story\tbad\n")
    for task in ({}, {"labels": ["bad", "good"]}):
        config = config_of(folder, task)
        config["data"]["train"] = [{"path": str(path)}]
        checked = LaunchConfig.model_validate(config)
        with pytest.raises(DataError, match=r"the record has 'a film', 'good': .*no header.*`column_names`"):
            SourceEncoder(
                open_source(checked.data.train[0]),
                get_task(checked, load_tokenizer(checked.model)),
                32,
                "split",
                "error",
            )


def test_labels_that_cannot_be_are_refused(folder: Path) -> None:
    one = write(folder / "one.jsonl", [{"text": "a film", "label": "same"}] * 3)
    config = config_of(folder)
    config["data"]["train"] = [{"path": str(one)}]
    checked = LaunchConfig.model_validate(config)
    with pytest.raises(DataError, match=r"fewer than two labels \('same'\)"):
        get_task(checked, load_tokenizer(checked.model))
    checked = LaunchConfig.model_validate(config_of(folder, {"class_weights": [1.0, 2.0, 3.0]}))
    with pytest.raises(UserError, match="3 for 2 labels"):
        get_task(checked, load_tokenizer(checked.model))
    for task in ({"labels": ["a"]}, {"labels": ["a", "a"]}, {"problem": "regression", "labels": NAMES}):
        with pytest.raises(ValueError, match="labels"):
            LaunchConfig.model_validate(config_of(folder, task))


# -- losses and scores ------------------------------------------------------------------------------------------------


def made(folder: Path, **task: Any) -> Any:
    config = LaunchConfig.model_validate(config_of(folder, task))
    return get_task(config, load_tokenizer(config.model))


def samples_of(labels: list[Any], dtype: Any) -> list[Sample]:
    token = np.zeros(1, dtype=np.int32)
    return [Sample(token, token == 0, np.array(np.atleast_1d(label), dtype=dtype)) for label in labels]


def test_losses_are_those_of_torch(folder: Path) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    output, gold = SimpleNamespace(logits=logits), torch.tensor([2, 0, 1, 1, 0])
    weights = (0.5, 1.0, 2.5)
    task = made(folder, labels=("a", "b", "c"), label_smoothing=0.2, class_weights=weights)
    expected = functional.cross_entropy(
        logits, gold, weight=torch.tensor(weights), label_smoothing=0.2, reduction="sum"
    )
    assert float(task.loss(output, samples_of(gold.tolist(), np.int64))) == pytest.approx(float(expected), rel=1e-6)

    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]])
    task = made(folder, labels=("a", "b", "c"), problem="multi-label")
    expected = functional.binary_cross_entropy_with_logits(logits, several) * 5  # transformers' mean, for each sample
    assert float(task.loss(output, samples_of(several.tolist(), np.float32))) == pytest.approx(float(expected))

    numbers = torch.tensor([0.5, -1.0, 3.0, 2.0, 0.0])
    task = made(folder, problem="regression")
    expected = functional.mse_loss(logits[:, 0], numbers) * 5
    found = task.loss(SimpleNamespace(logits=logits[:, :1]), samples_of(numbers.tolist(), np.float32))
    assert float(found) == pytest.approx(float(expected))


def test_scores_and_answers(folder: Path) -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, -2.0], [-1.0, 0.5, 2.0], [1.0, 0.0, -1.0]])
    output, names = SimpleNamespace(logits=logits), ("a", "b", "c")

    def scores(task: Any, samples: list[Sample]) -> dict[str, float]:
        return dict(task.scores(0.0, [((0, i, 0), one) for i, one in enumerate(task.read(output, samples))]))

    task = made(folder, labels=names, metrics=("accuracy", "macro_f1", "matthews"))
    found = scores(task, samples_of([0, 1, 1, 0], np.int64))
    # precision and recall: a 1, 1; b 1, 1/2; c 0, 0. Matthews: (c s - p.t) / sqrt((s^2 - p.p) (s^2 - t.t))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["matthews"] == pytest.approx((3 * 4 - (2 * 2 + 1 * 2)) / ((16 - 6) * (16 - 8)) ** 0.5)
    pairs = [((0, i, 0), pair) for i, pair in enumerate([(0, 0), (1, 0), (0, 0)])]  # of three classes two occur
    assert made(folder, labels=names, metrics=("f1",)).scores(0.0, pairs) == {"f1": pytest.approx((0.8 + 0) / 2)}
    answer = task.answer(task.read_answers(output, [])[1:2])
    assert answer["label"] == "b"
    assert answer["probability"] == pytest.approx(float(logits[1].softmax(-1)[1]))

    task = made(folder, labels=names, problem="multi-label")
    found = scores(task, samples_of([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 0]], np.float32))
    assert found == pytest.approx({"micro_f1": 2 * 5 / (6 + 6), "macro_f1": (1 + 2 * 2 / (3 + 3) + 1) / 3})
    assert task.answer(task.read_answers(output, [])[2:3])["labels"] == ["b", "c"]

    task = made(folder, problem="regression", metrics=("pearson", "spearman", "mse"))
    gold = [2.0, 0.5, -2.0, 1.5]
    found = scores(task, samples_of(gold, np.float32))
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(float(np.corrcoef(gold, logits[:, 0])[0, 1]))
    assert found["mse"] == pytest.approx((1 + 0.25 + 1 + 0.25) / 4)
    assert task.answer(task.read_answers(output, [])[:1]) == {"value": 3.0}
