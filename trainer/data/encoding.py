"""Records of one source -> samples that fit into a sequence. Nothing here depends on ranks or on order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from trainer.config.schema import DataSource
from trainer.data.formats.base import Outcome
from trainer.data.images import resolved
from trainer.data.sample import Sample
from trainer.data.sources import Source, lacks_names
from trainer.failures import DataError

# What became of a record that gives no sample, or more than one; counted over all ranks.
BAD, LONG_SKIPPED, NOTHING_TO_LEARN, SPLIT, TRUNCATED = range(5)
OUTCOMES = ("bad", "skipped_long", "nothing_to_learn", "split", "truncated")

_SURROGATE = re.compile("[\ud800-\udfff]")
_LOOKED_AT = 100  # records, for their columns

Encoded = tuple[dict[int, list[Sample]], list[tuple[int, int]]]


class Encoder(Protocol):
    """The part of a task that the data needs.

    Attributes:
        structured: task columns that need not be strings.
        optional: task columns that a record may lack.
        splits: whether a sample that is too long can be cut anywhere; else the task cuts it itself.
        pieces: whether `encode` itself makes several samples of what is too long for one.
        predicts: whether predictions are scored: samples then know their origin.
        paths: task columns with images, whose paths are relative to the data file.
        loads: whether `load` does anything.
    """

    structured: frozenset[str]
    optional: frozenset[str]
    splits: bool
    pieces: bool
    predicts: bool
    paths: frozenset[str]
    loads: bool

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        """Task column -> column of the file. Raises DataError where the record has not what the task needs."""

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        """The sample of each record of the task's columns (or its samples), or what is wrong with it."""

    def load(self, sample: Sample) -> Sample:
        """The sample with what is too large to be held for a whole window."""


