"""The `task` section of a config, one class a task. See docs/tasks.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.section import Fraction, PositiveFloat, Section

# Tasks whose samples may share a sequence
PACKED_TASKS = frozenset({"causal-lm"})


class CausalLMTask(Section):
    """Next-token prediction: instruction tuning (`prompt` + `completion`) or plain text (`text`)."""

    type: Literal["causal-lm"]


class TextClassificationTask(Section):
    """A class, several, or a number for a text or a pair of texts (`text`, `text_pair`, `label`)."""

    type: Literal["text-classification"]
    problem: Literal["single-label", "multi-label", "regression"] = "single-label"
    labels: tuple[str, ...] | None = Field(
        None, description="Names of the classes in the order of their ids; default: what the training data holds"
    )
    metrics: tuple[Literal["accuracy", "f1", "macro_f1", "micro_f1", "matthews", "pearson", "spearman", "mse"], ...] = (
        Field(
            (), description="Default: accuracy; of several labels micro_f1 and macro_f1; of numbers pearson, spearman"
        )
    )
    label_smoothing: Fraction = 0.0
    class_weights: tuple[PositiveFloat, ...] = Field((), description="Weight of each class in the loss, one per label")
    dropout: Fraction | None = Field(None, description="Of the head; default: the model's")

    @model_validator(mode="after")
    def _sensible(self) -> TextClassificationTask:
        _check_labels(self.labels)
        if self.problem == "regression" and self.labels:
            raise ValueError("`labels` name classes, which a regression has none of")
        if self.problem != "single-label" and (self.label_smoothing or self.class_weights):
            raise ValueError("`label_smoothing` and `class_weights` are for single-label problems")
        if self.class_weights and self.labels and len(self.class_weights) != len(self.labels):
            raise ValueError(f"{len(self.class_weights)} class_weights for {len(self.labels)} labels")
        return self


def _check_labels(labels: tuple[str, ...] | None) -> None:
    if labels is not None and len(labels) < 2:
        raise ValueError("`labels` needs at least two names")
    if labels is not None and len(set(labels)) < len(labels):
        raise ValueError("`labels` names one class twice")


Task = Annotated[CausalLMTask | TextClassificationTask, Field(discriminator="type")]
