"""Encoded documents on disk, memory-mapped: what `dsft prepare` writes once, and training takes instead of tokenising.

A document's samples do not depend on order, seed, ranks or packing; so they are stored by its number in its source, and
windows, epochs, batches and their digests are those of the data as it stands. Layout of the folder:

    source<i>-<shard>.arrow   Arrow IPC; a row is a document, a record batch a range of them
    prepared.json             written last: what it was made of, and the first document of each batch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.encoding import Encoded
from trainer.data.sample import Sample
from trainer.data.sources import Source
from trainer.failures import DataError

if TYPE_CHECKING:
    import pyarrow

    from trainer.config.schema import LaunchConfig
    from trainer.tokenizer import Tokenizer

_VERSION = 1
_MANIFEST = "prepared.json"
BATCH_BYTES, BATCH_DOCUMENTS = 8 << 20, 4096  # of a record batch: what is in memory at once
SHARD_BATCHES = 64
_OPEN = 64  # record batches that are kept open


def identity(config: LaunchConfig, tokenizer: Tokenizer, sources: Sequence[Source]) -> dict[str, Any]:
    """All that samples depend on, by the settings' names; nothing that only their order depends on."""
    data = config.data
    model = tokenizer.backend.to_str() if tokenizer.backend is not None else f"{tokenizer.origin}"
    parts = (model, tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template, tokenizer.special_tokens)
    result: dict[str, Any] = {
        "dsft": _VERSION,
        "task": config.task.model_dump(mode="json"),
        "model.tokenizer": hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest(),
        **{f"data.{name}": getattr(data, name) for name in ("sequence_length", "on_long", "on_bad_record", "loss_on")},
        "data.chat_template_arguments": data.chat_template_arguments,
    }
    for index, source in enumerate(sources):
        of = source.config
        result[f"data.train.{index} (files)"] = [found[1:] for found in source.fingerprint()]
        result[f"data.train.{index}"] = of.model_dump(
            mode="json", include={"columns", "column_names", "quoting", "template", "limit"}
        )
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


class Writer:
    """Writes one source's documents, batch by batch, in their order."""

    def __init__(self, folder: Path, index: int) -> None:
        self._folder, self._index = folder, index
        self._batches = 0
        self._writer: Any = None
        self._file = folder
        self.starts = [0]
        self.files: list[tuple[str, int]] = []  # (name, bytes)

    def write(self, count: int, encoded: Encoded) -> None:
        """The next ``count`` documents; ``encoded`` is by their place among these."""
        import pyarrow as pa

        if self._batches % SHARD_BATCHES == 0:
            self.close()
            self._file = self._folder / f"source{self._index}-{self._batches // SHARD_BATCHES:05}.arrow"
            self._writer = pa.ipc.new_file(str(self._file), _schema())
        pieces, outcomes = encoded
        told: list[list[int]] = [[] for _ in range(count)]
        for place, outcome in outcomes:
            told[place].append(outcome)
        samples = [pieces.get(place) for place in range(count)]
        flat = [sample for made in samples for sample in made or ()]
        lengths = [[len(sample.tokens) for sample in made] if made is not None else None for made in samples]
        ends = np.concatenate([[0], np.cumsum([sum(of or ()) for of in lengths])])
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *[sample.tokens for sample in flat]])
        bits = np.packbits(np.concatenate([np.zeros(0, dtype=bool), *[sample.targets for sample in flat]]))
        schema = _schema()
        self._writer.write_batch(
            pa.record_batch(
                [
                    pa.array(lengths, schema.field("lengths").type),
                    pa.array(told, schema.field("outcomes").type),
                    pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(tokens, pa.int32())),
                    # one bit for each token of the batch, in its first row
                    pa.array([bits.tobytes(), *[b""] * (count - 1)], pa.large_binary()),
                ],
                schema=schema,
            )
        )
        self._batches += 1
        self.starts.append(self.starts[-1] + count)

    def close(self) -> None:
        """The file under way is whole."""
        if self._writer is not None:
            self._writer.close()
            self.files.append((self._file.name, self._file.stat().st_size))
            self._writer = None


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("lengths", pa.list_(pa.int64())),  # of each sample; null: there was no record
            ("outcomes", pa.list_(pa.int8())),
            ("tokens", pa.large_list(pa.int32())),
            ("targets", pa.large_binary()),
        ]
    )


