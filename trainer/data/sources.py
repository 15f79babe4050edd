"""Records of files, by position: an offset index makes any record a seek away, whatever the size of the file.

- `jsonl`: one JSON object a line; blank lines do not count.
- `text`: UTF-8 text; paragraphs, separated by blank lines, are the records, each under the column `text`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import DataSource
from trainer.failures import DataError

Record = dict[str, Any]

_BLOCK = 1 << 26  # bytes scanned at a time
_BLANK_LINES = re.compile(rb"\r?\n[ \t]*\r?\n\s*")
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".text": "text", ".md": "text"}


@dataclass(frozen=True)
class RecordFile:
    """One file and where its records are: int64 arrays of the first byte of each and the byte after it."""

    path: Path
    format: str
    starts: np.ndarray
    ends: np.ndarray
    size: int  # bytes, when the index was made

    def read(self, numbers: Sequence[int]) -> list[tuple[Record | None, str | None]]:
        """(record, None) or (None, what is wrong with it) for each number."""
        results: list[tuple[Record | None, str | None]] = []
        try:
            with self.path.open("rb") as file:
                if (size := os.fstat(file.fileno()).st_size) != self.size:
                    raise DataError(f"{self.path} has changed since it was opened: {size} bytes, {self.size} then")
                for number in numbers:
                    file.seek(int(self.starts[number]))
                    data = file.read(int(self.ends[number] - self.starts[number]))
                    try:
                        results.append((_parse(data, self.format), None))
                    except ValueError as error:
                        results.append((None, f"{self.where(number)}: {error}"))
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return results

    def where(self, number: int) -> str:
        """File and line of a record, for messages."""
        line, left = 1, int(self.starts[number])
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(_BLOCK, left))):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.path}, line {line}"


def _parse(data: bytes, format_name: str) -> Record:
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {data[error.start]:#04x}): convert the file to UTF-8") from None
    if format_name == "text":
        return {"text": text}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        kind = "a JSON array, not one object a line" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"expected a JSON object, found {kind}")
    return value


class Source:
    """All records of one source of the config, numbered from 0 in the order of its files' names."""

    def __init__(self, config: DataSource, files: list[RecordFile]) -> None:
        self.config = config
        self.files = files
        counts = np.array([len(file.starts) for file in files], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        total = int(self._first[-1])
        self.records = total if config.limit is None else min(total, config.limit)
        sizes = np.concatenate([file.ends - file.starts for file in files]) if files else np.zeros(0, dtype=np.int64)
        self._bytes = np.concatenate([[0], np.cumsum(sizes)])[: self.records + 1]

    def read(self, numbers: Sequence[int]) -> list[tuple[Record | None, str | None]]:
        """Records by number, each with None, or None with what is wrong with it."""
        wanted = np.asarray(numbers, dtype=np.int64)
        results: list[tuple[Record | None, str | None]] = [(None, None)] * len(wanted)
        owner = np.searchsorted(self._first, wanted, side="right") - 1
        for index in np.unique(owner):
            places = np.flatnonzero(owner == index)
            found = self.files[index].read([int(n) for n in wanted[places] - self._first[index]])
            for place, result in zip(places, found, strict=True):
                results[place] = result
        return results

    def where(self, number: int) -> str:
        """File and line of a record."""
        index = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.files[index].where(number - int(self._first[index]))

    def windows(self, documents: int, size: int) -> np.ndarray:
        """Window boundaries, int64 [windows + 1]: at most so many documents and (but for one huge one) bytes each."""
        bounds = [0]
        while bounds[-1] < self.records:
            first = bounds[-1]
            by_size = int(np.searchsorted(self._bytes, self._bytes[first] + size, side="right")) - 1
            bounds.append(min(first + documents, max(by_size, first + 1), self.records))
        return np.array(bounds, dtype=np.int64)

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and modification time of each file: what a resume compares."""
        stats = [file.path.stat() for file in self.files]
        return [[str(file.path), stat.st_size, stat.st_mtime_ns] for file, stat in zip(self.files, stats, strict=True)]


def open_source(config: DataSource) -> Source:
    """Index a source's files (or take the cached indices).

    Raises:
        DataError: nothing matches, nothing is in it, or it cannot be read.
    """
    files = [_open_file(path, config.format) for path in find_files(config.path)]
    source = Source(config, files)
    if source.records == 0:
        raise DataError(f"{config.path}: no records in it; every line is blank or the file is empty")
    return source


def find_files(path: str) -> list[Path]:
    """The files a path, glob or folder stands for, by name.

    Raises:
        DataError: there are none.
    """
    if os.path.isdir(path):
        found = [entry for entry in Path(path).rglob("*") if entry.is_file() and entry.suffix in _SUFFIXES]
        if not found:
            raise DataError(f"{path}: no file in this folder ends with {', '.join(_SUFFIXES)}")
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
        if not found:
            raise DataError(f"{path}: there is no such file; check the path (it is relative to the config file)")
    return sorted(found)


def _open_file(path: Path, format_name: str) -> RecordFile:
    if format_name == "auto":
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path}: the format cannot be told from its name; set `format` (jsonl or text)")
        format_name = _SUFFIXES[path.suffix]
    try:
        stat = path.stat()
        cached = _cache_file(path, stat, format_name)
        index = _read_cache(cached)
        if index is None:
            index = _index_lines(path) if format_name == "jsonl" else _index_paragraphs(path)
            _write_cache(cached, index)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return RecordFile(path, format_name, index[0], index[1], stat.st_size)


def _index_lines(path: Path) -> np.ndarray:
    """int64 [2, records]: first byte of each line that is not blank, and the byte after it."""
    ends = []
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + position)
            position += len(block)
    newlines = np.concatenate([*ends, np.array([size], dtype=np.int64)]).astype(np.int64)
    starts = np.concatenate([[0], newlines[:-1] + 1])
    keep = newlines > starts
    starts, newlines = starts[keep], newlines[keep]
    short = np.flatnonzero(newlines - starts < 64)  # only short lines can be blank
    if len(short):
        blank = []
        with path.open("rb") as file:
            for number in short:
                file.seek(int(starts[number]))
                blank.append(not file.read(int(newlines[number] - starts[number])).strip(b"\xef\xbb\xbf \t\r\n"))
        keep = np.ones(len(starts), dtype=bool)
        keep[short[np.array(blank)]] = False
        starts, newlines = starts[keep], newlines[keep]
    return np.stack([starts, newlines])


def _index_paragraphs(path: Path) -> np.ndarray:
    """int64 [2, paragraphs]: first byte of each paragraph, and the byte after it."""
    if path.stat().st_size == 0:
        return np.zeros((2, 0), dtype=np.int64)
    bounds = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        for match in _BLANK_LINES.finditer(data):
            bounds.append((start, match.start()))
            start = match.end()
        bounds.append((start, len(data)))
        kept = [(a, b) for a, b in bounds if b > a and data[a : min(b, a + 4096)].strip()]
    return np.array(kept, dtype=np.int64).reshape(-1, 2).T


def cache_folder() -> Path:
    """Where indices and check results are kept between runs; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsft"


def _cache_file(path: Path, stat: os.stat_result, format_name: str) -> Path:
    identity = f"2 {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {format_name}"
    return cache_folder() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()}.int64"


def _read_cache(path: Path) -> np.ndarray | None:
    try:
        # Bare numbers: the header of a .npy file is parsed by `ast`, which in threads of CPython 3.11 can raise a
        # SystemError ("AST constructor recursion depth mismatch") on perfectly good input
        return np.memmap(path, dtype=np.int64, mode="r").reshape(2, -1)
    except (OSError, ValueError):
        return None


def _write_cache(path: Path, index: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            index.tofile(file)
        os.replace(file.name, path)
    except OSError:
        pass  # a cache that cannot be written only costs the next start a scan
