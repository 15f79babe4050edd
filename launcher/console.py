"""How sizes and counts are written for people, and reports for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def gib(size: float) -> str:
    """Bytes in the unit that reads best: `1.5 GiB`, `820 MiB`."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            value = size / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{size / 1024:.0f} KiB"


def count(number: float) -> str:
    """A count with three digits: `822 k`, `6.74 B`."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g}"


def print_json(value: Any) -> None:
    """Print it as every JSON parser takes it: numbers that are not finite as the strings NaN, Infinity, -Infinity."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=str)))


def printable(text: str) -> str:
    """Without what would drive a terminal or break XML: control characters become U+FFFD; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def drop_output(stream: TextIO) -> None:
    """Have what was printed go nowhere: it cannot be written, and the end of the process would try that again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def if_anybody_reads(stream: TextIO) -> Iterator[None]:
    """What is printed on ``stream`` inside may be lost: a closed pipe or a full disk does not stop a run."""
    try:
        yield
        stream.flush()
    except OSError:
        drop_output(stream)
    except SystemExit as end:  # what rich makes of a closed pipe
        if end.code != 1:
            raise


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as what is in it: a narrow terminal wraps its lines, but cut cells would tell lies."""
    width, needed = console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(width, needed)
    with console.capture() as printed:
        console.print(table, soft_wrap=True)
    console.width = width
    console.file.writelines(line.rstrip() + "\n" for line in printed.get().splitlines())  # padding would be wrapped too


def print_table(console: Console, table: Table) -> None:
    """Print a table with long texts in it: wrapped in their cells on a terminal, whole in a file."""
    if console.is_terminal:
        console.print(table)
    else:
        print_whole(console, table)
