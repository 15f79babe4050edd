"""Processes of a rank that read and tokenise, so that the training loop keeps the interpreter to itself.

Fresh interpreters, never forks: the rank has threads. A worker ends when the rank's end of its socket closes, however
the rank died. What they give is what the rank would have made itself; their number changes nothing but the time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.encoding import Encoded, SourceEncoder
from trainer.data.sample import Sample
from trainer.failures import DataError, DsftError, StorageError
from trainer.processes import child_environment

_FEWEST = 32  # documents worth a message
_MOST = 4  # where their number is left to dsft
_CORES_EACH = 4  # the rank's own threads need theirs


def worker_count(setting: int | str) -> int:
    """Workers of this rank for the setting `data.workers`."""
    if isinstance(setting, int):
        return setting
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(cores // _CORES_EACH, _MOST)


class Workers:
    """Encodes documents of a config's training data in processes. A context manager; used by one thread."""

    def __init__(self, config: LaunchConfig, count: int) -> None:
        self._config, self._count = config, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection[Any, Any]] = []

    def __enter__(self) -> Workers:
        environment = child_environment({"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"})
        for _ in range(self._count):
            here, there = socket.socketpair()
            with there:
                command = [sys.executable, "-P", "-m", "trainer.data.workers", str(there.fileno())]
                process = subprocess.Popen(
                    command, pass_fds=[there.fileno()], env=environment, stdin=subprocess.DEVNULL
                )
            self._processes.append(process)
            self._connections.append(Connection(here.detach()))
            self._connections[-1].send(self._config.model_dump_json())
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:  # in the middle of something long; nobody waits for it
                process.kill()
                process.wait()

    def encode(self, source: int, numbers: np.ndarray, positions: Iterable[int]) -> Encoded:
        """As SourceEncoder.encode, for the source with this number in `data.train`."""
        positions = list(positions)
        count = min(self._count, -(-len(positions) // _FEWEST))
        shares = [positions[worker::count] for worker in range(count)]
        pieces: dict[int, list[Sample]] = {}
        outcomes: list[tuple[int, int]] = []
        errors: list[DsftError] = []
        try:
            for connection, share in zip(self._connections, shares, strict=False):
                connection.send((source, numbers[share], share))
            for connection, _ in zip(self._connections, shares, strict=False):
                answer = connection.recv()
                if isinstance(answer, DsftError):
                    errors.append(answer)
                    continue
                made, found = answer
                pieces.update(made if isinstance(made, dict) else _unpacked(made))
                outcomes += found
        except (EOFError, ConnectionError) as error:
            codes = [process.poll() for process in self._processes]
            raise DsftError(
                f"a process that tokenises has died (exit codes {codes}); its last words are in this rank's log. "
                "-9 is often memory: set data.workers lower"
            ) from error
        if errors:
            raise errors[0]
        return pieces, outcomes


Packed = tuple[list[tuple[int, int]], np.ndarray, np.ndarray]


def _packed(pieces: dict[int, list[Sample]]) -> Packed:
    """((position, tokens) of each piece, all tokens, all targets): three messages' worth, not thousands."""
    flat = [(position, sample) for position, made in pieces.items() for sample in made or [_NONE]]
    return (
        [(position, len(sample.tokens)) for position, sample in flat],
        np.concatenate([sample.tokens for _, sample in flat]) if flat else _NONE.tokens,
        np.concatenate([sample.targets for _, sample in flat]) if flat else _NONE.targets,
    )


_NONE = Sample(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))


def _unpacked(packed: Packed) -> dict[int, list[Sample]]:
    places, tokens, targets = packed
    pieces: dict[int, list[Sample]] = {}
    start = 0
    for position, length in places:
        made = pieces.setdefault(position, [])
        if length:
            made.append(Sample(tokens[start : start + length], targets[start : start + length]))
        start += length
    return pieces


def main(arguments: Sequence[str]) -> int:
    """A worker, at one end of the socket whose descriptor it is given."""
    # a stop request reaches the rank, which still wants its last batches; the end of the rank ends the worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(int(arguments[0]))
    try:
        config = LaunchConfig.model_validate_json(connection.recv())
        encoders: dict[int, SourceEncoder] | None = None
        while True:
            source, numbers, positions = connection.recv()
            try:
                encoders = encoders or _encoders(config)
                pieces, outcomes = encoders[source].encode(numbers, range(len(numbers)))
            except (DataError, StorageError) as error:
                connection.send(error)
                continue
            placed = {positions[place]: made for place, made in pieces.items()}
            plain = all(
                s.labels is None and s.inputs is None and s.origin is None for of in placed.values() for s in of
            )
            connection.send(
                (_packed(placed) if plain else placed, [(positions[place], outcome) for place, outcome in outcomes])
            )
    except (EOFError, ConnectionError):
        return 0


def _encoders(config: LaunchConfig) -> dict[int, SourceEncoder]:
    from trainer.data.sources import open_source
    from trainer.tasks import get_task, task_tokenizer

    task, data = get_task(config, task_tokenizer(config)), config.data
    return {
        index: SourceEncoder(open_source(source), task, data.sequence_length, data.on_long, data.on_bad_record, index)
        for index, source in enumerate(data.train)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
