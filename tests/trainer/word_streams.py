"""Batch streams of small files of numbers, on ranks that are threads."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config.schema import DataSource
from trainer.data.sample import Sample
from trainer.data.stream import BatchStream, GlobalBatch
from trainer.data.windows import Options
from trainer.failures import DataError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of hundreds of small files do not belong into the user's cache. For modules that import it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Exchange:
    """A real exchange between ranks that are threads."""

    def __init__(self, world_size: int) -> None:
        self._shared: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)

    def gather_of(self, rank: int) -> Callable[[np.ndarray], list[np.ndarray]]:
        """What a stream on ``rank`` gathers with."""

        def gather(rows: np.ndarray) -> list[np.ndarray]:
            self._shared[rank] = rows
            self.barrier.wait()
            found = list(self._shared)
            self.barrier.wait()
            return found

        return gather


class Words:
    """A task without a tokenizer: a record's `text` is a list of numbers, the first of which is its prompt."""

    structured = optional = paths = frozenset[str]()
    splits, pieces, predicts, loads = True, False, False, False

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        return {"text": "text"}

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Sample]:
        made = []
        for record in records:
            tokens = np.array([int(word) for word in record["text"].split()], dtype=np.int32)
            made.append(Sample(tokens, np.arange(len(tokens)) > 0))
        return made

    def load(self, sample: Sample) -> Sample:
        return sample


def options(rank: int = 0, world_size: int = 1, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "sequence_length": 16,
        "packing": True,
        "seed": 3,
        "shuffle": True,
        "epochs": 1.0,
        "on_long": "split",
        "on_bad_record": "error",
        "window_documents": 7,
        "rank": rank,
        "world_size": world_size,
    }
    return Options(**{**values, **changes})


def write_source(path: Path, lengths: Sequence[int], first: int = 1) -> DataSource:
    """Record i holds the token first + i, `lengths[i]` times."""
    lines = [json.dumps({"text": " ".join([str(first + i)] * n)}) for i, n in enumerate(lengths)]
    path.write_text("\n".join(lines) + "\n")
    return DataSource(path=str(path))


def run_ranks(sources: tuple[DataSource, ...], world_size: int, **changes: Any) -> list[list[GlobalBatch]]:
    """Batches of each rank; a rank's error is raised here."""
    results = rank_results(sources, world_size, **changes)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    return results


def rank_results(
    sources: tuple[DataSource, ...],
    world_size: int,
    *,
    micro: int = 1,
    size: int = 4,
    state: dict[str, Any] | None = None,
    tokenizer: str | None = "words",
    limit: int | None = None,
    allow_changed: bool = False,
    **changes: Any,
) -> list[Any]:
    """Batches or the error of each rank; ranks are threads with a real exchange between them."""
    exchange = Exchange(world_size)
    results: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        try:
            stream = BatchStream(
                sources,
                Words(),
                options(rank, world_size, **changes),
                global_batch_size=size,
                micro_batch_size=micro,
                gather=exchange.gather_of(rank),
                state=state,
                tokenizer=tokenizer,
                allow_changed=allow_changed,
                limit=limit,
            )
            results[rank] = list(stream)
        except BaseException as error:
            if not isinstance(error, DataError):  # those come on every rank; to abort would race with their waking up
                exchange.barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def digests(ranks: list[list[GlobalBatch]]) -> list[int]:
    return [sum(batch.digest for batch in batches) % (1 << 63) for batches in zip(*ranks, strict=True)]


def tokens_seen(ranks: list[list[GlobalBatch]]) -> Counter[int]:
    return Counter(
        int(token)
        for batches in ranks
        for batch in batches
        for micro_batch in batch.micro_batches
        for sequence in micro_batch.sequences
        for sample in sequence.samples
        for token in sample.tokens
    )
