"""Formats of annotated text: CoNLL columns, the nested JSON of SQuAD, the lines of two parallel files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from trainer.data.cache import cached, file_identity
from trainer.data.formats.base import Record
from trainer.failures import DataError

DOCUMENT_LINE = re.compile(rb"-DOCSTART-[^\n]*")  # stands between the documents of CoNLL-2003


def parse_sentence(text: str, names: Sequence[str]) -> Record:
    """The columns of a sentence, each a list of strings, one a token; without names `tokens` (first), `tags` (last).

    Columns stand between tabs, or between spaces where no line has a tab. In a sentence with tabs, lines without
    one that begin with "#" are comments, as in CoNLL-U.

    Raises:
        ValueError: a line has not as many columns as the others, or as there are names.
    """
    lines = [line for line in text.replace("\r", "").split("\n") if line.strip() and not line.startswith("-DOCSTART-")]
    if any("\t" in line for line in lines):
        rows = [line.split("\t") for line in lines if "\t" in line or not line.startswith("#")]
    else:
        rows = [re.split("[ \t]+", line.strip(" \t")) for line in lines]  # other white space may be in a token
    width = len(names) or (len(rows[0]) if rows else 0)
    for row in rows:
        if len(row) != width:
            raise ValueError(f"{len(row)} columns in the line of {row[0]!r}, expected {width}")
    if not names and width < 2:
        raise ValueError("one column: expected a token and its tag in each line (or name columns in `column_names`)")
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True)) if names else {"tokens": columns[0], "tags": columns[-1]}


def squad_lines(path: Path, name: str) -> Path:
    """The questions of a SQuAD file (data, paragraphs, qas) one a line, in the cache.

    Raises:
        DataError: it is no such file.
    """

    def write(file: IO[bytes]) -> None:
        try:
            for record in _questions(json.loads(path.read_text(encoding="utf-8-sig"))):
                file.write(json.dumps(record).encode() + b"\n")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"{name} is no SQuAD file (data, paragraphs, context, qas): {problem}") from error

    return cached("expanded", f"1 {file_identity(path)} squad", ".jsonl", write)


def parallel_lines(source: Path, target: Path, name: str, other: str) -> Path:
    """{"source", "target"} for each line of two text files, one a line, in the cache.

    Raises:
        DataError: they have not as many lines, or are not UTF-8.
    """

    def write(file: IO[bytes]) -> None:
        with source.open("rb") as sources, target.open("rb") as targets:
            for number, pair in enumerate(zip_longest(sources, targets), 1):
                if None in pair:
                    short, long = (name, other) if pair[0] is None else (other, name)
                    raise DataError(f"{short} ends after line {number - 1}, {long} goes on: lines have to match")
                try:
                    texts = [line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n") for line in pair]
                except UnicodeDecodeError as error:
                    raise DataError(f"{name} and {other}, line {number}: not UTF-8 ({error.reason})") from None
                file.write(json.dumps(dict(zip(("source", "target"), texts, strict=True))).encode() + b"\n")

    return cached("expanded", f"1 {file_identity(source)} {file_identity(target)} parallel", ".jsonl", write)


def _questions(whole: dict[str, Any]) -> Iterator[Record]:
    for article in whole["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = item.get("answers") or []
                yield {
                    "id": item["id"],
                    "title": article.get("title", ""),
                    "question": item["question"],
                    "context": paragraph["context"],
                    "answers": {
                        "text": [answer["text"] for answer in answers],
                        "answer_start": [answer["answer_start"] for answer in answers],
                    },
                }
