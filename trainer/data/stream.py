"""Global batches: the same for every number of ranks, for every micro-batch size, after every restart.

Global batch k is sequences [kG, (k+1)G) of one order that depends on the data and the seed alone (see `order` and
`windows`). Its micro-batch i holds sequences [i m, (i+1) m); rank r takes micro-batches r, r+W, r+2W, ... and runs
empty ones where there are none left, so that all ranks make the same number of forward passes.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.encoding import OUTCOMES, Encoder, SourceEncoder
from trainer.data.order import next_source, strides
from trainer.data.sample import PackedSequence
from trainer.data.sources import Source, open_source
from trainer.data.windows import Gather, Options, SourceStream, Window
from trainer.data.workers import Workers, worker_count
from trainer.failures import DataError
from trainer.planning.mixture import source_epochs, source_weights

_PREFETCH = 4  # global batches
_LOADERS = 4  # threads: decoding images holds no lock
_INT32 = np.dtype("<i4")


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch ``index`` of its global batch; without sequences where a rank has less work than others."""

    index: int
    sequences: tuple[PackedSequence, ...]


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's share of a global batch.

    Attributes:
        micro_batches: ceil(G / (W m)) of them on every rank.
        sequences: of the whole global batch; fewer than G only in the last one of a run with `epochs`.
        target_tokens: of the whole global batch.
        tokens: of the whole global batch, without padding.
        digest: this rank's share; the sum over ranks mod 2**63 is the digest of the global batch.
        progress: epochs of the data consumed after this batch; where sources have `epochs` of their own, the share of
            the training that is done times its `epochs`.
        state: position after this batch, equal on all ranks, valid at any number of ranks.
    """

    micro_batches: tuple[MicroBatch, ...]
    sequences: int
    target_tokens: int
    tokens: int
    digest: int
    progress: float
    state: dict[str, Any]


class BatchStream:
    """Iterates over a rank's shares of global batches, prepared in a background thread.

    Args:
        sources: the data, with weights in their configs.
        task: encodes records.
        options: how documents become sequences.
        global_batch_size: sequences of a global batch, over all ranks.
        micro_batch_size: sequences of a micro-batch.
        gather: all-gather of int64 arrays over ranks; called in the background thread alone.
        state: of the batch after which to go on, or None.
        tokenizer: a hash of it, which is to stay the same; None: of no account.
        allow_changed: go on from the state although it is of other data.
        limit: number of batches after which to end, or None. All ranks then make the same calls of ``gather``.
        workers: processes that encode, started and ended with the background thread; None: the thread does it.
    """

    def __init__(
        self,
        sources: tuple[DataSource, ...],
        task: Encoder,
        options: Options,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        gather: Gather,
        state: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        allow_changed: bool = False,
        limit: int | None = None,
        workers: Workers | None = None,
    ) -> None:
        opened = [open_source(source) for source in sources]
        self._identity = _identity(opened, options) | {"tokenizer": tokenizer}
        if state and not allow_changed:
            _refuse_changed(state.get("data"), self._identity)
        states = state["sources"] if state else []
        states = [*states[: len(sources)], *[None] * (len(sources) - len(states))]
        epochs = [source_epochs(source, options.epochs) for source in sources]
        long, bad = options.on_long, options.on_bad_record
        encoders = [SourceEncoder(of, task, options.sequence_length, long, bad, i) for i, of in enumerate(opened)]
        self._streams = [
            SourceStream(index, source, encoders[index].encode, options, epochs[index], gather, states[index])
            for index, source in enumerate(opened)
        ]
        self._strides = strides(source_weights(sources, [source.records for source in opened], epochs))
        drawn = state["drawn"] if state else []
        self._drawn: list[int] = [*drawn[: len(sources)], *[0] * (len(sources) - len(drawn))]
        self._load = task.load if task.loads else None
        self._options, self._limit, self._workers = options, limit, workers
        self._global, self._micro = global_batch_size, micro_batch_size

    @property
    def records(self) -> int:
        """Records of all sources."""
        return sum(stream.source.records for stream in self._streams)

    def counts(self) -> dict[str, int]:
        """What became of records so far, over all ranks: bad, skipped_long, nothing_to_learn, split, truncated."""
        total = sum((stream.counts for stream in self._streams), np.zeros(len(OUTCOMES), dtype=np.int64))
        return dict(zip(OUTCOMES, map(int, total), strict=True))

    def use_prepared(self, config: LaunchConfig) -> None:
        """Take samples from `data.prepared` of ``config``. Raises DataError where these would be others."""
        from trainer.data.prepared import prepared_documents

        found = prepared_documents(config, [stream.source for stream in self._streams])
        for stream, documents in zip(self._streams, found, strict=True):
            stream.encode = documents.encode

    def __iter__(self) -> Iterator[GlobalBatch]:
        yield from _in_background(self._batches)

    def _batches(self) -> Generator[GlobalBatch, None, None]:
        with self._workers or nullcontext() as workers:
            if workers:
                for index, stream in enumerate(self._streams):
                    stream.encode = partial(workers.encode, index)
            for _ in itertools.count() if self._limit is None else range(self._limit):
                references = self._draw()
                if not references:
                    return
                yield self._share(references)

    def _draw(self) -> list[tuple[SourceStream, Window, int]]:
        """The sequences of the next global batch: fewer than G at the end of the data, none after it."""
        references: list[tuple[SourceStream, Window, int]] = []
        while len(references) < self._global:
            is_open = [not stream.ended() for stream in self._streams]
            # of a training of so many epochs, what repeats does so only as long as something else lasts
            lasting = any(o and s.epochs is not None for o, s in zip(is_open, self._streams, strict=True))
            index = next_source(self._drawn, self._strides, is_open)
            if index is None or not (lasting or self._options.epochs is None):
                break
            if (found := self._streams[index].next()) is not None:
                self._drawn[index] += 1
                references.append((self._streams[index], *found))
        return references

    def _share(self, references: list[tuple[SourceStream, Window, int]]) -> GlobalBatch:
        rank, world_size, micro = self._options.rank, self._options.world_size, self._micro
        turns = -(-self._global // (micro * world_size))
        indices = [rank + turn * world_size for turn in range(turns)]
        mine = [i for index in indices for i in range(index * micro, min((index + 1) * micro, len(references)))]
        sequences = self._materialise(references, mine)
        content = sum(digest(i, sequence) for i, sequence in sequences.items()) % (1 << 63)
        sequences = self._loaded(sequences)
        micro_batches = tuple(
            MicroBatch(index, tuple(sequences[i] for i in range(index * micro, (index + 1) * micro) if i in sequences))
            for index in indices
        )
        return GlobalBatch(
            micro_batches,
            len(references),
            int(sum(window.targets[number] for _, window, number in references)),
            int(sum(window.lengths[number] for _, window, number in references)),
            content,
            self._progress(),
            {
                "sources": [stream.state() for stream in self._streams],
                "drawn": list(self._drawn),
                "data": self._identity,
            },
        )

    def _progress(self) -> float:
        epochs = self._options.epochs
        if epochs is None:
            return sum(stream.documents_done() for stream in self._streams) / self.records
        ending = [stream for stream in self._streams if stream.epochs is not None]
        documents = sum(stream.documents() for stream in ending)
        return epochs * (sum(stream.documents_done() for stream in ending) / max(documents, 1))

    def _loaded(self, sequences: dict[int, PackedSequence]) -> dict[int, PackedSequence]:
        """The same with what samples only refer to."""
        load = self._load
        if load is None:
            return sequences
        with ThreadPoolExecutor(_LOADERS) as pool:
            made = pool.map(lambda sequence: PackedSequence(tuple(map(load, sequence.samples))), sequences.values())
            return dict(zip(sequences, made, strict=True))

    def _materialise(
        self, references: list[tuple[SourceStream, Window, int]], mine: list[int]
    ) -> dict[int, PackedSequence]:
        """Place in the global batch -> sequence, tokenising a window's documents in one call."""
        by_window: dict[int, list[int]] = {}
        for i in mine:
            by_window.setdefault(id(references[i][1]), []).append(i)
        result: dict[int, PackedSequence] = {}
        for places in by_window.values():
            stream, window, _ = references[places[0]]
            result.update(zip(places, stream.sequences(window, [references[i][2] for i in places]), strict=True))
        return result


