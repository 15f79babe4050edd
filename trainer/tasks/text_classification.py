"""A class, several classes or a number for a text or a pair of texts, by the model's own sequence-classification head.

The loss is cross-entropy, binary cross-entropy (mean over the classes) or the squared error; every sample counts one.
Layouts of GLUE and SuperGLUE are known by their column names. Longer pairs lose tokens from the longer text first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import TextClassificationTask
from trainer.data.sample import Sample
from trainer.tasks.base import Predictions, named_columns
from trainer.tasks.encoder import (
    EncoderTask,
    Labels,
    cross_entropy,
    inputs_of,
    labels_of,
    set_labels,
    set_padding,
    set_pooling,
    with_labels,
)
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# columns of GLUE's and SuperGLUE's tasks, in the order in which they are looked for
_LAYOUTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("sentence", None),
)
_DEFAULT_METRICS = {
    "single-label": ("accuracy",),
    "multi-label": ("micro_f1", "macro_f1"),
    "regression": ("pearson", "spearman"),
}


class TextClassification(EncoderTask):
    """Sentences and pairs of them."""

    auto_class = "AutoModelForSequenceClassification"
    structured = label_columns = frozenset({"label"})

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        if cast("TextClassificationTask", config.task).problem != "regression":
            config = with_labels(config, "label")
        super().__init__(config, tokenizer)
        self.task = task = cast("TextClassificationTask", config.task)
        self.labels = Labels(task.labels or ())
        self.metrics = task.metrics or _DEFAULT_METRICS[task.problem]

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        if source_columns.get("text", "text") == "text" and "text" not in record:
            for first, second in _LAYOUTS:
                if first in record and (second is None or second in record):
                    pair = {"text_pair": second} if second else {}
                    source_columns = {**pair, **source_columns, "text": first}
                    break
        needed = self.needed("text", "label")
        return named_columns("text-classification", needed, ("text_pair",), source_columns, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        labels = [self._label(record["label"]) if self.labelled else None for record in records]
        texts = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in records]
        results: list[Sample | list[Sample] | str] = []
        for label, encoding in zip(labels, self.encode_texts(texts), strict=True):
            if isinstance(label, str):
                results.append(label)
                continue
            tokens, inputs = inputs_of(encoding)
            targets = np.arange(len(tokens)) == 0
            results.append(Sample(tokens, targets, label, inputs, truncated=bool(encoding.overflowing)))
        return results

    def configure(self, model_config: Any) -> None:
        if self.task.problem == "regression":
            model_config.num_labels = 1
        else:
            set_labels(model_config, self.labels.names)
        model_config.problem_type = self.task.problem.replace("-", "_") + (
            "_classification" if self.labels.names else ""
        )
        set_padding(model_config, self.tokenizer)
        set_pooling(model_config, self.task.pooling)
        super().configure(model_config)

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        import torch
        from torch.nn import functional

        gold, logits = labels_of(samples), output.logits.float()
        if self.task.problem == "single-label":
            return cross_entropy(logits, gold, self.task.label_smoothing, self.task.class_weights)
        labels = torch.from_numpy(gold).to(logits.device).view_as(logits)
        if self.task.problem == "regression":
            return functional.mse_loss(logits, labels, reduction="sum")
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1).sum()

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """(gold, predicted) of each sample: ids of classes, lists of 0 and 1, or numbers."""
        logits = output.logits.float().cpu().numpy()
        gold = labels_of(samples).reshape(len(samples), -1)
        if self.task.problem == "single-label":
            return list(zip(gold[:, 0].tolist(), logits.argmax(-1).tolist(), strict=True))
        if self.task.problem == "multi-label":
            return list(zip(gold.astype(int).tolist(), (logits > 0).astype(int).tolist(), strict=True))
        return list(zip(gold[:, 0].tolist(), logits[:, 0].tolist(), strict=True))

    @property
    def scored(self) -> tuple[str, ...]:
        return tuple(self.metrics)

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        pairs = [pair for _, pair in predictions]
        gold, predicted = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
        return {name: _score(name, gold, predicted, len(self.labels.names)) for name in self.metrics} if pairs else {}

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """The number of each sample, or the probability of each class."""
        logits = output.logits.float()
        if self.task.problem == "regression":
            return [float(number) for number in logits[:, 0].tolist()]
        found = logits.sigmoid() if self.task.problem == "multi-label" else logits.softmax(-1)
        return [*found.tolist()]

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """A label with its probability, or labels (those of at least 0.5) with all probabilities, or a number."""
        if self.task.problem == "regression":
            return {"value": found[0]}
        probabilities = dict(zip(self.labels.names, found[0], strict=True))
        if self.task.problem == "multi-label":
            return {"labels": [n for n, p in probabilities.items() if p > 0.5], "probabilities": probabilities}
        label = max(probabilities, key=lambda name: probabilities[name])
        return {"label": label, "probability": probabilities[label], "probabilities": probabilities}

    def _label(self, value: Any) -> np.ndarray | str:
        if self.task.problem == "regression":
            try:
                number = float(value)
            except (TypeError, ValueError):
                return f"label {value!r} is no number"
            return np.array([number], dtype=np.float32) if np.isfinite(number) else f"label {value!r} is not finite"
        if self.task.problem == "multi-label":
            if not isinstance(value, list):
                return f"label is {type(value).__name__}, expected a list of classes"
            row = np.zeros(len(self.labels.names), dtype=np.float32)
            for item in value:
                found = self.labels.id(item)
                if isinstance(found, str):
                    return found
                row[found] = 1.0
            return row
        found = self.labels.id(value)
        return found if isinstance(found, str) else np.array([found], dtype=np.int64)


def _score(name: str, gold: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """One metric; F1 is that of class 1 where there are two classes (as GLUE has it), else the mean over classes."""
    from scipy import stats
    from sklearn import metrics

    match name:
        case "accuracy":
            return float(metrics.accuracy_score(gold, predicted))
        case "f1":
            binary = gold.ndim == 1 and classes == 2
            return float(metrics.f1_score(gold, predicted, average="binary" if binary else "macro", zero_division=0))
        case "macro_f1" | "micro_f1":
            return float(metrics.f1_score(gold, predicted, average=name.partition("_")[0], zero_division=0))
        case "matthews":
            return float(metrics.matthews_corrcoef(gold, predicted))
        case "mse":
            return float(metrics.mean_squared_error(gold, predicted))
        case _:
            if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
                return float("nan")  # no correlation with something that does not vary
            return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(gold, predicted).statistic)
