"""One module a task: how a record becomes samples, which model class it needs, its loss and scores."""

from __future__ import annotations

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import UNTOKENIZED_TASKS, CausalLMTask
from trainer.tasks.base import BaseTask
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.image_text_to_text import ImageTextToText
from trainer.tasks.multiple_choice import MultipleChoice
from trainer.tasks.question_answering import QuestionAnswering
from trainer.tasks.seq2seq import SequenceToSequence
from trainer.tasks.text_classification import TextClassification
from trainer.tasks.token_classification import TokenClassification
from trainer.tasks.writing import WritingCausalLM
from trainer.tokenizer import NO_TOKENIZER, Tokenizer, load_tokenizer

Task = BaseTask

_TASKS: dict[str, type[BaseTask]] = {
    "causal-lm": CausalLM,
    "text-classification": TextClassification,
    "translation": SequenceToSequence,
    "summarization": SequenceToSequence,
    "token-classification": TokenClassification,
    "multiple-choice": MultipleChoice,
    "question-answering": QuestionAnswering,
    "image-classification": ImageClassification,
    "image-text-to-text": ImageTextToText,
}


def task_tokenizer(config: LaunchConfig) -> Tokenizer:
    """The tokenizer of a config; one that does nothing for tasks without texts. Raises DataError."""
    return NO_TOKENIZER if config.task.type in UNTOKENIZED_TASKS else load_tokenizer(config.model)


def get_task(config: LaunchConfig, tokenizer: Tokenizer) -> BaseTask:
    """The task of a config. Raises DataError where its data or tokenizer are not what it needs."""
    if isinstance(config.task, CausalLMTask) and config.task.generation is not None:
        return WritingCausalLM(config, tokenizer)
    return _TASKS[config.task.type](config, tokenizer)
