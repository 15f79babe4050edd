"""Which of several texts goes on from a context, or answers a question on it: COPA, SWAG, RACE and the like.

Each choice is read together with the context, by the model's own multiple-choice head; the loss is the cross-entropy
over the choices of a record, of which records may have different numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import MultipleChoiceTask
from trainer.data.sample import Sample
from trainer.tasks.base import Predictions, named_columns
from trainer.tasks.encoder import (
    EncoderTask,
    cross_entropy,
    inputs_of,
    label_text,
    labels_of,
    set_padding,
)
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# what COPA's `question` stands for
_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
_NUMBERED = ("choice1", "choice2", "choice3", "choice4", "choice5")
_LETTERS = "ABCDEFGHIJ"


class MultipleChoice(EncoderTask):
    """Contexts, each with its choices."""

    auto_class = "AutoModelForMultipleChoice"
    structured = frozenset({"choices", "label"})
    label_columns = frozenset({"label"})
    chooses = True

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.task = cast("MultipleChoiceTask", config.task)

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        if "premise" in record and "context" not in source_columns and "context" not in record:
            source_columns = {"context": "premise", **source_columns}
        listed = "choices" in source_columns or ("choices" in record and "choice1" not in source_columns)
        choices = ("choices",) if listed else _NUMBERED[:2]
        needed = self.needed("context", *choices, "label")
        optional = ("question",) if listed else ("question", *_NUMBERED[2:])
        return named_columns("multiple-choice", needed, optional, source_columns, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        choices = [self._choices(record) for record in records]
        pairs = [
            (_question(record), choice)
            for record, found in zip(records, choices, strict=True)
            if not isinstance(found, str)
            for choice in found
        ]
        encodings = iter(self.encode_texts(pairs))
        results: list[Sample | list[Sample] | str] = []
        for record, found in zip(records, choices, strict=True):
            if isinstance(found, str):
                results.append(found)
                continue
            mine = [next(encodings) for _ in found]
            label = _label(record["label"], len(found), _names(record)) if self.labelled else None
            results.append(label if isinstance(label, str) else _sample(mine, label))
        return results

    def configure(self, model_config: Any) -> None:
        set_padding(model_config, self.tokenizer)
        super().configure(model_config)

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        return cross_entropy(_logits(output, samples), labels_of(samples))

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """(gold, predicted) of each sample: numbers of choices, from 0."""
        return list(zip(labels_of(samples).tolist(), _logits(output, samples).argmax(-1).tolist(), strict=True))

    @property
    def scored(self) -> tuple[str, ...]:
        return ("accuracy",)

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        return {"accuracy": sum(g == p for _, (g, p) in predictions) / len(predictions)} if predictions else {}

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """The probability of each choice."""
        rows = _logits(output, samples).softmax(-1).tolist()
        return [row[: len(sample.rows or ())] for row, sample in zip(rows, samples, strict=True)]

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """The number of the choice, from 0, with its probability and those of all."""
        probabilities = found[0]
        best = max(range(len(probabilities)), key=lambda i: probabilities[i])
        return {"label": best, "probability": probabilities[best], "probabilities": probabilities}

    def _choices(self, record: dict[str, Any]) -> list[str] | str:
        if "choices" in record:
            found = record["choices"]
            if isinstance(found, dict):  # of ARC and CommonsenseQA, with their letters beside them
                found = found.get("text")
        else:
            found = [record[name] for name in _NUMBERED if record.get(name) is not None]
        if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found) or len(found) < 2:
            return "choices: expected a list of two strings or more"
        return found


def _question(record: dict[str, Any]) -> str:
    question = record.get("question") or ""
    return f"{record['context']} {_COPA_QUESTIONS.get(question, question)}".strip()


def _names(record: dict[str, Any]) -> list[str | None]:
    """What a record calls its choices: "A" to "E", or "1" to "4" in some of ARC."""
    choices = record.get("choices")
    return [label_text(name) for name in choices.get("label") or ()] if isinstance(choices, dict) else []


def _label(value: Any, choices: int, names: Sequence[str | None]) -> int | str:
    """The number of the right choice, from its name, a number from 0 or a letter from A; or what is wrong with it."""
    text = label_text(value) or ""
    if text in names:
        number = names.index(text)
    else:
        number = int(text) if re.fullmatch(r"\d+", text) else _LETTERS.find(text) if len(text) == 1 else -1
    return number if 0 <= number < choices else f"label {value!r} is none of {choices} choices (from 0, or from A)"


def _sample(encodings: Sequence[Any], label: int | None) -> Sample:
    made = [inputs_of(encoding) for encoding in encodings]
    tokens = np.concatenate([tokens for tokens, _ in made])
    return Sample(
        tokens,
        np.arange(len(tokens)) == 0,
        None if label is None else np.array([label], dtype=np.int64),
        {name: np.concatenate([inputs[name] for _, inputs in made]) for name in made[0][1]},
        rows=tuple(len(tokens) for tokens, _ in made),
        truncated=any(encoding.overflowing for encoding in encodings),
    )


def _logits(output: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """fp32 [samples, most choices]; -inf where a sample has fewer."""
    import torch

    logits = output.logits.float()
    counts = torch.tensor([len(sample.rows or ()) for sample in samples], device=logits.device)
    places = torch.arange(logits.shape[1], device=logits.device)
    found: torch.Tensor = logits.masked_fill(places[None, :] >= counts[:, None], float("-inf"))
    return found
