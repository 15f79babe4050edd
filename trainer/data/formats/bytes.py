"""Formats whose records are ranges of bytes: an index of their starts makes any record a seek away.

- `jsonl`: one JSON object a line; blank lines do not count.
- `text`: UTF-8 text; paragraphs, separated by blank lines, are the records, each under the column `text`.
- `csv`, `tsv`: RFC 4180; fields in quotes may hold line ends. Every value is a string.
- `conll`: a token a line, in columns, a blank line after each sentence; see `annotated`.
- `webdataset`: a tar file; members with the same name up to the first dot are a record, their extensions its columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from trainer.config.schema import DataSource
from trainer.data.cache import cached, file_identity
from trainer.data.formats.annotated import DOCUMENT_LINE, parse_sentence
from trainer.data.formats.base import Outcome, Record, refuse_twice
from trainer.failures import DataError, StorageError
from trainer.retry import retried

BLOCK = 1 << 24  # bytes scanned at a time
_DENSE = 2  # times the bytes that are wanted may be read
_LONGEST_FIELD = 1 << 24  # bytes: a quote that is never closed would swallow the file
_BLANK_LINES = re.compile(rb"\r?\n(?:[^\S\n]*\n)+")
_BOM = b"\xef\xbb\xbf"
_BLANK = _BOM + b" \t\r\n"

Parse = Callable[[bytes], Record]


@dataclass(frozen=True)
class ByteFile:
    """A file, and int64 [records + 1]: the first byte of each record, and the end of the last."""

    path: Path
    name: str
    bounds: np.ndarray
    parse: Parse
    file_size: int  # bytes, when the index was made
    dates: list[int]  # st_mtime_ns then, and others with the same content
    digest: str
    lines: bool  # whether lines mean something in it

    @property
    def records(self) -> int:
        return len(self.bounds) - 1

    @property
    def size(self) -> int:
        return int(self.bounds[-1])

    def position(self, number: int) -> int:
        return int(self.bounds[number])

    def find(self, position: int) -> int:
        return int(np.searchsorted(self.bounds, position, side="right")) - 1

    def content(self) -> str:
        return self.digest

    def read(self, numbers: Sequence[int]) -> list[Outcome]:
        results: list[Outcome] = []
        if not len(numbers):
            return results
        for number, data in zip(numbers, self._bytes(numbers), strict=True):
            try:
                results.append((self.parse(data), None))
            except ValueError as error:
                results.append((None, f"{self.where(number)}: {error}"))
        return results

    def _bytes(self, numbers: Sequence[int]) -> list[bytes]:
        def attempt() -> list[bytes]:
            with self.path.open("rb", buffering=0) as file:  # nothing is read twice
                found = os.fstat(file.fileno())
                if found.st_size != self.file_size:
                    told = f"{found.st_size} bytes, {self.file_size} then"
                    raise DataError(f"{self.name} has changed since it was opened: {told}")
                if found.st_mtime_ns not in self.dates:  # positions in it mean nothing if this is another file
                    if _digest(self.path).hex() != self.digest:
                        raise DataError(f"{self.name} has changed since it was opened: other content")
                    self.dates.append(found.st_mtime_ns)
                starts, ends = self.bounds[numbers], self.bounds[np.add(numbers, 1)]
                first, last = int(starts.min()), int(ends.max())
                if last - first < _DENSE * int((ends - starts).sum()):  # most of a window: one call for all
                    data = os.pread(file.fileno(), last - first, first)
                    ranges = zip((starts - first).tolist(), (ends - first).tolist(), strict=True)
                    return [data[start:end] for start, end in ranges]
                return [
                    os.pread(file.fileno(), end - start, start)
                    for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
                ]

        try:
            return retried(attempt, self.name)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror or error}") from error

    def where(self, number: int) -> str:
        if not self.lines:
            return f"{self.name}, record {number + 1}"
        line, left = 1, int(self.bounds[number])
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(BLOCK, left))):
                line += block.count(b"\n")
                left -= len(block)
        return f"{self.name}, line {line}"


def open_bytes(path: Path, name: str, format_name: str, config: DataSource) -> ByteFile:
    """Index a file, or take its cached index.

    Raises:
        DataError: it is not in its format.
        OSError: it cannot be read.
    """
    delimiter = "\t" if format_name == "tsv" else ","
    quoting = csv.QUOTE_MINIMAL if config.quoting else csv.QUOTE_NONE
    dialect: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting}
    scan: dict[str, Callable[[], Iterator[int]]] = {
        "text": lambda: _paragraphs(path),
        "conll": lambda: _paragraphs(path, DOCUMENT_LINE),
        "csv": lambda: _rows(path, dialect),
        "tsv": lambda: _rows(path, dialect),
        "webdataset": lambda: _tar_groups(path),
    }
    csv.field_size_limit(_LONGEST_FIELD)  # of this process, whoever has made the index

    def write(file: IO[bytes]) -> None:
        try:
            for piece in _lines(path) if format_name == "jsonl" else _in_pieces(scan[format_name]()):
                file.write(piece.astype(np.int64).tobytes())
        except (csv.Error, tarfile.TarError) as error:
            raise DataError(f"{name} is no {format_name} file that can be read: {error}") from error
        file.write(np.array([path.stat().st_size], dtype=np.int64).tobytes() + _digest(path))

    opened = path.stat()
    identity = f"6 {file_identity(path)} {format_name} {quoting}"
    index: np.ndarray
    try:
        index = _load_index(cached("index", identity, ".int64", write), path)
    except StorageError:  # a cache that cannot be written only costs each start a scan
        memory = io.BytesIO()
        write(memory)
        index = np.frombuffer(memory.getvalue(), dtype=np.int64)
    bounds, digest = index[:-2], index[-2:].tobytes().hex()
    if format_name in ("csv", "tsv"):
        bounds, parse = _csv_parser(path, name, bounds, dialect, config.column_names)
    elif format_name == "conll":
        parse = lambda data: parse_sentence(_parse_text(data)["text"], config.column_names)  # noqa: E731
    else:
        if config.column_names:
            raise DataError(
                f"{name}: `column_names` is for csv, tsv and conll files; a {format_name} file has its own names"
            )
        parse = {"jsonl": parse_json, "text": _parse_text, "webdataset": _parse_tar}[format_name]
    dates = [opened.st_mtime_ns]
    return ByteFile(path, name, bounds, parse, opened.st_size, dates, digest, format_name != "webdataset")


def _in_pieces(starts: Iterator[int]) -> Iterator[np.ndarray]:
    """Int64, so many at a time that memory does not grow with a file."""
    while len(piece := np.fromiter(islice(starts, 1 << 16), dtype=np.int64)):
        yield piece


def _load_index(stored: Path, path: Path) -> np.ndarray:
    """Bounds and digest, int64 [records + 3]. A damaged index is removed, and raises StorageError."""
    # Bare numbers: the header of a .npy file is parsed by `ast`, which in threads of CPython 3.11 can raise a
    # SystemError ("AST constructor recursion depth mismatch") on perfectly good input
    try:
        index = np.memmap(stored, dtype=np.int64, mode="r")
        if len(index) < 3 or index[-3] != path.stat().st_size:
            raise ValueError("not an index of this file")
    except ValueError as error:
        stored.unlink(missing_ok=True)
        raise StorageError(f"{stored}: {error}") from error
    return index


def _digest(path: Path) -> bytes:
    """128 bits of everything in a file (XXH3), at the speed of the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).digest()


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {data[error.start]:#04x}): convert the file to UTF-8") from None


# -- jsonl -------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[np.ndarray]:
    """The first byte of each line that is not blank, int64 [lines] in pieces."""
    with path.open("rb") as file:
        start = 0  # of the line that goes on into the next block
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            file.seek(position)
            block = file.read(BLOCK)
            if not block:
                break
            view, first = np.frombuffer(block, dtype=np.uint8), position
            ends = np.flatnonzero(view == 10) + position
            position += len(block)
            if position >= size:
                ends = np.append(ends, size)
            if not len(ends):
                continue
            starts = np.concatenate([[start], ends[:-1] + 1])
            start = int(ends[-1]) + 1
            keep = ends > starts
            looked_at = np.isin(view[np.clip(starts - first, 0, len(view) - 1)], list(_BLANK))
            looked_at[0] |= starts[0] < first  # its first byte was in another block
            for line in np.flatnonzero(keep & looked_at):
                file.seek(int(starts[line]))
                keep[line] = bool(file.read(int(ends[line] - starts[line])).strip(_BLANK))
            yield starts[keep]


_decode_json = json.JSONDecoder().decode  # json.loads looks up its arguments for each line


def parse_json(data: bytes) -> Record:
    """The JSON object in bytes. Raises ValueError, in the user's words."""
    text = _text(data).strip()
    try:
        value = _decode_json(text)
    except json.JSONDecodeError as error:
        if text[:1] == "[" or text == "{":
            raise ValueError(_spread(text)) from None
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(
            _spread(text) if isinstance(value, list) else f"expected a JSON object, found a {type(value).__name__}"
        )
    return value


def _spread(text: str) -> str:
    """What to do with a file that is one JSON value, by how it begins."""
    what, items = ("a JSON array", "'.[]'") if text[0] == "[" else ("an object spread over lines", ".")
    return f"expected a JSON object, found {what}, not one object a line; `jq -c {items} FILE > FILE.jsonl` makes it so"


# -- text --------------------------------------------------------------------------------------------------------------


def _paragraphs(path: Path, without: re.Pattern[bytes] | None = None) -> Iterator[int]:
    """The first byte of each paragraph, but for those that are ``without`` as a whole."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        gaps = ((match.start(), match.end()) for match in _BLANK_LINES.finditer(data))
        for end, following in chain(gaps, [(len(data), len(data))]):
            begin = data[start : min(end, start + 4096)].strip(_BLANK)
            if begin and not (without and without.fullmatch(begin)):
                yield start
            start = following


def _parse_text(data: bytes) -> Record:
    end = _BLANK_LINES.search(data)
    return {"text": _text(data[: end.start()] if end else data).strip("\r\n")}


# -- csv and tsv -------------------------------------------------------------------------------------------------------


def _rows(path: Path, dialect: dict[str, Any]) -> Iterator[int]:
    """The first byte of each row that is not blank, the header's included."""
    position = 0  # after the lines that the reader has taken

    def lines(file: IO[bytes]) -> Iterator[str]:
        nonlocal position
        for line in file:
            first, position = position == 0, position + len(line)
            # a quote behind the mark of UTF-8 would be text; delimiters are ASCII, and bad UTF-8 is its record's matter
            yield (line.removeprefix(_BOM) if first else line).decode("latin-1")

    with path.open("rb") as file:
        start, line = 0, 1
        reader = csv.reader(lines(file), **dialect)
        try:
            for row in reader:
                if any(row):
                    yield start
                start, line = position, reader.line_num + 1
        except csv.Error as error:
            stray = "a carriage return alone, outside of quotes; if it is to end a line: `tr '\\r' '\\n' < FILE`"
            raise csv.Error(f"line {line}: {stray if 'new-line' in str(error) else error}") from None


def _csv_parser(
    path: Path, name: str, bounds: np.ndarray, dialect: dict[str, Any], column_names: tuple[str, ...]
) -> tuple[np.ndarray, Parse]:
    def fields(data: bytes) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(_text(data), newline=""), strict=True, **dialect), [])
        except csv.Error as error:
            hint = "; set `quoting` to false if quotes are ordinary text here" if '"' in str(error) else ""
            raise ValueError(f"not a row of fields as in RFC 4180: {error}{hint}") from None

    names = list(column_names)
    if not names and len(bounds) > 1:
        with path.open("rb") as file:
            file.seek(int(bounds[0]))
            try:
                names = fields(file.read(int(bounds[1] - bounds[0])))
            except ValueError as error:
                raise DataError(f"{name}, its header: {error}") from None
        bounds = bounds[1:]
    refuse_twice(names, name, "name its columns in `column_names`")

    def parse(data: bytes) -> Record:
        values = fields(data)
        if len(values) != len(names):
            raise ValueError(f"{len(values)} fields, but {len(names)} columns ({', '.join(names)})")
        return dict(zip(names, values, strict=True))

    return bounds, parse


