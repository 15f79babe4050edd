"""Token classification: alignment, long sentences, scores beside seqeval's, and whole runs at several world sizes."""

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
from trainer.failures import DataError
from trainer.rundir import RunDirectory
from trainer.tasks.token_classification import TokenClassification, scheme_of

TAGS = ["O", "B-name", "I-name", "B-town", "I-town"]
NAMES = ["Ada", "Grace", "Katherine", "Lovelace", "Hopper", "Johnson"]
TOWNS = ["London", "New", "York", "Hampton", "Arlington"]
FILLERS = ["went", "to", "see", "the", "old", "bridge", "in", "with", "yesterday", "unbelievably"]


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Names are of one or two words, towns as well; the rest is filling."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        tokens, tags = [], []
        for _ in range(draw.randint(2, 5)):
            kind, words = draw.choice([("name", NAMES), ("town", TOWNS)])
            for place in range(draw.randint(1, 2)):
                tokens.append(draw.choice(words))
                tags.append(f"{'I' if place else 'B'}-{kind}")
            for _ in range(draw.randint(1, 3)):
                tokens.append(draw.choice(FILLERS))
                tags.append("O")
        records.append({"tokens": tokens, "tags": tags})
    return records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    # "\u200d" is dropped by the tokenizer: a word without sub-words
    test = [*sentences(24, 1), {"tokens": ["Ada", "\u200d", "York"], "tags": ["B-name", "O", "B-town"]}]
    texts = [" ".join(record["tokens"]) for record in sentences(50, 2)]
    return make_workspace(folder, texts, train=sentences(60, 0), test=test)


@pytest.fixture(scope="module")
def config(workspace: Path) -> LaunchConfig:
    changes = {"data": {"sequence_length": 24}, "training": {"ema_decay": 0.7}}
    return make_config(workspace, {"type": "token-classification"}, **changes)


@pytest.fixture(scope="module")
def finished(config: LaunchConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_at(tmp_path_factory.mktemp("runs") / "one", config, 1, 12)


def encoded(config: LaunchConfig, record: dict[str, Any], **data: Any) -> list[Any]:
    task = task_of(config.altered(data=data))
    (found,) = task.encode([record])
    assert isinstance(found, list), found
    return found


def test_the_first_sub_word_carries_the_tag(config: LaunchConfig) -> None:
    record = {"tokens": ["Ada", "\u200d", "Unseenword", "bridge"], "tags": ["B-name", "O", "I-name", None]}
    task = task_of(config)
    assert isinstance(task, TokenClassification)
    (sample,) = encoded(config, record, sequence_length=48)
    encoding = task.fast.encode(record["tokens"], is_pretokenized=True)
    assert encoding.word_ids.count(2) > 1  # it has several sub-words
    assert np.flatnonzero(sample.targets).tolist() == [encoding.word_ids.index(0), encoding.word_ids.index(2)]
    assert [task.labels.names[label] for label in sample.labels] == ["B-name", "I-name"]
    assert sample.tokens.tolist() == encoding.ids


def test_long_sentences_are_split_between_words(config: LaunchConfig) -> None:
    record = sentences(1, 3)[0]
    record = {name: values * 4 for name, values in record.items()}
    task = task_of(config)
    assert isinstance(task, TokenClassification)
    pieces = encoded(config, record)
    assert len(pieces) > 1
    assert all(len(piece.tokens) <= 24 for piece in pieces)
    labels = [task.labels.names[label] for piece in pieces for label in piece.labels]
    assert labels == record["tags"]
    whole = task.tokenizer.backend.encode(record["tokens"], is_pretokenized=True, add_special_tokens=False)
    assert [token for piece in pieces for token in piece.tokens[1:-1]] == whole.ids
    (cut,) = encoded(config, record, on_long="truncate")
    assert cut.truncated
    assert len(cut.tokens) == 24


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens, but 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, "tokens is str, expected a list"),
        ({"tokens": ["a"], "tags": ["B-nothing"]}, "'B-nothing' is none of the 5 classes"),
    ],
)
def test_bad_records_are_told(config: LaunchConfig, record: dict[str, Any], message: str) -> None:
    (found,) = task_of(config).encode([record])
    assert isinstance(found, str)
    assert message in found


def test_conll_columns(tmp_path: Path, config: LaunchConfig) -> None:
    path = tmp_path / "some.conll"
    path.write_text("-DOCSTART- -X- O\n\nAda NNP B-name\nwent VBD O\n\n\nto TO O\nNew\u00a0York  NNP B-town \n")
    source = open_source(DataSource(path=str(path)))
    assert [record for record, _ in source.read(range(source.records))] == [
        {"tokens": ["Ada", "went"], "tags": ["B-name", "O"]},
        {"tokens": ["to", "New\u00a0York"], "tags": ["O", "B-town"]},
    ]
    named = DataSource(path=str(path), column_names=("word", "part", "tag"), columns={"tokens": "word", "tags": "part"})
    record, _ = open_source(named).read([1])[0]
    assert record == {"word": ["to", "New\u00a0York"], "part": ["TO", "NNP"], "tag": ["O", "B-town"]}
    path.write_text("Ada\tB-name\nwent\tto\tO\n")
    assert "3 columns in the line of 'went', expected 2" in str(open_source(DataSource(path=str(path))).read([0])[0][1])
    path.write_text("Ada\tB-name\n# a comment\n#\tO\n")
    encoder = SourceEncoder(open_source(DataSource(path=str(path))), task_of(config), 24, "split", "error")
    (made,) = encoder.encode(np.array([0]), [0])[0].values()
    assert made[0].reference[0] == [TAGS_BY_NAME["B-name"], TAGS_BY_NAME["O"]]
    text = open_source(DataSource(path=str(path.rename(tmp_path / "some.txt"))))
    with pytest.raises(DataError, match="a text file has paragraphs alone: set `format`"):
        SourceEncoder(text, task_of(config), 24, "split", "error")


