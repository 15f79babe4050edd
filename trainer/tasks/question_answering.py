"""The span of a context that answers a question, by the model's own question-answering head: SQuAD v1.1 and v2.

A context that is too long for one sequence becomes windows that overlap by `task.doc_stride` tokens, each a sample; a
window that does not hold the whole answer has the first token (CLS) for its span. The loss is the mean over windows of
the mean cross-entropy of start and end; padding takes no part in it, so that it is the same in any batch. The spans of
all windows of a record are then compared, and scored as SQuAD's official scripts do, in percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import QuestionAnsweringTask
from trainer.data.sample import Sample
from trainer.failures import DataError, UserError
from trainer.tasks.base import Predictions, named_columns
from trainer.tasks.encoder import EncoderTask, cross_entropy, inputs_of, labels_of
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


class Window(NamedTuple):
    """What a span of tokens means: `Sample.reference`."""

    context: str
    offsets: np.ndarray  # int32 [length, 2]: characters of the context; -1 where a token is not of it
    answers: tuple[str, ...]


class Spans(NamedTuple):
    """What is found in a window: the score of no answer, and the best spans with theirs, best first."""

    none: float
    spans: list[tuple[float, str]]
    answers: tuple[str, ...]


class QuestionAnswering(EncoderTask):
    """Questions and contexts in windows."""

    auto_class = "AutoModelForQuestionAnswering"
    structured = label_columns = frozenset({"answers"})
    counted = "windows"
    pieces = True

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.task = task = cast("QuestionAnsweringTask", config.task)
        special, length = self.fast.num_special_tokens_to_add(True), config.data.sequence_length
        if special + task.max_question_tokens + task.doc_stride >= length:
            raise UserError(
                f"data.sequence_length is {length}: too short for a question ({task.max_question_tokens}, "
                f"task.max_question_tokens), {special} special tokens and more than task.doc_stride "
                f"({task.doc_stride}) of the context"
            )
        self.fast.no_truncation()
        if not self.fast.encode("a", "a").special_tokens_mask[0]:
            raise UserError(f"{tokenizer.origin} begins no text with a special token, which stands for no answer")
        self.fast.enable_truncation(length, stride=task.doc_stride, strategy="only_second")

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        needed = self.needed("question", "context", "answers")
        if "data" in record and "question" not in record:
            raise DataError('a file in the layout of SQuAD; set `"format": "squad"`')
        return named_columns("question-answering", needed, (), source_columns, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        answers = [self._answers(record) for record in records]
        pairs = [(question, r["context"]) for question, r in zip(self._questions(records), records, strict=True)]
        return [
            found
            if isinstance(found, str)
            else [self._window(part, r["context"], found) for part in (first, *first.overflowing)]
            for found, r, first in zip(answers, records, self.encode_texts(pairs), strict=True)
        ]

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        labels = labels_of(samples).reshape(-1, 2)
        start, end = _without_padding(output, samples)
        return (cross_entropy(start, labels[:, 0]) + cross_entropy(end, labels[:, 1])) / 2

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """Spans of each window."""
        start, end = (logits.cpu().numpy() for logits in _without_padding(output, samples))
        return [self._spans(s, e, sample) for s, e, sample in zip(start, end, samples, strict=True)]

    @property
    def scored(self) -> tuple[str, ...]:
        names = ("exact_match", "f1")
        more = ("has_answer_{}", "no_answer_{}", "best_{}", "best_{}_threshold") if self.task.unanswerable else ()
        return (*names, *(form.format(name) for name in names for form in more))

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        """EM and F1 in percent; of questions that may have no answer the parts, and at the best threshold as well."""
        of_records = groupby(predictions, key=lambda item: item[0][:2])
        return squad_scores([merged([window for _, window in windows]) for _, windows in of_records], self.task)

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        return self.read(output, samples)

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """The answer ("" for none), its score, and the best spans with theirs."""
        best = merged(found)
        score, text = best.spans[0] if best.spans else (best.none, "")
        if self.task.unanswerable and best.none - score > self.task.no_answer_threshold:
            score, text = best.none, ""
        spans = [{"text": text, "score": score} for score, text in best.spans[: self.task.n_best]]
        return {"answer": text, "score": score, "no_answer_score": best.none, "n_best": spans}

    def _questions(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """Questions without white space around them, and no longer than they may be."""
        questions = [record["question"].strip() for record in records]
        most = self.task.max_question_tokens
        found = self.tokenizer.backend.encode_batch(questions, add_special_tokens=False)
        return [
            text if len(encoding.ids) <= most else text[: encoding.offsets[most - 1][1]]
            for text, encoding in zip(questions, found, strict=True)
        ]

    def _answers(self, record: dict[str, Any]) -> list[tuple[int, str]] | str:
        """(first character, text) of each answer, or what is wrong with them."""
        if not self.labelled:
            return []
        value = record["answers"]
        try:
            if isinstance(value, dict):
                found = list(zip(map(int, value["answer_start"]), map(str, value["text"]), strict=True))
            else:
                found = [(int(item["answer_start"]), str(item["text"])) for item in value or ()]
        except (KeyError, TypeError, ValueError):
            return "answers: expected {text: [...], answer_start: [...]} or a list of {text, answer_start}"
        if not found and not self.task.unanswerable:
            return "answers: there is none; set task.unanswerable for questions that may have no answer"
        for start, text in found:
            if record["context"][start : start + len(text)] != text:
                return f"answers: {text!r} does not stand at character {start} of the context"
        return found

    def _window(self, encoding: Any, context: str, answers: Sequence[tuple[int, str]]) -> Sample:
        tokens, inputs = inputs_of(encoding)
        of_context = np.array([part == 1 for part in encoding.sequence_ids], dtype=bool)
        offsets = np.where(of_context[:, None], np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2), -1)
        targets = np.arange(len(tokens)) == 0
        labels = np.array(_span(offsets, answers[0]) if answers else (0, 0), dtype=np.int64)
        reference = Window(context, offsets.astype(np.int32), tuple(text for _, text in answers))
        return Sample(tokens, targets, labels if self.labelled else None, inputs, reference)

    def _spans(self, start: np.ndarray, end: np.ndarray, sample: Sample) -> Spans:
        window: Window = sample.reference
        length = len(sample.tokens)
        within = window.offsets[:, 0] >= 0
        most = self.task.n_best

        def best(logits: np.ndarray) -> np.ndarray:
            order = np.argsort(-logits[:length], kind="stable")
            return order[within[order]][:most]

        starts, ends = best(start), best(end)
        lengths = ends[None, :] - starts[:, None] + 1
        rows, columns = np.nonzero((lengths > 0) & (lengths <= self.task.max_answer_tokens))
        total = start[starts[rows]] + end[ends[columns]]
        chosen = np.argsort(-total, kind="stable")[:most]
        spans = [
            (float(total[i]), window.context[window.offsets[starts[rows[i]], 0] : window.offsets[ends[columns[i]], 1]])
            for i in chosen
        ]
        return Spans(float(start[0] + end[0]), spans, window.answers)


def _span(offsets: np.ndarray, answer: tuple[int, str]) -> tuple[int, int]:
    """(first, last) token of an answer; (0, 0) where the window does not hold all of it."""
    first, last = answer[0], answer[0] + len(answer[1])
    places = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(places) or offsets[places[0], 0] > first or offsets[places[-1], 1] < last:
        return 0, 0
    starts, ends = offsets[places, 0], offsets[places, 1]
    begin = places[np.flatnonzero(starts <= first)[-1]]
    return int(begin), int(max(places[np.flatnonzero(ends >= last)[0]], begin))


def _without_padding(output: Any, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, end) logits, fp32 [samples, longest sample]; of padding -inf."""
    import torch

    lengths = [len(sample.tokens) for sample in samples]
    places = torch.arange(max(lengths), device=output.start_logits.device)
    outside = places[None, :] >= torch.tensor(lengths, device=places.device)[:, None]

    def logits(of: torch.Tensor) -> torch.Tensor:
        return of[:, : len(places)].float().masked_fill(outside, float("-inf"))

    return logits(output.start_logits), logits(output.end_logits)


