"""What tasks with one sample a sequence share: tokens with the special ones, and their loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import HeadConfig
from trainer.data.sample import Sample
from trainer.data.sources import lacks_names, open_source
from trainer.failures import DataError, UserError
from trainer.head import HeadAuto, save_head, set_head
from trainer.tasks.base import BaseTask, Objective, missing_column
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_MOST_LABELS = 10_000
_AT_ONCE = 4096  # records
# what model families call the dropout in front of a classifier
_HEAD_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "cls_dropout", "summary_last_dropout")


class HeadTask(BaseTask):
    """A task whose model reads a whole sample at once and whose head predicts labels.

    Attributes:
        chooses: whether the model reads several rows a sample, [samples, choices, length].
    """

    chooses = False

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        """Sum of the loss over the targets of ``samples`` (at least one), an fp32 scalar, from the model's output."""
        raise NotImplementedError

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """What the scores need of each sample, small and without tensors."""
        raise NotImplementedError

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """What `answer` needs of each sample, which may have no labels, small and without tensors."""
        raise NotImplementedError


class EncoderTask(HeadTask):
    """A task whose model reads texts."""

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        if tokenizer.backend is None:
            raise DataError(
                f"{tokenizer.origin} is a slow tokenizer, which {config.task.type} cannot use: give model.tokenizer a "
                "folder with a tokenizer.json"
            )
        import tokenizers

        # a copy: it is told to cut
        self.fast: Any = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self.fast.no_padding()
        self.fast.enable_truncation(config.data.sequence_length, strategy="longest_first")

    def configure(self, model_config: Any) -> None:
        set_head_dropout(model_config, getattr(self.config.task, "dropout", None))
        set_head(model_config, self.auto_class, self.head)

    def objective(self, model: Any, attention: str, device: torch.device) -> Objective:
        from trainer.objective import EncoderObjective

        return EncoderObjective(model, self, device)

    @property
    def head(self) -> HeadConfig | None:
        """Layers in place of the model's own head."""
        return getattr(self.config.task, "head", None)

    @property
    def auto(self) -> Any:
        return super().auto if self.head is None else HeadAuto(self.auto_class)

    def save(self, folder: Path) -> None:
        if self.head is not None:
            save_head(folder)

    def encode_texts(self, texts: Sequence[Any], **options: Any) -> list[Any]:
        """`tokenizers.Encoding` of each text or (text, text), cut to `data.sequence_length`, with special tokens."""
        found: list[Any] = self.fast.encode_batch(list(texts), add_special_tokens=True, **options)
        return found


def labels_of(samples: Sequence[Sample]) -> np.ndarray:
    """The labels of all samples, one after the other."""
    return np.concatenate([sample.labels for sample in samples if sample.labels is not None])


