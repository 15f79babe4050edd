"""The `task` section of a config, one class a task. See docs/tasks.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.config.generation import CodeExecutionConfig, SummarizationTask, TranslationTask, WritingTask
from trainer.config.section import Finite, Flag, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

# Tasks without texts
UNTOKENIZED_TASKS = frozenset({"image-classification"})
# Tasks whose samples may share a sequence
PACKED_TASKS = frozenset({"causal-lm"})


class CausalLMTask(WritingTask):
    """Next-token prediction: instruction tuning (`prompt` + `completion`) or plain text (`text`)."""

    type: Literal["causal-lm"]
    code_execution: CodeExecutionConfig = CodeExecutionConfig()

    @model_validator(mode="after")
    def _text_to_score(self) -> CausalLMTask:
        if self.generation is None and (self.metrics or self.code_execution.enabled):
            raise ValueError("`metrics` and `code_execution` are of generated texts: give `generation` as well")
        drawn = self.generation.samples_per_prompt if self.generation else 0
        if self.code_execution.enabled and max(self.code_execution.pass_at) > drawn:
            raise ValueError(f"pass@{max(self.code_execution.pass_at)} needs as many generation.samples_per_prompt")
        return self


class HeadConfig(Section):
    """Layers in place of the model's own head."""

    hidden_sizes: tuple[PositiveInt, ...] = Field((), description="Widths of the layers before the last, with GELU")
    dropout: Fraction = Field(0.1, description="In front of each layer")


class PooledHeadConfig(HeadConfig):
    """Layers in place of the model's own head, which read a text as one vector."""

    pooling: Literal["cls", "mean", "max", "last"] = Field(
        "mean", description="Of the vectors of a text's tokens: the first, their mean or maximum, the last"
    )


class _Classes(Section):
    """What tasks share that tell classes (of words: tags) apart."""

    labels: tuple[str, ...] | None = Field(
        None, description="Names of the classes in the order of their ids; default: what the training data holds"
    )
    label_smoothing: Fraction = 0.0

    @model_validator(mode="after")
    def _distinct(self) -> _Classes:
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError("`labels` needs at least two names")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("`labels` names one class twice")
        return self


class _WeightedClasses(_Classes):
    """The same, of texts."""

    class_weights: tuple[PositiveFloat, ...] = Field((), description="Weight of each class in the loss, one per label")
    dropout: Fraction | None = Field(None, description="Of the head; default: the model's")

    @model_validator(mode="after")
    def _a_weight_each(self) -> _WeightedClasses:
        if self.class_weights and self.labels and len(self.class_weights) != len(self.labels):
            raise ValueError(f"{len(self.class_weights)} class_weights for {len(self.labels)} labels")
        return self


class TextClassificationTask(_WeightedClasses):
    """A class, several, or a number for a text or a pair of texts (`text`, `text_pair`, `label`)."""

    type: Literal["text-classification"]
    problem: Literal["single-label", "multi-label", "regression"] = "single-label"
    metrics: tuple[Literal["accuracy", "f1", "macro_f1", "micro_f1", "matthews", "pearson", "spearman", "mse"], ...] = (
        Field(
            (), description="Default: accuracy; of several labels micro_f1 and macro_f1; of numbers pearson, spearman"
        )
    )
    pooling: Literal["cls", "mean"] | None = Field(
        None, description="What the head reads, where the model lets choose (ModernBERT): the first token, or the mean"
    )
    head: PooledHeadConfig | None = Field(None, description="Layers of one's own choice; default: the model's own head")

    @model_validator(mode="after")
    def _sensible(self) -> TextClassificationTask:
        _check_head(self.head, dropout=self.dropout, pooling=self.pooling)
        if self.problem == "regression" and self.labels:
            raise ValueError("`labels` name classes, which a regression has none of")
        if self.problem != "single-label" and (self.label_smoothing or self.class_weights):
            raise ValueError("`label_smoothing` and `class_weights` are for single-label problems")
        return self


class TokenClassificationTask(_WeightedClasses):
    """A tag for each word (`tokens`, `tags`): named entities, parts of speech."""

    type: Literal["token-classification"]
    scheme: Literal["auto", "none", "IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU"] = Field(
        "auto",
        description="How tags mark entities; auto: IOBES, BILOU or IOB2 (BIO) by the names of the tags, none if they "
        "mark no entities",
    )
    head: HeadConfig | None = Field(None, description="Layers of one's own choice; default: the model's own head")

    @model_validator(mode="after")
    def _sensible(self) -> TokenClassificationTask:
        _check_head(self.head, dropout=self.dropout)
        return self


class QuestionAnsweringTask(Section):
    """The span of a context that answers a question (`question`, `context`, `answers`), as in SQuAD."""

    type: Literal["question-answering"]
    unanswerable: Flag = Field(False, description="A question may have no answer in its context (SQuAD v2)")
    doc_stride: NonNegativeInt = Field(
        128, description="Tokens that neighbouring windows of a context share where it is too long for one sequence"
    )
    max_question_tokens: PositiveInt = Field(64, description="Longer questions are cut")
    max_answer_tokens: PositiveInt = Field(30, description="Longer spans are never predicted")
    n_best: PositiveInt = Field(20, description="Spans of a window that are looked at")
    no_answer_threshold: Finite = Field(
        0.0, description='Predict "no answer" where its score exceeds the best span\'s by more than this'
    )


class MultipleChoiceTask(Section):
    """Which of several texts goes on from a context, or answers a question on it."""

    type: Literal["multiple-choice"]
    dropout: Fraction | None = Field(None, description="Of the head; default: the model's")
    head: PooledHeadConfig | None = Field(None, description="Layers of one's own choice; default: the model's own head")

    @model_validator(mode="after")
    def _sensible(self) -> MultipleChoiceTask:
        _check_head(self.head, dropout=self.dropout)
        return self


class ImageClassificationTask(_Classes):
    """A class for an image (`image`, `label`)."""

    type: Literal["image-classification"]


class ImageTextToTextTask(WritingTask):
    """Texts about images: `prompt` and `image` are read, `completion` is learned; or `messages`."""

    type: Literal["image-text-to-text"]

    @model_validator(mode="after")
    def _one_row_a_prompt(self) -> ImageTextToTextTask:
        if self.generation is None and self.metrics:
            raise ValueError("`metrics` are of generated texts: give `generation` as well")
        if self.generation is not None and self.generation.num_beams > 1:
            raise ValueError("generation.num_beams: beams of prompts with several images get them mixed up; leave it 1")
        return self


def _check_head(head: HeadConfig | None, **of_the_models_own: Any) -> None:
    for name, value in of_the_models_own.items():
        if head is not None and value is not None:
            raise ValueError(f"`{name}` is of the model's own head: with `head`, give `head.{name}`")


Task = Annotated[
    CausalLMTask
    | TranslationTask
    | SummarizationTask
    | TextClassificationTask
    | TokenClassificationTask
    | QuestionAnsweringTask
    | MultipleChoiceTask
    | ImageClassificationTask
    | ImageTextToTextTask,
    Field(discriminator="type"),
]
