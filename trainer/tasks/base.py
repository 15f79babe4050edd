"""What a task is to the rest of dsft. Importing a task never imports torch: its loss does, when it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.schema import LaunchConfig
from trainer.data.sample import Origin, PackedSequence, Sample
from trainer.failures import DataError, UserError
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.engine import Engine

Predictions = list[tuple[Origin, Any]]


class Objective:
    """From the samples of a micro-batch to a loss, and to predictions.

    Attributes:
        head_parameters: elements of weights that run only where there is a label.
    """

    head_parameters = 0

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        """(sum of the loss over targets, fp32 scalar; tokens of padding).

        Without sequences (a rank with less work than the others) the loss is 0 and still reaches every parameter.
        """
        raise NotImplementedError

    def predict(self, engine: Engine, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, Predictions]:
        """(sum of the loss over targets, what `Task.scores` needs of each sample); every rank must make the call."""
        return self(engine.forward, sequences)[0], self.answer(engine, sequences)

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        """What `Task.answer` needs of each sample (at least one), which may have no labels: for `dsft predict`.

        The engine is then a whole model on each rank (`trainer.inference.Replica`), and ranks make calls
        of their own: nothing in here may wait for other ranks.
        """
        return []

    def check(self, engine: Engine) -> str | None:
        """Prove on the model what training relies on, if anything, and what to warn of. Every rank must make the call.

        Raises:
            UserError: what the model cannot be trained without does not hold.
        """
        return None


class BaseTask:
    """How records become samples, which model learns from them, and how its predictions are scored.

    Attributes:
        label_columns: task columns with what is to be predicted.
        labelled: False where there is nothing but questions (`dsft predict` sets it on a task of its own): `columns`
            then neither needs nor names `label_columns`, and `encode` makes samples without labels. These still have a
            target, since samples without any are left out as having nothing to learn.
    """

    auto_class: ClassVar[str]  # of transformers
    structured: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    splits = False
    pieces = False  # whether `encode` itself makes several samples of what is too long for one
    predicts = True
    counted = "samples"  # what targets are, in scores
    joined = 0  # answers so far that begin within a token of the prompt
    shown: Sequence[dict[str, Any]] = ()  # some of what the last evaluation generated
    signatures: Mapping[str, str] = {}  # how its scores were computed, by score
    label_columns: frozenset[str] = frozenset()
    loads = False  # whether `load` does anything
    paths: frozenset[str] = frozenset()  # task columns with images: paths in them are relative to the data file
    labelled = True

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        """Task column -> column of the file, for a source whose first record is given. Raises DataError."""
        raise NotImplementedError

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        """The sample of each record of the task's columns (or its samples), or what is wrong with it."""
        raise NotImplementedError

    def load(self, sample: Sample) -> Sample:
        """The sample with what is too large to be held for a whole window, made when its batch is."""
        return sample

    @property
    def auto(self) -> Any:
        """What makes and loads the model: transformers' `auto_class`, or what stands in its place."""
        import transformers

        return getattr(transformers, self.auto_class)

    def configure(self, model_config: Any) -> None:
        """Set what the task needs in a transformers config, before the model is built."""

    def configure_generation(self, generation: Any) -> None:
        """Set what the task needs in a model's generation config, of training and export."""

    def objective(self, model: Any, attention: str, device: torch.device) -> Objective:
        """The loss of this task on a model."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what an exported model needs besides its weights, configs and tokenizer."""

    def example(self) -> dict[str, Any]:
        """Inputs on which an export is compared with its checkpoint; none: token ids."""
        return {}

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of what `scores` can give."""
        return ()

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        """Scores of an evaluation besides the mean loss, from all predictions in the order of the data."""
        return {}

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """A record's answer, of JSON's types, from what `Objective.answer` gave of each of its samples, in order."""
        raise UserError(f"dsft predict cannot do {self.config.task.type}")

    def needed(self, *columns: str) -> tuple[str, ...]:
        """Those of ``columns`` that records must have: all, or the questions alone where they are not `labelled`."""
        return columns if self.labelled else tuple(name for name in columns if name not in self.label_columns)


def missing_column(name: str, column: str, record: Mapping[str, Any]) -> str:
    """What to do where a record lacks the column of the file that stands for a task's column."""
    found = ", ".join(map(repr, record)) or "none"
    return f"no column {column!r}; the record has {found}: map `{name}` under `columns`"


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
            raise DataError(missing_column(name, names[name], record))
    return {name: names[name] for name in known if name in needed or names[name] in record or name in source_columns}