def cross_entropy(
    logits: torch.Tensor, labels: np.ndarray, label_smoothing: float = 0.0, class_weights: Sequence[float] = ()
) -> torch.Tensor:
    """Sum over rows of logits, an fp32 scalar; ``labels``, int64, has one a row."""
    import torch
    from torch.nn import functional

    return functional.cross_entropy(
        logits.float(),
        torch.from_numpy(labels).to(logits.device),
        weight=torch.tensor(class_weights, device=logits.device) if class_weights else None,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def inputs_of(encoding: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(token ids, int32 [length]; further inputs) of an encoding."""
    return (
        np.array(encoding.ids, dtype=np.int32),
        {"token_type_ids": np.array(encoding.type_ids, dtype=np.int64)},
    )


def set_labels(model_config: Any, labels: Sequence[str]) -> None:
    """Name the classes in a transformers config, which also sizes the head."""
    model_config.num_labels = len(labels)  # first: it resets the names
    model_config.id2label = dict(enumerate(labels))
    model_config.label2id = {name: index for index, name in enumerate(labels)}


def set_padding(model_config: Any, tokenizer: Tokenizer) -> None:
    """Tell a model how it is padded: decoders find the last token of a text by it."""
    if getattr(model_config, "pad_token_id", None) is None:
        model_config.pad_token_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def set_head_dropout(model_config: Any, dropout: float | None) -> None:
    """Set the dropout in front of the classifier. Raises UserError where the model has none by a known name."""
    if dropout is None:
        return
    names = [name for name in _HEAD_DROPOUTS if hasattr(model_config, name)]
    if not names:
        raise UserError(f"task.dropout: {model_config.model_type} has no dropout in front of its head; leave it out")
    for name in names:
        setattr(model_config, name, dropout)


def set_pooling(model_config: Any, pooling: str | None) -> None:
    """Set which vector of a text the classifier reads. Raises UserError where the model leaves no choice."""
    if pooling is None:
        return
    if getattr(model_config, "classifier_pooling", None) not in ("cls", "mean"):  # ModernBERT and its like have it
        raise UserError(f"task.pooling: the head of {model_config.model_type} leaves no choice; leave it out")
    model_config.classifier_pooling = pooling


def with_labels(config: LaunchConfig, column: str, also: Sequence[str] = ()) -> LaunchConfig:
    """The config with `task.labels`, which the training data tells where it does not.

    Raises:
        DataError: the data tells none.
        UserError: there are not as many `task.class_weights`.
    """
    task: Any = config.task
    if task.labels is None:
        config = config.altered(task={"labels": found_labels(config, column, also)})
        task = config.task
    weights = getattr(task, "class_weights", ())
    if weights and len(weights) != len(task.labels):
        raise UserError(f"task.class_weights: {len(weights)} for {len(task.labels)} labels")
    return config


def found_labels(config: LaunchConfig, column: str, also: Sequence[str] = ()) -> tuple[str, ...]:
    """The distinct values of a task column in all training data: numbers in their order, else sorted texts.

    Values in lists count one by one; negative numbers and nulls stand for "no label". ``also`` are names under which
    a file may have the column where the config does not map it.

    Raises:
        DataError: there are fewer than two, or too many.
    """
    values: set[str] = set()
    for source in config.data.train:
        opened, name = open_source(source), source.columns.get(column, column)
        begin = opened.read(range(min(opened.records, 100)))
        first = next((record for record, _ in begin if record), None)
        if first is None:
            raise DataError(begin[0][1])
        if column not in source.columns:
            name = next((other for other in (column, *also) if other in first), column)
        template = source.template.get(column)
        if template is None and name not in first:
            more = lacks_names(source, opened.files[0].name)
            raise DataError(f"{opened.where(0)}: {missing_column(column, name, first)}{more}")
        for start in range(0, opened.records, _AT_ONCE):
            for record, _ in opened.read(range(start, min(start + _AT_ONCE, opened.records))):
                value = None if record is None else _value_of(record, name, template)
                for item in value if isinstance(value, list) else [value]:
                    text = label_text(item)
                    if text is not None:
                        values.add(text)
            if len(values) > _MOST_LABELS:
                raise DataError(
                    f"{source.path}: column {name!r} holds more than {_MOST_LABELS} different values, too many for "
                    "classes: map another column to `label`, or give task.labels"
                )
    if len(values) < 2:
        found = ", ".join(map(repr, sorted(values))) or "none"
        raise DataError(
            f"the training data has fewer than two labels ({found}): map `{column}` under `columns`, or give "
            "task.labels"
        )
    numeric = all(re.fullmatch(r"\d+", value) for value in values)
    return tuple(sorted(values, key=int) if numeric else sorted(values))


def _value_of(record: dict[str, Any], column: str, template: str | None) -> Any:
    if template is None:
        return record.get(column)
    try:
        return template.format_map(record)
    except KeyError:  # told when the record is encoded
        return None


def label_text(value: Any) -> str | None:
    """A label as text: `True` is "1", 2.0 is "2"; None for null, NaN, the empty text and negative numbers."""
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = str(int(value))
    if value is None or value != value or value == "" or (isinstance(value, str) and re.fullmatch(r"-\d+", value)):
        return None
    return str(value)


class Labels:
    """Names of classes and their ids."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ids = {name: index for index, name in enumerate(names)}
        self._by_number = not any(re.fullmatch(r"\d+", name) for name in names)  # "0" is none of "1" to "5"

    def id(self, value: Any) -> int | str:
        """The id of a label, given by name, or by number where no name is one; or what is wrong with it."""
        text = label_text(value)
        if text in self._ids:
            return self._ids[text]
        if self._by_number and text is not None and re.fullmatch(r"\d+", text) and int(text) < len(self.names):
            return int(text)
        some = ", ".join(map(repr, self.names[:8])) + (", ..." if len(self.names) > 8 else "")
        return f"label {value!r} is none of the {len(self.names)} classes ({some}); see task.labels"
