"""A rank of `dsft predict`: answers for its share of the input's blocks of records, without waiting for other ranks.

Started by `launcher.inference` through `trainer.agent`, as `trainer.worker` is. Which records share a batch does not
depend on the number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.encoding import BAD, LONG_SKIPPED, SourceEncoder
from trainer.data.sample import PackedSequence, Sample
from trainer.data.sources import Source, open_source
from trainer.failures import UserError
from trainer.inference import Replica, load_replica, read_request
from trainer.rundir import RunDirectory
from trainer.tasks.base import BaseTask, Objective
from trainer.worker import end, main

_BATCHES = 4  # of a block, in which records are sorted by length


def predict(run: RunDirectory, attempt: int) -> None:
    """Write `part-<rank>.jsonl`: a line for each record of this rank's blocks, in rising order of `number`."""
    import torch

    request = read_request(run.path)
    config = LaunchConfig.model_validate(request["config"])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    task, replica, objective = load_replica(config)
    if not task.predicts:
        raise UserError(f"dsft predict cannot do {config.task.type}: it has no answers")
    task.labelled = False
    block, first = request["batch_size"] * _BATCHES, 0
    path = run.path / f"part-{rank}.jsonl"
    # halves of surrogate pairs, which a bad record may hold, are then as JSON writes them
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as part, torch.no_grad():
        for index, source in enumerate(config.data.evaluation):
            reader = Reader(open_source(_questions(source, task)), task, config, index)
            starts = range(0, reader.source.records, block)
            for start in starts[(rank - first // block) % world_size :: world_size]:
                numbers = np.arange(start, min(start + block, reader.source.records))
                _block(reader, task, replica, objective, numbers, request["batch_size"], first, part)
            first += reader.source.records


def _questions(source: DataSource, task: BaseTask) -> DataSource:
    """A source whose labels, if it has any, are not looked at."""
    kept = {name: text for name, text in source.template.items() if name not in task.label_columns}
    columns = {name: column for name, column in source.columns.items() if name not in task.label_columns}
    return source.model_copy(update={"template": kept, "columns": columns})


class Reader:
    """A source's records as samples, with what is wrong with those that give none."""

    def __init__(self, source: Source, task: BaseTask, config: LaunchConfig, index: int) -> None:
        data = config.data
        self.source, self._length = source, data.sequence_length
        # a text that is cut, or a piece of one, is not what is to be answered
        on_long = "skip" if task.splits and data.on_long != "error" else data.on_long
        self._encoder = SourceEncoder(source, task, data.sequence_length, on_long, data.on_bad_record, index)
        self._problems: list[str] = []
        self._encoder.on_bad = self._problems.append

    def __call__(self, numbers: np.ndarray) -> tuple[dict[int, list[Sample]], dict[int, str]]:
        """(record -> samples, record -> why it has none). Raises DataError as `data.on_bad_record` says."""
        self._problems.clear()
        made, outcomes = self._encoder.encode(numbers, range(len(numbers)))
        samples = {int(numbers[position]): found for position, found in made.items() if found}
        bad = iter(self._problems)
        why = {}
        for position, outcome in outcomes:
            number = int(numbers[position])
            if outcome == LONG_SKIPPED:
                why[number] = f"{self.source.where(number)}: more than data.sequence_length ({self._length}) tokens"
            elif outcome == BAD:
                why[number] = next(bad)
        for number in map(int, numbers):
            if number not in samples:
                why.setdefault(number, f"{self.source.where(number)}: nothing in it to answer")
        return samples, why


def _block(
    reader: Reader,
    task: BaseTask,
    replica: Replica,
    objective: Objective,
    numbers: np.ndarray,
    batch_size: int,
    first: int,
    part: TextIO,
) -> None:
    samples, why = reader(numbers)
    found: dict[int, list[tuple[int, Any]]] = {}
    for batch in _batches([sample for of in samples.values() for sample in of], batch_size):
        for (_, number, piece), item in objective.answer(replica, batch):  # type: ignore[arg-type]  # as an Engine
            found.setdefault(number, []).append((piece, item))
    for number, (record, _) in zip(map(int, numbers), reader.source.read(numbers.tolist()), strict=True):
        line: dict[str, Any] = {"number": first + number, "input": _shown(record or {})}
        if reader.source.config.format == "parallel":  # a file of sources stands for that of the targets as well
            line["input"].pop("target", None)
        if number in why:
            line["error"] = why[number]
        else:
            items = sorted(found[number], key=lambda item: item[0])
            line["prediction"] = task.answer([item for _, item in items])
        part.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    part.flush()  # the launcher counts the lines


def _batches(samples: list[Sample], size: int) -> Iterator[list[PackedSequence]]:
    """Samples of like length together: the less padding."""
    ordered = sorted(samples, key=lambda sample: len(sample.tokens))
    for start in range(0, len(ordered), size):
        yield [PackedSequence((sample,)) for sample in ordered[start : start + size]]


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the images and the like in it."""
    return {
        name: _shown(value) if isinstance(value, dict) else value
        for name, value in record.items()
        if not isinstance(value, bytes)
    }


if __name__ == "__main__":
    end(main(train=predict))
