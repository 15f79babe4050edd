"""What a task is to the rest of dsft. Importing a task never imports torch: its loss does, when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainer.config.schema import LaunchConfig
from trainer.data.sample import Origin, PackedSequence, Sample
from trainer.failures import DataError
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.engine import Engine

Predictions = list[tuple[Origin, Any]]


class Objective(Protocol):
    """From the samples of a micro-batch to a loss, and to predictions.

    Attributes:
        head_parameters: elements of weights that run only where there is a label.
    """

    head_parameters: int

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        """(sum of the loss over targets, fp32 scalar; tokens of padding).

        Without sequences (a rank with less work than the others) the loss is 0 and still reaches every parameter.
        """

    def predict(self, engine: Engine, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, Predictions]:
        """(sum of the loss over targets, what `Task.scores` needs of each sample); every rank must make the call."""

    def check(self, engine: Engine) -> None:
        """Prove on the model what training relies on. Every rank must make the call. Raises UserError."""


class BaseTask:
    """How records become samples, which model learns from them, and how its predictions are scored."""

    auto_class: ClassVar[str]  # of transformers
    structured: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    splits = False
    predicts = True
    counted = "samples"  # what targets are, in scores

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        """Task column -> column of the file, for a source whose first record is given. Raises DataError."""
        raise NotImplementedError

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        """The sample of each record of the task's columns (or its samples), or what is wrong with it."""
        raise NotImplementedError

    def configure(self, model_config: Any) -> None:
        """Set what the task needs in a transformers config, before the model is built."""

    def objective(self, model: Any, attention: str, device: torch.device) -> Objective:
        """The loss of this task on a model."""
        raise NotImplementedError

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        """Scores of an evaluation besides the mean loss, from all predictions in the order of the data."""
        return {}


def named_columns(
    task: str,
    needed: Sequence[str],
    optional: Sequence[str],
    source_columns: dict[str, str],
    record: dict[str, Any],
) -> dict[str, str]:
    """Task column -> column of the file: as `columns` says, else of the same name.

    Raises:
        DataError: `columns` names what the task does not know, or a needed column is missing.
    """
    known = [*needed, *optional]
    for name in source_columns:
        if name not in known:
            raise DataError(f"columns: {name!r} is no column of {task}; known are {', '.join(known)}")
    names = {name: source_columns.get(name, name) for name in known}
    for name in needed:
        if names[name] not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise DataError(f"no column {names[name]!r}; the record has {found}: map `{name}` under `columns`")
    return {name: names[name] for name in known if name in needed or names[name] in record or name in source_columns}
