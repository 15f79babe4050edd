"""Question answering: windows, SQuAD's official scores, and whole runs at several world sizes."""

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
from trainer.config.tasks import QuestionAnsweringTask
from trainer.data.sources import open_source
from trainer.failures import DataError, UserError
from trainer.rundir import RunDirectory
from trainer.tasks.question_answering import QuestionAnswering, Spans, best_of, exact_match, f1, squad_scores

SECTION = {
    "type": "question-answering",
    "unanswerable": True,
    "doc_stride": 8,
    "max_question_tokens": 12,
    "max_answer_tokens": 3,
}
PEOPLE = ["Ada", "Grace", "Katherine", "Alan"]
TOWNS = ["London", "Hampton", "Arlington", "Paris"]


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Where somebody lives, of contexts that say it or do not, many of them longer than a sequence."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        people = draw.sample(PEOPLE, 3)
        facts = [f"{person} lives in {draw.choice(TOWNS)}." for person in people]
        fillers = [" ".join(draw.choices(["old", "bridge", "with", "rain"], k=draw.randint(1, 8))) for _ in facts]
        context = " ".join(part for pair in zip(facts, fillers, strict=True) for part in pair)
        asked = draw.choice(PEOPLE)
        start = context.find(f"{asked} lives in ")
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if start >= 0:
            start += len(f"{asked} lives in ")
            answers = {"text": [context[start:].split(".")[0]], "answer_start": [start]}
        question = f"Where does {asked} live?"
        records.append({"id": str(number), "question": question, "context": context, "answers": answers})
    return records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text for record in questions(50, 2) for text in (record["question"], record["context"])]
    folder = tmp_path_factory.mktemp("workspace")
    return make_workspace(folder, texts, train=questions(60, 0), test=questions(20, 1))


@pytest.fixture(scope="module")
def config(workspace: Path) -> LaunchConfig:
    unfreeze = [{"match": ["layers:0", "*embeddings*"], "from_step": 4}]
    return make_config(workspace, SECTION, data={"sequence_length": 32}, training={"unfreeze": unfreeze})


@pytest.fixture(scope="module")
def finished(config: LaunchConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_at(tmp_path_factory.mktemp("runs") / "one", config, 1, 12)


def test_windows_cover_the_context_and_hold_the_answer(config: LaunchConfig) -> None:
    task = task_of(config)
    assert isinstance(task, QuestionAnswering)
    held = windows = 0
    for record, samples in zip(questions(30, 5), task.encode(questions(30, 5)), strict=True):
        assert isinstance(samples, list)
        covered = np.zeros(len(record["context"]), dtype=bool)
        for sample in samples:
            assert len(sample.tokens) <= 32
            assert sample.labels is not None
            start, end = sample.labels
            offsets = sample.reference.offsets
            for first, last in offsets[offsets[:, 0] >= 0]:
                covered[first:last] = True
            if start:
                assert record["context"][offsets[start, 0] : offsets[end, 1]] == record["answers"]["text"][0]
                held += 1
        assert all(covered[place] for place, letter in enumerate(record["context"]) if letter != " ")
        assert bool(record["answers"]["text"]) == any(sample.labels[0] for sample in samples)
        windows += len(samples)
    assert windows > 40
    assert held > 15


def test_windows_are_those_of_transformers(finished: RunDirectory, config: LaunchConfig) -> None:
    from transformers import AutoTokenizer

    records = questions(8, 5)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    theirs = tokenizer(
        [record["question"] for record in records],
        [record["context"] for record in records],
        truncation="only_second",
        max_length=32,
        stride=8,
        return_overflowing_tokens=True,
    )["input_ids"]
    ours = [sample.tokens.tolist() for samples in task_of(config).encode(records) for sample in samples]
    assert ours == theirs


def test_squad_files(tmp_path: Path, config: LaunchConfig) -> None:
    answer = {"text": "London", "answer_start": 13}
    context = "Ada lives in London."
    qas = [{"id": "1", "question": "Where?", "answers": [answer]}, {"id": "2", "question": "Why?", "answers": []}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "A", "paragraphs": [{"context": context, "qas": qas}]}]}, indent=1))
    source = open_source(DataSource(path=str(path), format="squad"))
    first, second = (record for record, _ in source.read([0, 1]))
    assert first is not None
    assert second is not None
    assert first["answers"] == {"text": ["London"], "answer_start": [13]}
    assert (second["question"], second["context"], second["answers"]["text"]) == ("Why?", context, [])
    assert source.where(1).endswith("squad.json, record 2")
    with pytest.raises(DataError, match='set `"format": "squad"`'):
        task_of(config).columns({}, json.loads(path.read_text()))
    path.write_text('{"rows": []}')
    with pytest.raises(DataError, match="no SQuAD file"):
        open_source(DataSource(path=str(path), format="squad"))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["London"], "answer_start": [2]}, "'London' does not stand at character 2"),
        ({"text": ["London"]}, "expected {text: [...], answer_start: [...]}"),
        ([{"answer_start": 1}], "expected {text: [...], answer_start: [...]}"),
    ],
)
def test_bad_answers_are_told(config: LaunchConfig, answers: Any, message: str) -> None:
    (found,) = task_of(config).encode([{"question": "Where?", "context": "Ada lives in London.", "answers": answers}])
    assert isinstance(found, str)
    assert message in found