def write_manifest(folder: Path, of: dict[str, Any], writers: Sequence[Writer]) -> None:
    """The last thing written: a folder without it holds nothing."""
    from trainer.rundir import write_json

    sources = [{"starts": writer.starts, "files": writer.files} for writer in writers]
    write_json(folder / _MANIFEST, {"identity": of, "sources": sources})


def matching(folder: Path, wanted: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The manifest's sources; None where nothing is prepared here.

    Raises:
        DataError: it was prepared from something else, or a file of it is not whole.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _MANIFEST} cannot be read: {error}") from error
    found = manifest["identity"]
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            told = name.startswith("data.") and "(" not in name  # hashes tell nobody anything
            what = f"{found.get(name)} then, {wanted.get(name)} now" if told else "other content"
            raise DataError(
                f"{folder} was prepared with another {name} ({what}): run `dsft prepare` with another --output, or "
                "leave data.prepared out"
            )
    sources: list[dict[str, Any]] = manifest["sources"]
    for name, size in (entry for source in sources for entry in source["files"]):
        try:
            there = (folder / name).stat().st_size
        except OSError:
            there = -1
        if there != size:
            raise DataError(f"{folder / name} is missing or not whole: remove {folder} and run `dsft prepare` again")
    return sources


class PreparedDocuments:
    """Stands in for a source's encoder: the same samples and outcomes, read instead of made."""

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        self._folder, self._files = folder, source["files"]
        self._starts = np.array(source["starts"], dtype=np.int64)
        self._shard = cache(self._open_shard)
        self._batch = lru_cache(_OPEN)(self._open_batch)

    def encode(self, numbers: np.ndarray, positions: Iterable[int]) -> Encoded:
        """As SourceEncoder.encode. Tokens are views of the mapped file."""
        pieces: dict[int, list[Sample]] = {}
        outcomes: list[tuple[int, int]] = []
        for position in positions:
            number = int(numbers[position])
            batch = int(np.searchsorted(self._starts, number, side="right")) - 1
            lengths, told, ends, tokens, targets = self._batch(batch)
            row = number - int(self._starts[batch])
            outcomes += [(position, outcome) for outcome in told[row]]
            if lengths[row] is None:
                continue
            cuts = np.cumsum([ends[row], *lengths[row]]).tolist()
            pieces[position] = [Sample(tokens[start:end], targets[start:end]) for start, end in pairwise(cuts)]
        return pieces, outcomes

    def _open_shard(self, number: int) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self._folder / self._files[number][0])))

    def _open_batch(self, number: int) -> tuple[Any, ...]:
        """(lengths, outcomes, where each row's tokens begin, tokens, targets) of a record batch."""
        batch = self._shard(number // SHARD_BATCHES).get_batch(number % SHARD_BATCHES)
        rows = batch.column("tokens")
        tokens = rows.values.to_numpy(zero_copy_only=True)
        bits = np.frombuffer(batch.column("targets")[0].as_buffer(), dtype=np.uint8)
        targets = np.unpackbits(bits, count=len(tokens)).view(bool)
        lengths, told = batch.column("lengths").to_pylist(), batch.column("outcomes").to_pylist()
        return lengths, told, rows.offsets.to_pylist(), tokens, targets


def prepared_documents(config: LaunchConfig, sources: Sequence[Source]) -> list[PreparedDocuments]:
    """What `data.prepared` of a config holds of each source.

    Raises:
        DataError: nothing is there, it was prepared from something else, or is not whole.
    """
    from trainer.tokenizer import load_tokenizer

    folder = Path(str(config.data.prepared))
    found = matching(folder, identity(config, load_tokenizer(config.model), sources))
    if found is None:
        raise DataError(f"data.prepared: nothing is prepared in {folder}: run `dsft prepare` with this config first")
    return [PreparedDocuments(folder, source) for source in found]


def batches(source: Source) -> Iterator[tuple[int, int]]:
    """[first, last) documents of each record batch of a source."""
    yield from pairwise(source.windows(BATCH_DOCUMENTS, BATCH_BYTES).tolist())
