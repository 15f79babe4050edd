"""What the data needs of a file, whatever its format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from trainer.failures import DataError

Record = dict[str, Any]
Outcome = tuple[Record | None, str | None]  # (record, None), or (None, what is wrong with it)


def refuse_twice(columns: Sequence[str], name: str, advice: str) -> None:
    """Raises DataError where two columns of a file have the same name: a record would hold the last one alone."""
    twice = [column for column, times in Counter(columns).items() if times > 1]
    if twice:
        raise DataError(f"{name}: column {twice[0]!r} comes twice in its header; {advice}")


class RecordFile(Protocol):
    """Records of one file (or of one dataset), by number."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def records(self) -> int:
        """How many there are."""

    @property
    def size(self) -> int:
        """Bytes of all records, about."""

    def position(self, number: int) -> int:
        """Bytes before a record, about; rises with the number."""

    def find(self, position: int) -> int:
        """How many records end before a position, about."""

    def read(self, numbers: Sequence[int]) -> list[Outcome]:
        """Each record, or what is wrong with it. Raises DataError where the file cannot be read."""

    def where(self, number: int) -> str:
        """File and line (or the like) of a record, for messages."""

    def content(self) -> str:
        """Equal for equal contents, wherever and whenever they were written."""