def test_a_sequence_too_short_for_windows_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match="too short for a question"):
        task_of(make_config(workspace, SECTION, data={"sequence_length": 20}))


@pytest.mark.parametrize(
    ("text", "answer", "exact", "overlap"),
    [  # by the definitions of evaluate-v2.0.py
        ("The Norman conquest!", "norman  Conquest", 1.0, 1.0),
        ("in the 10th and 11th centuries", "10th and 11th centuries", 0.0, 8 / 9),
        ("10th century", "the 10th and 11th centuries", 0.0, 1 / 3),
        ("a", "the", 1.0, 1.0),
        ("", "London", 0.0, 0.0),
        ("U.S.", "US", 1.0, 1.0),
        ("york york", "new york", 0.0, 0.5),
        ("Beyonc\u00e9", "beyonce", 0.0, 0.0),
    ],
)
def test_official_scores_of_texts(text: str, answer: str, exact: float, overlap: float) -> None:
    assert exact_match(text, answer) == exact
    assert f1(text, answer) == pytest.approx(overlap)
    assert best_of(f1, text, [answer]) == pytest.approx(overlap)


def test_official_scores_with_and_without_answers() -> None:
    records = [
        Spans(0.0, [(3.0, "London"), (1.0, "Paris")], ("in London", "London")),  # right
        Spans(2.0, [(1.0, "Paris")], ("Paris",)),  # right, but held back
        Spans(4.0, [(1.0, "Rome")], ()),  # rightly held back
        Spans(0.0, [(0.5, "old Rome")], ()),  # there is no answer
        Spans(0.0, [(2.0, "the old bridge")], ("bridge",)),  # half of it
    ]
    scores = squad_scores(records, QuestionAnsweringTask(type="question-answering", unanswerable=True))
    assert scores["exact_match"] == pytest.approx(40.0)
    assert scores["f1"] == pytest.approx(100 * (1 + 0 + 1 + 0 + 2 / 3) / 5)
    assert scores["has_answer_exact_match"] == pytest.approx(100 / 3)
    assert scores["has_answer_f1"] == pytest.approx(100 * (5 / 3) / 3)
    assert scores["no_answer_exact_match"] == scores["no_answer_f1"] == pytest.approx(50.0)
    # with a threshold of -2 the first and the last are answered, all others held back
    assert scores["best_f1"] == pytest.approx(100 * (1 + 0 + 1 + 1 + 2 / 3) / 5)
    assert scores["best_f1_threshold"] == -2.0
    assert scores["best_exact_match"] == pytest.approx(60.0)
    assert scores["best_exact_match_threshold"] == -3.0
    section = QuestionAnsweringTask(type="question-answering", unanswerable=True, no_answer_threshold=-2.0)
    assert squad_scores(records, section)["f1"] == pytest.approx(scores["best_f1"])
    always = squad_scores(records[:2], QuestionAnsweringTask(type="question-answering"))
    assert always == {"exact_match": 100.0, "f1": 100.0}


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
    """One window at a time, every span by brute force."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model = AutoModelForQuestionAnswering.from_pretrained(finished.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    exact, count = [], 0
    for line in (workspace / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        more = {"truncation": "only_second", "max_length": 32, "stride": 8, "return_overflowing_tokens": True}
        found = tokenizer(record["question"], record["context"], return_offsets_mapping=True, **more)
        none, best, text = np.inf, -np.inf, ""
        for window, ids in enumerate(found["input_ids"]):
            count += 1
            types = torch.tensor([found["token_type_ids"][window]])
            with torch.no_grad():
                output = model(input_ids=torch.tensor([ids]), token_type_ids=types)
            start, end = output.start_logits[0], output.end_logits[0]
            none = min(none, float(start[0] + end[0]))
            places = [place for place, part in enumerate(found.sequence_ids(window)) if part == 1]
            for first in places:
                for last in range(first, min(first + 3, places[-1] + 1)):
                    if float(start[first] + end[last]) > best:
                        best = float(start[first] + end[last])
                        offsets = found["offset_mapping"][window]
                        text = record["context"][offsets[first][0] : offsets[last][1]]
        exact.append(best_of(exact_match, "" if none > best else text, record["answers"]["text"]))
    scores = last_scores(finished)
    assert scores["windows"] == count
    assert scores["exact_match"] == pytest.approx(100 * np.mean(exact))
