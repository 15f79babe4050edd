"""One source as a sequence of packed windows: which documents, in which order, in which sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.data.encoding import OUTCOMES, Encoded
from trainer.data.order import document_order, sequence_order, window_order
from trainer.data.packing import pack
from trainer.data.sample import PackedSequence, Sample
from trainer.data.sources import Source
from trainer.failures import DataError

Gather = Callable[[np.ndarray], list[np.ndarray]]
# Encodes documents of a source: (numbers [documents], positions in them) -> what `SourceEncoder.encode` gives
Encode = Callable[[np.ndarray, Iterable[int]], Encoded]

WINDOW_BYTES = 8 << 20  # bounds memory, and the time to the first batch, where documents are long

_OUTCOME, _ERROR = -1, -2  # rows of the exchange that are no piece of a document


@dataclass(frozen=True)
class Options:
    """How documents become sequences, the same for every source of a stream."""

    sequence_length: int
    packing: bool
    seed: int
    shuffle: bool
    epochs: float | None  # of sources that do not say; None: for ever
    on_long: str
    on_bad_record: str
    window_documents: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class Window:
    """A packed window: (document position, piece) pairs of each sequence, and its tokens and targets."""

    documents: np.ndarray  # int64 [documents]: record numbers, in their shuffled order
    sequences: list[list[tuple[int, int]]]
    lengths: np.ndarray
    targets: np.ndarray
    cache: dict[int, list[Sample]] = field(default_factory=dict)


class SourceStream:
    """The sequences of one source from a position on. Every rank walks it alike; opening a window is collective.

    ``epochs``: how often it is walked, from the first one on; None: for ever.
    """

    def __init__(
        self,
        index: int,
        source: Source,
        encode: Encode,
        options: Options,
        epochs: float | None,
        gather: Gather,
        state: dict[str, int] | None,
    ) -> None:
        self.epochs = epochs
        self.source, self._index, self._options, self._gather = source, index, options, gather
        self.encode = encode  # may be replaced by one that gives the same
        self._bounds = source.windows(options.window_documents, WINDOW_BYTES)
        self.epoch, self.window, self.offset = (
            (state["epoch"], state["window"], state["offset"]) if state else (0, 0, 0)
        )
        self.counts = np.zeros(len(OUTCOMES), dtype=np.int64)
        self._order, self._starts = self._epoch_order()
        self._open: Window | None = None
        self._gave = state is not None  # whether this epoch has given a sequence

    # -- walking -------------------------------------------------------------------------------------------------

    def next(self) -> tuple[Window, int] | None:
        """The next sequence as (its window, its number in it), or None at the end."""
        while True:
            if self.window >= len(self._order):
                if self.ended():
                    return None
                if not self._gave:
                    raise DataError(f"{self.source.config.path}: a whole epoch has left nothing to learn from")
                self._gave = False
                self.epoch, self.window, self.offset = self.epoch + 1, 0, 0
                self._order, self._starts = self._epoch_order()
                continue
            window, number = self._opened(), self.offset
            self.offset += 1
            if self.offset >= len(window.sequences):  # the state then points at the next window's start
                self.window, self.offset, self._open = self.window + 1, 0, None
            if number < len(window.sequences):  # else it has nothing to learn
                self._gave = True
                return window, number

    def ended(self) -> bool:
        """Whether it is known to give nothing any more."""
        last = self.epochs is not None and self.epoch + 1 >= self.epochs
        return last and self.window >= len(self._order)

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "window": self.window, "offset": self.offset}

    def documents(self) -> int:
        """Documents in all its epochs; only of a source that ends."""
        return round((self.epochs or 0.0) * self.source.records)

    def documents_done(self) -> float:
        """Documents consumed so far, over all epochs; within a window, which is then open, by its sequences."""
        done = float(self.epoch * self.source.records + self._starts[min(self.window, len(self._order))])
        if self.offset and self.window < len(self._order):
            size, sequences = self._starts[self.window + 1] - self._starts[self.window], len(self._opened().sequences)
            done += float(size) * min(self.offset, sequences) / max(sequences, 1)
        return done

    def _opened(self) -> Window:
        if self._open is None:
            self._open = self._prepare(self.epoch, self.window)
        return self._open

    def _epoch_order(self) -> tuple[np.ndarray, np.ndarray]:
        """(windows of this epoch in order, documents before each of them); cut short in a last part of an epoch."""
        options, windows = self._options, len(self._bounds) - 1
        order = window_order(windows, options.seed, self._index, self.epoch) if options.shuffle else np.arange(windows)
        starts = np.concatenate([[0], np.cumsum((self._bounds[1:] - self._bounds[:-1])[order])])
        if self.epochs is not None:
            left = self.documents() - self.epoch * self.source.records
            order = order[: int(np.searchsorted(starts, max(left, 0)))]
            starts = np.minimum(starts[: len(order) + 1], max(left, 0))
        return order, starts

    # -- windows -------------------------------------------------------------------------------------------------

    def _prepare(self, epoch: int, place: int) -> Window:
        options, number = self._options, int(self._order[place])
        documents = np.arange(self._bounds[number], self._bounds[number + 1])
        if options.shuffle:
            documents = documents[document_order(len(documents), options.seed, self._index, epoch, number)]
        documents = documents[: int(self._starts[place + 1] - self._starts[place])]

        # this rank's share; what the others need of it is a row for each piece: (document, piece, tokens, targets), and
        # for what is to be counted (document, -1, outcome, 0). An error goes the same way, as rows (0, -2, byte, 0) of
        # its message: a rank that raised before the exchange would leave the others waiting in it.
        share = range(options.rank, len(documents), options.world_size)
        pieces: dict[int, list[Sample]] = {}
        try:
            pieces, outcomes = self.encode(documents, share)
        except DataError as error:
            rows = [(0, _ERROR, byte, 0) for byte in str(error).encode()]
        else:
            rows = [
                (p, i, len(s.tokens), int(np.count_nonzero(s.targets)))
                for p, of in pieces.items()
                for i, s in enumerate(of)
            ]
            rows += [(position, _OUTCOME, outcome, 0) for position, outcome in outcomes]
        gathered = self._gather(np.array(rows, dtype=np.int64).reshape(-1, 4))
        for part in gathered:
            if len(part) and part[0, 1] == _ERROR:
                raise DataError(part[:, 2].astype(np.uint8).tobytes().decode())
        table = np.concatenate(gathered)
        counted = table[table[:, 1] < 0]
        self.counts += np.bincount(counted[:, 2], minlength=len(OUTCOMES))
        table = table[table[:, 1] >= 0]
        table = table[np.lexsort((table[:, 1], table[:, 0]))]

        alone = [[item] for item in range(len(table))]
        bins = pack(table[:, 2], options.sequence_length) if options.packing else alone
        if options.shuffle:
            bins = [bins[i] for i in sequence_order(len(bins), options.seed, self._index, epoch, number)]
        places = list(map(tuple, table[:, :2].tolist()))
        return Window(
            documents,
            [[places[item] for item in members] for members in bins],
            np.array([table[members, 2].sum() for members in bins], dtype=np.int64),
            np.array([table[members, 3].sum() for members in bins], dtype=np.int64),
            pieces,
        )

    def sequences(self, window: Window, numbers: Sequence[int]) -> list[PackedSequence]:
        """Sequences of a window with their tokens; documents that other ranks have tokenised are tokenised here."""
        needed = {position for number in numbers for position, _ in window.sequences[number]}
        missing = sorted(needed - window.cache.keys())
        if missing:
            window.cache.update(self.encode(window.documents, missing)[0])
        return [
            PackedSequence(tuple(window.cache[position][piece] for position, piece in window.sequences[number]))
            for number in numbers
        ]
