"""The section `data`: what the model learns from, in which order and shape."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from trainer.config.errors import is_secret_url
from trainer.config.section import Auto, Flag, NonNegativeInt, PositiveFloat, PositiveInt, Section


def _path_or_two(schema: dict[str, Any]) -> None:
    schema["required"].remove("path")
    schema["anyOf"] = [{"required": ["path"]}, {"required": ["source_path", "target_path"]}]


class DataSource(Section):
    """One source of records: files, folders or globs, here or remote, or a Hugging Face dataset. See docs/data.md."""

    model_config = ConfigDict(json_schema_extra=_path_or_two)

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$",
        description="Of an evaluation source: those of one name are scored by themselves as well, as name/metric",
    )
    path: str = Field(
        description="File, folder, glob, URL (https://, s3://, hf://datasets/org/name/file) or hub dataset "
        "(hf://org/name, hf://org/name@revision)"
    )
    format: Literal[
        "auto",
        "jsonl",
        "text",
        "csv",
        "tsv",
        "conll",
        "squad",
        "parallel",
        "parquet",
        "arrow",
        "webdataset",
        "datasets",
    ] = Field("auto", description="auto: by the name of the file")
    source_path: str | None = Field(
        None, description="Of the format parallel, in place of `path`: text files whose lines are the sources"
    )
    target_path: str | None = Field(None, description="Of the format parallel: as many lines, their targets")
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the sequences drawn from this source, relative to the others; without any weights, each "
        "source's share is that of its records times its epochs",
    )
    epochs: PositiveFloat | Literal["repeat"] | None = Field(
        None,
        description="Of a training source: taken so often in the whole training, and then no more while others go on; "
        "repeat: again and again to the end of the training, which with `training.epochs` is that of the sources that "
        "do not repeat. Default: `training.epochs`; with `max_steps`, repeat",
    )
    columns: dict[str, str] = Field(default_factory=dict, description="Task column -> column in the file")
    column_names: tuple[str, ...] = Field(
        (), description="Columns of a csv or tsv file without a header, or of a conll file"
    )
    quoting: Flag = Field(True, description="csv and tsv: double quotes as in RFC 4180; off: they are ordinary text")
    template: dict[str, str] = Field(
        default_factory=dict,
        description='Task column -> text with placeholders, as {"prompt": "Q: {question}", "completion": "{answer}"}',
    )
    subset: str | None = Field(None, description="Configuration of a hub dataset")
    split: str | None = Field(None, description="Split of a Hugging Face dataset; default: train")
    limit: PositiveInt | None = Field(None, description="Use only the first so many records")

    @model_validator(mode="before")
    @classmethod
    def _parallel(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = [name for name in ("source_path", "target_path") if value.get(name) is not None]
        if not given and value.get("format") != "parallel":
            return value
        if len(given) < 2 or value.get("format", "parallel") != "parallel":
            raise ValueError('`source_path` and `target_path` are given together, with the format "parallel"')
        return {**value, "format": "parallel", "path": value["source_path"]}  # what is told of a source by its path

    @field_validator("path", "source_path", "target_path")
    @classmethod
    def _without_secret(cls, path: str | None) -> str | None:
        if path is not None and is_secret_url(path):
            raise ValueError(
                "this URL holds a secret, which records of the run would keep: give it to fsspec "
                "(~/.config/fsspec/conf.json, or the storage's own configuration), or download the file"
            )
        return path

    @field_validator("template")
    @classmethod
    def _placeholders(cls, template: dict[str, str]) -> dict[str, str]:
        for name, text in template.items():
            try:
                fields = [parsed[1:] for parsed in Formatter().parse(text) if parsed[1] is not None]
            except ValueError as error:
                raise ValueError(f"{name}: {error}; write {{{{ and }}}} for braces that are text") from None
            if any(not field or form or how or re.search(r"[.\[\]]", field) for field, form, how in fields):
                raise ValueError(f"{name}: a placeholder is {{column}}, nothing more; {{{{ and }}}} stand for braces")
        return template

    @model_validator(mode="after")
    def _one_mapping(self) -> DataSource:
        if self.template and self.columns:
            raise ValueError("give `columns` or `template`, not both: placeholders name the columns of the file")
        return self


class DataConfig(Section):
    """What the model learns from, in which order and shape."""

    train: tuple[DataSource, ...] = Field(min_length=1, description="What is learned from, mixed")
    evaluation: tuple[DataSource, ...] = Field((), description="What is scored, never learned")
    sequence_length: PositiveInt = Field(description="Tokens per sequence")
    packing: Flag = Field(
        True, description="Several samples share a sequence, none sees another; default: wherever the task allows it"
    )
    seed: NonNegativeInt = Field(0, description="Of the order of the data")
    on_long: Literal["split", "truncate", "skip", "error"] = Field(
        "split", description="A record longer than `sequence_length`"
    )
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="A record that cannot be read or used; those skipped are counted"
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="Of `messages`: every assistant turn is learned, the last one, or everything"
    )
    chat_template_arguments: dict[str, Any] = Field(
        default_factory=dict, description='Variables of the tokenizer\'s chat template: {"enable_thinking": false}'
    )
    workers: NonNegativeInt | Auto = Field(
        "auto", description="Processes of a rank that tokenise its training data; 0: a thread of the rank does"
    )
    prepared: str | None = Field(None, description="Folder of `dsft prepare`: `train`, tokenised already")
    allow_changed: Flag = Field(False, description="Go on with a run although its data has changed")
    window_documents: PositiveInt = Field(
        4096, description="Documents shuffled and packed together; part of the global order"
    )

    @model_validator(mode="after")
    def _evaluated_once(self) -> DataConfig:
        if any(source.epochs is not None for source in self.evaluation):
            raise ValueError("`evaluation` is scored in one pass: `epochs` is for sources of `train`")
        return self
