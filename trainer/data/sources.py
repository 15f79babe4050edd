"""A source of the config as one numbered sequence of records, whatever its files are and wherever they lie."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import DataSource
from trainer.data.formats.annotated import parallel_lines, squad_lines
from trainer.data.formats.base import Outcome, RecordFile
from trainer.data.formats.bytes import open_bytes
from trainer.data.formats.columns import is_dataset_folder, open_columns, open_dataset
from trainer.data.remote import COMPRESSED, expanded, fetched, is_hidden, is_hub_dataset, is_remote
from trainer.failures import DataError

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "webdataset",
    ".tgz": "webdataset",
    ".conll": "conll",
}
_FINGERPRINTS = 256  # files listed one by one in a checkpoint


class Source:
    """All records of one source of the config, numbered from 0 in the order of its files' names."""

    def __init__(self, config: DataSource, files: Sequence[RecordFile]) -> None:
        self.config = config
        self.files = files
        self._first = np.concatenate([[0], np.cumsum([file.records for file in files], dtype=np.int64)])
        self._bytes = np.concatenate([[0], np.cumsum([file.size for file in files], dtype=np.int64)])
        total = int(self._first[-1])
        self.records = total if config.limit is None else min(total, config.limit)

    def read(self, numbers: Sequence[int]) -> list[Outcome]:
        """Records by number, each with None, or None with what is wrong with it."""
        if len(self.files) == 1:
            return self.files[0].read(numbers)
        wanted = np.asarray(numbers, dtype=np.int64)
        results: list[Outcome] = [(None, None)] * len(wanted)
        owner = np.searchsorted(self._first, wanted, side="right") - 1
        for index in np.unique(owner):
            places = np.flatnonzero(owner == index)
            found = self.files[index].read([int(n) for n in wanted[places] - self._first[index]])
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return results

    def where(self, number: int) -> str:
        """File and line of a record."""
        index, inside = self._place(number)
        return self.files[index].where(inside)

    def folder(self, number: int) -> Path:
        """Where the file of a record lies: paths in records are relative to it."""
        return Path(self.files[self._place(number)[0]].name).parent

    def windows(self, documents: int, size: int) -> np.ndarray:
        """Window boundaries, int64 [windows + 1]: at most so many documents and (but for one huge one) bytes each."""
        bounds = [0]
        while bounds[-1] < self.records:
            first = bounds[-1]
            by_size = self._find(self._position(first) + size)
            bounds.append(min(first + documents, max(by_size, first + 1), self.records))
        return np.array(bounds, dtype=np.int64)

    def _place(self, number: int) -> tuple[int, int]:
        """(index of a record's file, its number in there)."""
        index = int(np.searchsorted(self._first, number, side="right")) - 1
        return index, number - int(self._first[index])

    def _position(self, number: int) -> int:
        index, inside = self._place(number)
        return int(self._bytes[index]) + self.files[index].position(inside)

    def _find(self, position: int) -> int:
        index = min(int(np.searchsorted(self._bytes, position, side="right")) - 1, len(self.files) - 1)
        return int(self._first[index]) + self.files[index].find(position - int(self._bytes[index]))

    def fingerprint(self) -> list[list[Any]]:
        """(name, records, hash of the content) of each file: what a resume compares. Of many files, of all as one."""
        prints = [[os.path.basename(file.name), file.records, file.content()] for file in self.files]
        if len(prints) > _FINGERPRINTS:
            import xxhash

            digest = xxhash.xxh3_128(repr([found[1:] for found in prints]).encode()).hexdigest()
            prints = [[f"{len(prints)} files", int(self._first[-1]), digest]]
        return prints


def open_source(config: DataSource) -> Source:
    """Index a source's files (or take the cached indices).

    Raises:
        DataError: nothing matches, nothing is in it, or it cannot be read.
        StorageError: a copy of remote or compressed data finds no room in the cache.
    """
    files: list[RecordFile]
    if config.format == "parallel":
        files = _open_parallel(config)
    elif _is_dataset(config):
        files = [open_dataset(config)]
    else:
        if config.split or config.subset:
            raise DataError(f"{config.path}: `split` and `subset` are for Hugging Face datasets; remove them")
        files = [_open_file(path, name, config) for path, name in find_files(config.path)]
    source = Source(config, files)
    if source.records == 0:
        raise DataError(f"{config.path}: no records in it; every line is blank or the file is empty")
    return source