def _identity(sources: Sequence[Source], options: Options) -> dict[str, Any]:
    """What a position in the order means something for: the data, and what makes its order and sequences."""
    return {
        "files": [source.fingerprint() for source in sources],
        "limits": [source.config.limit for source in sources],
        "order": {name: getattr(options, name) for name in _ORDER},
    }


_ORDER = ("seed", "shuffle", "packing", "sequence_length", "on_long", "window_documents")


def _refuse_changed(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises DataError where a position in ``before`` is none in ``now``. Names may differ: data can be moved."""
    advice = "; put it back, start a new run under another `name`, or set data.allow_changed to go on regardless"
    if before is None:  # of a version that did not write it
        return
    if before.get("tokenizer") not in (None, now["tokenizer"]):
        what = "its vocabulary, special tokens or chat template"
        raise DataError(f"the tokenizer has changed since the last checkpoint ({what}){advice}")
    for name, value in before["order"].items():
        if value != now["order"].get(name):
            raise DataError(f"data.{name} was {value} before and is {now['order'].get(name)} now{advice}")
    if len(before["files"]) != len(now["files"]) or before["limits"] != now["limits"]:
        raise DataError(f"data.train has other sources or limits than before{advice}")
    for index, (old, new) in enumerate(zip(before["files"], now["files"], strict=True)):
        if len(old) != len(new):
            raise DataError(f"data.train[{index}] had {len(old)} files before and has {len(new)} now{advice}")
        for (name, records, content), found in zip(old, new, strict=True):
            if [records, content] != list(found[1:]):
                what = f"{records} records before, {found[1]} now" if records != found[1] else "other content"
                raise DataError(f"data.train[{index}]: {name} has changed since the last checkpoint ({what}){advice}")


def digest(place: int, sequence: PackedSequence) -> int:
    """63-bit BLAKE2b of a sequence at its place in the global batch: samples, where they begin, and what is learned."""
    parts = [place.to_bytes(8, "little")]
    for sample in sequence.samples:
        parts.append(len(sample.tokens).to_bytes(8, "little"))
        parts.append(sample.tokens.astype(_INT32, copy=False).tobytes())
        parts.append(np.packbits(sample.targets).tobytes())
        if sample.labels is not None:
            parts.append(sample.labels.tobytes())
        if sample.inputs:
            parts += [values.tobytes() for values in sample.inputs.values()]
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little") >> 1


def _in_background(produce: Callable[[], Generator[GlobalBatch, None, None]]) -> Iterator[GlobalBatch]:
    """Run a generator in a thread, a few items ahead; its exceptions surface here."""
    items: queue.Queue[GlobalBatch | BaseException | None] = queue.Queue(maxsize=_PREFETCH)
    closed = threading.Event()

    def put(item: GlobalBatch | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        batches = produce()
        try:
            for item in batches:
                if not put(item):
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            batches.close()

    threading.Thread(target=run, name="data", daemon=True).start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()


def _options(config: LaunchConfig, rank: int, world_size: int) -> Options:
    data = config.data
    return Options(
        sequence_length=data.sequence_length,
        packing=data.packing,
        seed=data.seed,
        shuffle=True,
        epochs=config.training.epochs,
        on_long=data.on_long,
        on_bad_record=data.on_bad_record,
        window_documents=data.window_documents,
        rank=rank,
        world_size=world_size,
    )


def build_training_stream(
    config: LaunchConfig,
    task: Encoder,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    gather: Gather,
    state: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    limit: int | None = None,
) -> BatchStream:
    """The training data of a config, from a state on; for ever unless `epochs` or a limit ends it."""
    # Samples by the thousand set off full collections, each of which would walk through all that torch and the model
    # have made so far (0.1 s with the interpreter held, for the training loop as well); what lives now stays alive
    gc.collect()
    gc.freeze()
    prepared = config.data.prepared is not None
    workers = 0 if prepared else worker_count(config.data.workers)
    stream = BatchStream(
        config.data.train,
        task,
        _options(config, rank, world_size),
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=micro_batch_size,
        gather=gather,
        state=state,
        tokenizer=tokenizer,
        allow_changed=config.data.allow_changed,
        limit=limit,
        workers=Workers(config, workers) if workers else None,
    )
    if prepared:
        stream.use_prepared(config)
    return stream


def build_evaluation_stream(
    config: LaunchConfig,
    task: Encoder,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    gather: Gather,
    sources: tuple[DataSource, ...],
) -> BatchStream:
    """One pass over sources of the evaluation data, in the order of the files."""
    return BatchStream(
        sources,
        task,
        replace(_options(config, rank, world_size), shuffle=False, epochs=1.0),
        global_batch_size=micro_batch_size * world_size,
        micro_batch_size=micro_batch_size,
        gather=gather,
    )
