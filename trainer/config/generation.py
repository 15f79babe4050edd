"""Sections of tasks that write text: how it is generated, scored, and, for programs, run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.section import Finite, Flag, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

TextMetric = Literal["bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "final_answer"]


class GenerationConfig(Section):
    """How text is generated when the evaluation data is scored; meanings are those of transformers' `generate`."""

    max_new_tokens: PositiveInt = 128
    num_beams: PositiveInt = 1
    length_penalty: Finite = Field(1.0, description="Of beam search: above 0 prefers long texts")
    do_sample: Flag = Field(False, description="Draw tokens; the same ones at any number of ranks")
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = Field(0, description="Draw from the so many likeliest tokens; 0: from all")
    top_p: Fraction = 1.0
    seed: NonNegativeInt = 0
    samples_per_prompt: PositiveInt = Field(1, description="Texts drawn for each prompt, as pass@k needs them")
    repetition_penalty: PositiveFloat = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0
    batch_size: PositiveInt = Field(16, description="Texts that a rank generates at a time; bounds the memory")
    stop: tuple[str, ...] = Field((), description="A text ends before the first of these")
    shown: NonNegativeInt = Field(8, description="Samples of each evaluation that go to samples.jsonl and TensorBoard")

    @model_validator(mode="after")
    def _one_method(self) -> GenerationConfig:
        if self.do_sample and self.num_beams > 1:
            raise ValueError("`num_beams` is for search and `do_sample` for drawing: give one of them")
        if self.samples_per_prompt > 1 and not self.do_sample:
            raise ValueError("without `do_sample` all `samples_per_prompt` texts would be the same one")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("`temperature`, `top_k` and `top_p` do nothing without `do_sample`")
        if "" in self.stop:
            raise ValueError("`stop` holds an empty text, which every text begins with")
        return self


class CodeExecutionConfig(Section):
    """Runs generated programs against their tests, in a sandbox. See docs/generation.md for what it holds back."""

    enabled: Flag = Field(False, description="Run programs that a model has written, on the machines that train it")
    pass_at: tuple[PositiveInt, ...] = Field((1,), min_length=1, description="Each k of pass@k")
    timeout_seconds: PositiveFloat = Field(5.0, description="Wall clock and CPU time of one program")
    memory_mib: PositiveInt = Field(512, description="Address space of each of a program's processes")
    file_mib: PositiveInt = Field(16, description="Size of a program's folder")
    processes: PositiveInt = Field(8, description="Processes and threads of one program")
    at_once: PositiveInt = Field(2, description="Programs that a rank runs side by side")


class WritingTask(Section):
    """What tasks share that generate text at evaluation."""

    generation: GenerationConfig | None = Field(None, description="Texts written at evaluations; null: none are")
    metrics: tuple[TextMetric, ...] = Field((), description="Scores of the texts that are generated")
    answer_pattern: str = Field(
        r"####\s*(\S+)", description="Regular expression of `final_answer`: the last match's first group is compared"
    )
    bleu_tokenizer: Literal["13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "none"] = (
        Field("13a", description="Of sacreBLEU")
    )
    rouge_stemmer: Flag = Field(False, description="Porter's, for English")

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        if not groups:
            raise ValueError("needs a group in parentheses around the answer")
        return value


class _SequenceToSequenceTask(WritingTask):
    """`source` is read by an encoder, `target` is written by a decoder."""

    generation: GenerationConfig | None = Field(
        GenerationConfig(), description="Texts written at evaluations; null: none are"
    )
    source_prefix: str = Field("", description='Put before every source: "translate English to German: " for T5')
    source_language: str | None = Field(None, description='Language code of the tokenizer: "en_XX" for mBART')
    target_language: str | None = Field(None, description='"de_DE" for mBART')
    max_target_tokens: PositiveInt | None = Field(
        None, description="Of data.sequence_length, which source and target share; default: half of it"
    )

    @model_validator(mode="after")
    def _both_languages(self) -> _SequenceToSequenceTask:
        if (self.source_language is None) != (self.target_language is None):
            raise ValueError("give both `source_language` and `target_language`, or neither")
        return self


class TranslationTask(_SequenceToSequenceTask):
    """Encoder-decoder models: `source` becomes `target`, scored by BLEU and chrF."""

    type: Literal["translation"]


class SummarizationTask(_SequenceToSequenceTask):
    """Encoder-decoder models: `source` becomes `target`, scored by ROUGE."""

    type: Literal["summarization"]