def merged(windows: Sequence[Spans]) -> Spans:
    """The spans of all windows of a record; it has no answer only as far as no window has one."""
    spans = sorted((span for window in windows for span in window.spans), key=lambda span: -span[0])
    return Spans(min(window.none for window in windows), spans, windows[0].answers)


# -- SQuAD's official scores -------------------------------------------------------------------------------------------


def squad_scores(records: Sequence[Spans], task: QuestionAnsweringTask) -> dict[str, float]:
    """Scores over records, in percent: SQuAD's, and for unanswerable questions those of SQuAD v2."""
    if not records:
        return {}
    texts = [record.spans[0][1] if record.spans else "" for record in records]
    # how much likelier no answer is than the best one
    margins = np.array([record.none - record.spans[0][0] if record.spans else np.inf for record in records])
    found = {
        name: np.array([best_of(score, text, r.answers) for text, r in zip(texts, records, strict=True)])
        for name, score in (("exact_match", exact_match), ("f1", f1))
    }
    if not task.unanswerable:
        return {name: _mean(spoken) for name, spoken in found.items()}
    answered = np.array([bool(record.answers) for record in records])
    silent = margins > task.no_answer_threshold
    scores: dict[str, float] = {}
    for name, spoken in found.items():
        values = np.where(silent, np.where(answered, 0.0, 1.0), spoken)
        scores[name] = _mean(values)
        if answered.any():
            scores[f"has_answer_{name}"] = _mean(values[answered])
        if not answered.all():
            scores[f"no_answer_{name}"] = _mean(values[~answered])
        scores[f"best_{name}"], scores[f"best_{name}_threshold"] = best_threshold(spoken, answered, margins, texts)
    return scores


def best_threshold(
    spoken: np.ndarray, answered: np.ndarray, margins: np.ndarray, texts: Sequence[str]
) -> tuple[float, float]:
    """(best score in percent, threshold of it), as the official script searches them: one question more at a time."""
    order = np.argsort(margins, kind="stable")
    gains = np.where(answered, spoken, np.where([bool(text) for text in texts], -1.0, 0.0))[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + np.count_nonzero(~answered)
    best = int(np.argmax(totals))
    return 100.0 * float(totals[best]) / len(order), float(margins[order[best - 1]]) if best else 0.0


def best_of(score: Callable[[str, str], float], text: str, answers: Sequence[str]) -> float:
    """The score against the answer that it fits best; no answer is the answer "", and so are those of no words."""
    return max(score(text, answer) for answer in [a for a in answers if normalised(a)] or [""])


def normalised(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and superfluous white space."""
    text = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def exact_match(text: str, answer: str) -> float:
    """Whether two texts are the same but for case, punctuation, articles and white space."""
    return float(normalised(text) == normalised(answer))


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words; where one text has none, whether both have none."""
    found, wanted = normalised(text).split(), normalised(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2.0 * same / (len(found) + len(wanted))


def _mean(values: np.ndarray) -> float:
    return 100.0 * float(np.mean(values))