def _open_parallel(config: DataSource) -> list[RecordFile]:
    """Pairs of text files, in the order of their names on both sides."""
    sources, targets = (find_files(path) for path in (config.source_path or "", config.target_path or ""))
    if len(sources) != len(targets):
        raise DataError(f"{config.source_path}: {len(sources)} files, and {config.target_path}: {len(targets)}")
    files: list[RecordFile] = []
    for pair in zip(sources, targets, strict=True):
        name, other = (name for _, name in pair)
        try:
            first, second = (expanded(path, of) if path.suffix in COMPRESSED else path for path, of in pair)
            files.append(open_bytes(parallel_lines(first, second, name, other), name, "jsonl", config))
        except OSError as error:
            raise DataError(f"{name} or {other} cannot be read: {error.strerror or error}") from error
    return files


def _is_dataset(config: DataSource) -> bool:
    if config.format == "auto":
        return is_hub_dataset(config.path) or is_dataset_folder(config.path)
    return config.format == "datasets"


def find_files(path: str) -> list[tuple[Path, str]]:
    """(file here, its name in messages) of those that a path, glob, folder or URL stands for, by name.

    Raises:
        DataError: there are none.
    """
    if is_remote(path):
        return fetched(path, lambda names: _of_one_format(names, path) or names)
    if os.path.isdir(path):
        entries = (entry for entry in Path(path).rglob("*") if not is_hidden(entry.relative_to(path)))
        found = [Path(name) for name in _of_one_format([str(entry) for entry in entries if entry.is_file()], path)]
        if not found:
            raise DataError(f"{path}: no file in this folder ends with {', '.join(_SUFFIXES)} (or these and .gz, .zst)")
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        if not found:
            raise DataError(f"{path}: there is no such file; check the path (one in a config is relative to that file)")
    try:
        "".join(map(str, found)).encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}: the name of a file is not UTF-8; rename it") from None
    return [(file, str(file)) for file in sorted(found)]


def _of_one_format(names: list[str], folder: str) -> list[str]:
    """Those of a folder's files whose format their names tell. Raises DataError where they are of several."""
    formats = {name: found for name in names if (found := _format_of(Path(name)))}
    if len(set(formats.values())) > 1:
        endings = sorted({Path(name).suffix for name in formats})
        raise DataError(
            f"{folder}: the files in this folder are of several formats ({', '.join(endings)}); "
            f"name those to be read, as in {folder}/**/*{endings[0]}"
        )
    return list(formats)


def lacks_names(config: DataSource, name: str) -> str:
    """What else to do about a column that is missing, of csv, tsv and text files."""
    format_name = _format_of(Path(name)) if config.format == "auto" else config.format
    if format_name == "text":
        return "; a text file has paragraphs alone: set `format` if it is of another kind (conll: a word a line)"
    if format_name not in ("csv", "tsv") or config.column_names:
        return ""
    return "; where the file has no header, name all its columns in `column_names`"


def _format_of(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix in COMPRESSED and path.suffix not in _SUFFIXES else path
    return _SUFFIXES.get(plain.suffix)


def _open_file(path: Path, name: str, config: DataSource) -> RecordFile:
    format_name = _format_of(path) if config.format == "auto" else config.format
    if format_name is None:
        known = "jsonl, text, csv, tsv, conll, squad, parallel, parquet, arrow, webdataset or datasets"
        raise DataError(f"{name}: the format cannot be told from its name; set `format` ({known})")
    try:
        if path.suffix in COMPRESSED:
            path = expanded(path, name)
        if format_name in ("parquet", "arrow"):
            return open_columns(path, name, format_name)
        if format_name == "squad":
            return replace(open_bytes(squad_lines(path, name), name, "jsonl", config), lines=False)
        return open_bytes(path, name, format_name, config)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from error
