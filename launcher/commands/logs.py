"""`dsft logs RUN`: what the ranks wrote."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.rundir import RunDirectory

_FOLLOW_SECONDS = 0.3
_CHUNK_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-f", "--follow", action="store_true", help="of one rank: go on until the run ends")
    what.add_argument("--node", help="everything of this node: its agent and, without --rank, all of its ranks")
    what.add_argument("--errors", action="store_true", help="only failures: who failed first, and its traceback")
    parser.add_argument("--rank", type=int, help="only this rank (default: rank 0, and failing ones with --errors)")
    parser.add_argument("--attempt", type=int, help="default: the last one")


def run(options: argparse.Namespace) -> int:
    """Print them; 0."""
    from launcher.registry import find_run
    from trainer.failures import UserError

    found = find_run(options.run)
    attempts = found.attempts()
    if not attempts:
        raise UserError(f"{found.path}: no attempt was made yet, so there are no logs")
    attempt = options.attempt or attempts[-1]
    if attempt not in attempts:
        raise UserError(f"{found.path}: no attempt {attempt}; there are {attempts[0]} to {attempts[-1]}")
    if options.errors:
        _print_errors(found, [attempt] if options.attempt else attempts, options.rank)
    elif options.node:
        _print_node(found, attempt, options.node, options.rank)
    elif options.follow:
        _follow(found, attempt, options.rank or 0)
    else:
        paths = _logs(found, attempt, options.rank or 0)
        if not paths:
            have = sorted(path.stem.removeprefix("rank") for path in _logs(found, attempt, None))
            raise UserError(
                f"attempt {attempt} has no log of rank {options.rank or 0}; ranks: {', '.join(have) or '-'}"
            )
        for path in paths:
            _print_from(path, 0)
    return 0


def _logs(found: RunDirectory, attempt: int, rank: int | None) -> list[Path]:
    pattern = f"*/rank{'*' if rank is None else rank}.log"
    return sorted((found.attempt_dir(attempt) / "logs").glob(pattern))


def _print_node(found: RunDirectory, attempt: int, node: str, rank: int | None) -> None:
    """The logs of a node, each under its name."""
    from trainer.failures import UserError

    folder = found.attempt_dir(attempt) / "logs"
    if node not in (nodes := sorted(path.name for path in folder.glob("*"))):
        raise UserError(f"attempt {attempt} has no logs of node {node!r}; nodes: {', '.join(nodes) or '-'}")
    for path in sorted((folder / node).glob("*.log" if rank is None else f"rank{rank}.log")):
        print(f"==> {path.relative_to(folder)} <==", flush=True)
        _print_from(path, 0)


def _print_errors(found: RunDirectory, attempts: list[int], rank: int | None) -> None:
    from launcher.watch import describe_failure

    shown = 0
    for verdict in found.verdicts():
        if verdict["attempt"] in attempts and verdict["outcome"] == "failed" and rank in (None, verdict["rank"]):
            shown += 1
            print(f"attempt {verdict['attempt']}: {describe_failure(verdict)}")
            if verdict.get("victims"):
                print(f"  ended because of it: ranks {', '.join(map(str, verdict['victims']))}")
            if verdict.get("traceback"):
                print(verdict["traceback"], end="")
    for attempt in attempts if rank is not None else ():
        for record in found.failure_records(attempt):
            if record["rank"] == rank and not any(
                v["attempt"] == attempt and v["rank"] == rank for v in found.verdicts()
            ):
                shown += 1
                print(f"attempt {attempt}: {describe_failure(record)}\n{record['traceback']}", end="")
    if not shown:
        print("no failures")


def _follow(found: RunDirectory, attempt: int, rank: int) -> None:
    """Print a rank's log as it grows, on into later attempts, until the run has ended."""
    from launcher.state import run_state

    offsets: dict[Path, int] = {}
    while True:
        ended = run_state(found).state not in ("running", "pending")
        for number in found.attempts():
            for path in _logs(found, number, rank) if number >= attempt else ():
                offsets[path] = _print_from(path, offsets.get(path, 0))
        if ended:
            return
        time.sleep(_FOLLOW_SECONDS)


def _print_from(path: Path, offset: int) -> int:
    """Print a log from there on, byte for byte, however long it is; returns where it ends."""
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(_CHUNK_BYTES):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        return file.tell()