TAGS_BY_NAME = {name: index for index, name in enumerate(sorted(TAGS))}


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BILOU"])
def test_scores_are_seqevals(config: LaunchConfig, scheme: str) -> None:
    import seqeval.scheme
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    prefixes = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}[scheme]
    labels = ("O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in ("name", "town")))
    assert scheme_of(labels) == scheme
    section = config.task.model_copy(update={"labels": labels})
    task = task_of(config.model_copy(update={"task": section}))
    assert isinstance(task, TokenClassification)
    draw = np.random.default_rng(0)
    gold = [draw.integers(0, len(labels), size).tolist() for size in draw.integers(1, 12, 60)]
    found = [[g if draw.random() < 0.8 else int(draw.integers(0, len(labels))) for g in row] for row in gold]
    # records in two pieces each, as long ones are
    parts = [(g[cut], p[cut]) for g, p in zip(gold, found, strict=True) for cut in (slice(0, 4), slice(4, None))]
    scores = task.scores(0.0, [((0, place // 2, place % 2), part) for place, part in enumerate(parts)])
    named = [[[labels[tag] for tag in row] for row in rows] for rows in (gold, found)]
    strict = {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)}
    assert scores == {
        "accuracy": pytest.approx(accuracy_score(*named)),
        "precision": precision_score(*named, **strict),
        "recall": recall_score(*named, **strict),
        "f1": f1_score(*named, **strict),
    }
    assert 0 < scores["f1"] < 1


def test_tags_of_no_entities_have_accuracy_alone(config: LaunchConfig) -> None:
    task = task_of(config.altered(task={"labels": ("NOUN", "VERB")}))
    assert task.scores(0.0, [((0, 0, 0), ([0, 1, -1], [0, 0, 1]))]) == {"accuracy": 0.5}


def test_a_record_longer_than_a_sequence_is_counted(config: LaunchConfig, tmp_path: Path) -> None:
    record = {name: values * 4 for name, values in sentences(1, 3)[0].items()}
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    source = open_source(DataSource(path=str(tmp_path / "long.jsonl")))
    made, outcomes = SourceEncoder(source, task_of(config), 24, "split", "error").encode(np.array([0]), [0])
    assert outcomes == [(0, 3)]  # split
    assert [sample.origin for sample in made[0]] == [(0, 0, piece) for piece in range(len(made[0]))]
    strict = config.altered(data={"on_long": "error"})
    with pytest.raises(DataError, match="to split, truncate or skip"):
        SourceEncoder(source, task_of(strict), 24, "error", "error").encode(np.array([0]), [0])


def test_a_run_learns_and_is_the_same_at_two_ranks(
    finished: RunDirectory, config: LaunchConfig, tmp_path: Path
) -> None:
    assert last_scores(finished)["f1"] > 0.4
    assert finished.step_lines()[-1]["loss"] < 0.4 * finished.step_lines()[0]["loss"]
    same_runs(run_at(tmp_path / "two", config, 2, 2), finished)


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (3, 2), (2, 6)])
def test_a_run_is_the_same_at_any_number_of_ranks(
    finished: RunDirectory, config: LaunchConfig, tmp_path: Path, ranks: int, micro_batch_size: int
) -> None:
    same_runs(run_at(tmp_path / "other", config, ranks, micro_batch_size), finished)


def test_the_export_predicts_the_same_in_plain_transformers(finished: RunDirectory, workspace: Path) -> None:
    from safetensors.torch import load_file
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model = AutoModelForTokenClassification.from_pretrained(finished.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    assert model.config.label2id == TAGS_BY_NAME
    # the average of the weights is scored and exported, not the weights
    (folder,) = finished.checkpoints_dir.glob("step-*")
    held = load_file(folder / "rank-00000-of-00001.safetensors")
    assert torch.equal(held["ema/classifier.weight"], model.classifier.weight.flatten())
    assert not torch.equal(held["ema/classifier.weight"], held["master/classifier.weight"])
    gold, predicted, words = [], [], 0
    for line in (workspace / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        gold.append(record["tags"])
        predicted.append(["O"] * len(record["tags"]))
        # sentences that are too long are split, so that their words see fewer others
        pieces = [record["tokens"]]
        while any(len(tokenizer(piece, is_split_into_words=True)["input_ids"]) > 24 for piece in pieces):
            last, size = pieces.pop(), 1
            while len(tokenizer(last[: size + 1], is_split_into_words=True)["input_ids"]) <= 24:
                size += 1
            pieces += [last[:size], last[size:]]
        start = 0
        for piece in pieces:
            inputs = tokenizer(piece, is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                best = model(**inputs).logits[0].argmax(-1).tolist()
            ids = inputs.word_ids()
            for word in {word for word in ids if word is not None}:
                predicted[-1][start + word] = model.config.id2label[best[ids.index(word)]]
                words += 1
            start += len(piece)
    scores = last_scores(finished)
    assert scores["target_tokens"] == words
    assert scores["f1"] == pytest.approx(f1_score(gold, predicted, mode="strict", scheme=IOB2))