class SourceEncoder:
    """Reads records of a source and encodes them as a task does."""

    def __init__(
        self, source: Source, task: Encoder, sequence_length: int, on_long: str, on_bad_record: str, index: int = 0
    ) -> None:
        self.source, self._task, self._index = source, task, index
        self._limit, self._on_long, self._on_bad = sequence_length, on_long, on_bad_record
        self._columns = self._find_columns()
        self._named = tuple(self._columns.items())
        self.on_bad: Callable[[str], None] | None = None  # told what is wrong with each bad record that is skipped

    def encode(self, numbers: np.ndarray, positions: Iterable[int]) -> Encoded:
        """(position -> samples, [(position, outcome)]) of the documents ``numbers[positions]``.

        Raises:
            DataError: a bad record with on_bad_record "error", a long one with on_long "error".
        """
        positions = list(positions)
        outcomes: list[tuple[int, int]] = []
        records, kept = [], []

        def bad(position: int, problem: str) -> None:
            if self._on_bad == "error":
                raise DataError(f'{problem} (data.on_bad_record: "skip" counts such records instead)')
            outcomes.append((position, BAD))
            if self.on_bad is not None:
                self.on_bad(problem)

        wanted = numbers[positions].tolist()
        for position, number, (record, problem) in zip(positions, wanted, self.source.read(wanted), strict=True):
            made = None
            if record is not None:
                made, problem = self._checked(record, number)
            if made is None:
                bad(position, problem or "")
            else:
                records.append(made)
                kept.append(position)
        pieces = {}
        for position, sample in zip(kept, self._task.encode(records) if records else [], strict=True):
            if isinstance(sample, str):
                bad(position, f"{self.source.where(int(numbers[position]))}: {sample}")
                continue
            number = int(numbers[position])
            fitted, found = self._fitted(sample if isinstance(sample, list) else [sample], number)
            if self._task.predicts:
                fitted = [replace(one, origin=(self._index, number, piece)) for piece, one in enumerate(fitted)]
            pieces[position] = fitted
            outcomes += [(position, outcome) for outcome in found]
        return pieces, outcomes

    def _checked(self, record: dict[str, Any], number: int) -> Outcome:
        """The task's columns of a record, or what is wrong with it."""
        if (plain := self._plain_record(record)) is not None:
            return plain, None
        if problem := self._column_problem(record, number):
            return None, problem
        made = self._task_record(record)
        for name in self._task.paths & made.keys():
            made[name] = resolved(made[name], self.source.folder(number))
        return made, None

    def _plain_record(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The task's columns where all are ASCII text, as in most records; None: it has to be looked at."""
        if self.source.config.template or self._task.paths:
            return None
        made = {}
        for name, column in self._named:
            value = record.get(column)
            if type(value) is not str or not value.isascii():
                return None
            made[name] = value
        return made

    def _task_record(self, record: dict[str, Any]) -> dict[str, Any]:
        if template := self.source.config.template:
            return {name: text.format_map(_Shown(record)) for name, text in template.items()}
        return {name: record.get(column) for name, column in self._named}

    def named(self, number: int, columns: frozenset[str]) -> dict[str, Any]:
        """Those of a record's task columns, as they are in the data."""
        record, _ = self.source.read([number])[0]
        made = self._task_record(record) if record is not None else {}
        return {name: value for name, value in made.items() if name in columns}

    def _fitted(self, samples: list[Sample], number: int) -> tuple[list[Sample], list[int]]:
        """Samples that fit, with at least one target each, and what is to be counted."""
        limit, on_long = self._limit, self._on_long
        if len(samples) == 1 and not samples[0].truncated and samples[0].longest <= limit:  # nearly all
            return (samples, []) if np.count_nonzero(samples[0].targets) else ([], [NOTHING_TO_LEARN])
        longest = max((sample.longest for sample in samples), default=0)
        outcomes = [SPLIT] if self._task.pieces and len(samples) > 1 else []
        if longest > limit or any(sample.truncated for sample in samples):
            if on_long == "error":
                tokens = f"{longest} tokens are" if longest > limit else "it has"
                raise DataError(
                    f"{self.source.where(number)}: {tokens} more than data.sequence_length ({limit}): raise it, "
                    f"or set data.on_long to {'split, ' * (self._task.splits or self._task.pieces)}truncate or skip"
                )
            if on_long == "skip":
                return [], [LONG_SKIPPED]
            split = on_long == "split" and self._task.splits
            outcomes.append(SPLIT if split else TRUNCATED)
            if longest > limit:
                samples = [piece for sample in samples for piece in _cut(sample, limit, split)]
        samples = [sample for sample in samples if np.count_nonzero(sample.targets)]
        return samples, outcomes if samples else [*outcomes, NOTHING_TO_LEARN]

    def _find_columns(self) -> dict[str, str]:
        """Task column -> column of this source, from its first readable record."""
        problem: str | None = None
        config = self.source.config
        for number in range(min(self.source.records, _LOOKED_AT)):
            record, found = self.source.read([number])[0]
            problem = problem or found
            if record is not None:
                try:
                    if config.template:
                        self._task.columns({name: name for name in config.template}, dict(config.template))
                        return {name: name for name in placeholders(config)}
                    return self._task.columns(config.columns, record)
                except DataError as error:
                    more = lacks_names(config, self.source.files[0].name)
                    raise DataError(f"{self.source.where(number)}: {error}{more}") from None
            if self._on_bad == "error":
                break
        raise DataError(problem or f"{config.path}: no records")

    def _column_problem(self, record: dict[str, Any], number: int) -> str | None:
        for name, column in self._named:
            if column not in record:
                if name in self._task.optional:
                    continue
                found = ", ".join(map(repr, record)) or "none"
                return f"{self.source.where(number)}: no column {column!r}; the record has {found}"
            value = record[column]
            plain = self.source.config.template and isinstance(value, int | float) and not isinstance(value, bool)
            if not isinstance(value, str) and name not in self._task.structured and not plain:
                kind = "null" if value is None else type(value).__name__
                return f"{self.source.where(number)}: column {column!r} is {kind}, expected a string"
            if has_surrogates(value):  # JSON allows \ud800 alone, no tokenizer does
                return (
                    f"{self.source.where(number)}: column {column!r} holds half of a surrogate pair, which is no text"
                )
        return None


class _Shown(dict[str, Any]):
    """Values for placeholders; braces in them are text."""

    def __getitem__(self, key: str) -> str:
        return str(super().__getitem__(key))


def placeholders(config: DataSource) -> list[str]:
    """Columns that a source's template names."""
    from string import Formatter

    named = (field for text in config.template.values() for _, field, _, _ in Formatter().parse(text))
    return sorted({field for field in named if field})


def has_surrogates(value: Any) -> bool:
    """Whether a text, or any text in lists and objects, holds half of a surrogate pair."""
    if isinstance(value, str):
        return not value.isascii() and bool(_SURROGATE.search(value))
    if isinstance(value, dict):
        return any(has_surrogates(item) for pair in value.items() for item in pair)
    return isinstance(value, list | tuple) and any(map(has_surrogates, value))


def _cut(sample: Sample, limit: int, split: bool) -> list[Sample]:
    """Pieces of at most ``limit`` tokens; without ``split`` the first one alone."""
    # pieces overlap by a token: the last of one is what the first target of the next is predicted from
    starts = range(0, max(len(sample.tokens) - 1, 1), max(limit - 1, 1)) if split else (0,)
    pieces = []
    for start in starts:
        targets = sample.targets[start : start + limit].copy()
        targets[0] = False
        pieces.append(Sample(sample.tokens[start : start + limit], targets))
    return pieces