# -- WebDataset --------------------------------------------------------------------------------------------------------


def _key(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, extension) of a member: the name splits at the first dot of its last part; None: it is of no record.

    As in the webdataset library, whatever begins with a dot (._a.jpg of macOS) or has no extension is of none.
    """
    folder, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not (member.isfile() and stem and extension):
        return None
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _tar_groups(path: Path) -> Iterator[int]:
    """The first byte of the first member of each record."""
    with tarfile.open(path, "r:") as tar:
        last = None
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            key = _key(member)
            if key and key[0] != last:
                last = key[0]
                yield member.offset
        end = tar.offset
    with path.open("rb") as file:  # tarfile takes half a header for the end; the true one is of zeros
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("unexpected end of data")


def _parse_tar(data: bytes) -> Record:
    record: Record = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key = _key(member)
                if key is None:
                    continue
                record["__key__"], extension = key
                file = tar.extractfile(member)
                body = file.read() if file else b""
                if len(body) != member.size:
                    raise ValueError(f"{member.name} is cut short: {len(body)} bytes of {member.size}")
                if extension.rpartition(".")[2] == "json":
                    record |= {f"{extension}.{column}": value for column, value in parse_json(body).items()}
                elif extension.rpartition(".")[2] in ("txt", "text", "md", "cls"):
                    record[extension] = _text(body)
                else:
                    record[extension] = body
    except tarfile.TarError as error:
        raise ValueError(f"no tar member: {error}") from None
    return record
