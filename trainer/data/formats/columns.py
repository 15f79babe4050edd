"""Parquet, Arrow and Hugging Face datasets: random access by batches of rows, a few of which are kept.

pyarrow and datasets are imported here alone, and only where such a file is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from trainer.config.schema import DataSource
from trainer.data.cache import cached, file_identity
from trainer.data.formats.base import Outcome, refuse_twice
from trainer.failures import DataError
from trainer.retry import retried

_LARGEST_BATCH = 32 << 20  # bytes of a row group in memory; larger ones are rewritten once, in small batches
_ROWS = 512  # of a batch then
_KEPT = 4  # batches in memory
_RENAME = "write the file anew with another name for one of them"


class BatchedFile:
    """Rows in batches, the last few of which are kept: `rows` in each, about `size` bytes in all."""

    def __init__(self, name: str, rows: Sequence[int], size: int, load: Callable[[int], Any], content: str) -> None:
        self.name, self.size, self._content = name, size, content
        self._bounds = np.concatenate([[0], np.cumsum(np.asarray(rows, dtype=np.int64))]).astype(np.int64)
        self.records = int(self._bounds[-1])
        self._load = lru_cache(_KEPT)(lambda batch: _sound(load(batch)))
        self._lock = threading.Lock()  # training and evaluation may read the same file

    def position(self, number: int) -> int:
        return self.size * number // max(self.records, 1)

    def find(self, position: int) -> int:
        return min(self.records * position // max(self.size, 1), self.records)

    def content(self) -> str:
        return self._content

    def where(self, number: int) -> str:
        return f"{self.name}, row {number + 1}"

    def read(self, numbers: Sequence[int]) -> list[Outcome]:
        wanted = np.asarray(numbers, dtype=np.int64)
        owner = np.searchsorted(self._bounds, wanted, side="right") - 1
        results: list[Outcome] = [(None, None)] * len(wanted)
        for batch in np.unique(owner).tolist():
            places = np.flatnonzero(owner == batch)
            try:
                with self._lock:
                    rows = retried(lambda batch=batch: self._load(batch), self.name)  # type: ignore[misc]
                for place in places.tolist():
                    results[place] = self._record(rows, batch, int(wanted[place]))
            except (OSError, ValueError) as error:
                raise DataError(f"{self.name} cannot be read: {error}") from error
        return results

    def _record(self, rows: Any, batch: int, number: int) -> Outcome:
        try:
            (record,) = rows.slice(number - int(self._bounds[batch]), 1).to_pylist()
        except UnicodeDecodeError as error:
            return None, f"{self.where(number)}: not UTF-8 ({error.reason})"
        except (ValueError, OverflowError) as error:  # a time that Python has no date for, say
            return None, f"{self.where(number)}: {error}"
        return record, None


def _sound(rows: Any) -> Any:
    """``rows``, a table or record batch, once it is known that reading them stays inside of them.

    Raises:
        pyarrow.ArrowInvalid: it does not: the file is damaged.
    """
    import pyarrow

    try:
        rows.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):  # which is a matter of its row alone
            raise
    return rows


def open_columns(path: Path, name: str, format_name: str) -> BatchedFile:
    """A Parquet file, or an Arrow file in either of its forms (random access or stream).

    Raises:
        DataError: it is not in its format.
        OSError: it cannot be read.
    """
    import pyarrow

    try:
        content = _content(path)
        if format_name == "parquet":
            return _parquet(path, name, content)
        with path.open("rb") as file:
            is_file = file.read(6) == b"ARROW1"
        return _arrow(path, name, content) if is_file else _stream(path, name, content)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{name} is no {format_name} file that can be read: {error}") from error


def _content(path: Path) -> str:
    """Size, both ends and 256 places between them: Parquet and Arrow keep their indices at the end, with checks."""
    size = path.stat().st_size
    state = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        for start in np.linspace(0, max(size - (1 << 16), 0), 258).astype(np.int64).tolist():
            file.seek(start)
            state.update(file.read(1 << 16 if start in (0, max(size - (1 << 16), 0)) else 1 << 12))
    return state.hexdigest()


def _parquet(path: Path, name: str, content: str) -> BatchedFile:
    from pyarrow import parquet

    file = parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
    refuse_twice(file.schema_arrow.names, name, _RENAME)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    if any(group.total_byte_size > _LARGEST_BATCH for group in groups):
        batches = lambda: file.iter_batches(batch_size=_ROWS, use_threads=False)  # noqa: E731
        return _arrow(_rewritten(path, file.schema_arrow, batches), name, content)
    size = sum(group.total_byte_size for group in groups)
    read = lambda batch: file.read_row_group(batch, use_threads=False)  # noqa: E731
    return BatchedFile(name, [group.num_rows for group in groups], size, read, content)


def _arrow(path: Path, name: str, content: str) -> BatchedFile:
    import pyarrow

    file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    refuse_twice(file.schema.names, name, _RENAME)
    rows = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]
    return BatchedFile(name, rows, path.stat().st_size, file.get_batch, content)


def _stream(path: Path, name: str, content: str) -> BatchedFile:
    import pyarrow

    before = pyarrow.total_allocated_bytes()
    stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    refuse_twice(stream.schema.names, name, _RENAME)
    batches = []
    for batch in stream:
        batches.append(batch)  # a view of the mapped file, unless it is compressed
        if pyarrow.total_allocated_bytes() - before > _LARGEST_BATCH:
            again = lambda: pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))  # noqa: E731
            return _arrow(_rewritten(path, stream.schema, again), name, content)
    rows = [batch.num_rows for batch in batches]
    return BatchedFile(name, rows, path.stat().st_size, batches.__getitem__, content)


def _rewritten(path: Path, schema: Any, batches: Callable[[], Iterator[Any]]) -> Path:
    """The same rows as an Arrow file of small batches in the cache: any of them can then be read by itself."""
    import pyarrow

    # an Arrow file holds one dictionary a column: categories, which may differ from batch to batch, are written out
    types = {f.name: f.type.value_type if pyarrow.types.is_dictionary(f.type) else f.type for f in schema}
    plain = pyarrow.schema(types)

    def write(file: IO[bytes]) -> None:
        with pyarrow.ipc.new_file(file, plain) as writer:
            for batch in batches():
                for start in range(0, batch.num_rows, _ROWS):
                    writer.write_batch(batch.slice(start, _ROWS).cast(plain))

    return cached("expanded", f"1 {file_identity(path)} arrow", ".arrow", write)


# -- Hugging Face datasets ---------------------------------------------------------------------------------------------


def is_dataset_folder(path: str | Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_dataset(config: DataSource) -> Any:
    """The `datasets.DatasetDict` or `Dataset` of the hub, or of a folder; DataError if it cannot be loaded."""
    import datasets

    try:
        if config.path.startswith("hf://"):
            repository, _, revision = config.path.removeprefix("hf://").partition("@")
            more = {"revision": revision} if revision else {}
            load = partial(datasets.load_dataset, repository, config.subset, **more)
            return load() if datasets.config.HF_HUB_OFFLINE else retried(load, config.path)
        return retried(lambda: datasets.load_from_disk(config.path), config.path)
    except Exception as error:  # of datasets, huggingface_hub, the network, ...
        why = f"{config.path} cannot be loaded by the datasets library: {error}"
        if config.path.startswith("hf://") and datasets.config.HF_HUB_OFFLINE:
            why += "; here the hub cannot be reached, or HF_HUB_OFFLINE says so: `dsft stage` fetches it where it can"
        raise DataError(why) from error


def open_dataset(config: DataSource) -> BatchedFile:
    """A dataset that `save_to_disk` wrote, or one of the hub: `hf://org/name`, `hf://org/name@revision`.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    import datasets

    name = config.path
    found = load_dataset(config)
    if isinstance(found, datasets.DatasetDict):
        split = config.split or "train"
        if split not in found:
            raise DataError(f"{name}: there is no split {split!r}; set `split` to one of {', '.join(found)}")
        found, name = found[split], f"{name} ({split})"
    elif config.split:
        raise DataError(f"{name} is one dataset without splits: remove `split`")
    # its own decoders (images, audio) are left to tasks: rows come as they are stored
    found = found.with_format("arrow")
    size = int(found.data.nbytes)
    step = max(min(_ROWS, _LARGEST_BATCH * len(found) // max(size, 1)), 1)
    rows = [min(step, len(found) - start) for start in range(0, len(found), step)]
    load = lambda batch: found[batch * step : (batch + 1) * step]  # noqa: E731
    return BatchedFile(name, rows, size, load, _content_of(found))


def _content_of(dataset: Any) -> str:
    """Of its number of rows and 16 rows: the library's own fingerprint changes with each saving."""
    state = xxhash.xxh3_128(f"{len(dataset)} {dataset.column_names}".encode())
    for number in np.linspace(0, len(dataset) - 1, 16).astype(np.int64).tolist() if len(dataset) else []:
        state.update(repr(dataset[number : number + 1].to_pylist()).encode())
    return state.hexdigest()
