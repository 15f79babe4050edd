"""Ranks that train one run after another in one process group and write down the dropout masks they draw.

    torchrun ... recording_worker.py ATTEMPT RUN...

Rank r leaves RUN/masks<r>.json: "STEP/MICRO-BATCH" -> a hash of every mask of that forward pass.
Else they are as trainer.worker. No step may look at source files (a question to shared storage) or start a process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional

from trainer import worker
from trainer.data.stream import GlobalBatch
from trainer.rundir import RunDirectory
from trainer.train import Trainer

_dropout = functional.dropout


class Recorder(Trainer):
    """Masks by the micro-batch they belong to; those of empty micro-batches, which have no weight, are left out."""

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        super().__init__(run, attempt)
        self.masks: dict[str, Any] = defaultdict(hashlib.sha256)
        self._place: str | None = None

    def train_step(self, batch: GlobalBatch) -> tuple[dict[str, Any], int]:
        self._full = {micro_batch.index for micro_batch in batch.micro_batches if micro_batch.sequences}
        stacks = patch("traceback.format_stack", side_effect=AssertionError)
        numactl = patch("deepspeed.utils.numa.get_numa_cores", side_effect=AssertionError)
        with patch.object(functional, "dropout", self.dropout), stacks, numactl:
            return super().train_step(batch)

    def seed_dropout(self, micro_batch: int) -> None:
        super().seed_dropout(micro_batch)
        self._place = f"{self.step}/{micro_batch}" if micro_batch in self._full else None

    def dropout(self, values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        """As ever; the mask is drawn once before, from the same state of the generator, to be looked at."""
        if training and p > 0 and self._place:
            state = torch.get_rng_state()
            mask = _dropout(torch.ones_like(values), p, training) != 0
            torch.set_rng_state(state)
            self.masks[self._place].update(repr(tuple(mask.shape)).encode() + mask.numpy().tobytes())
        return _dropout(values, p, training, inplace)


def main() -> int:
    attempt, *runs = sys.argv[1:]
    for path in runs:
        run = RunDirectory(Path(path))
        recorder: Recorder | None = None

        def train(run: RunDirectory, attempt: int) -> None:
            nonlocal recorder
            recorder = Recorder(run, attempt)
            recorder.run_to_end()

        code = worker.main(["--run-dir", path, "--attempt", attempt], train=train)
        if code or recorder is None:
            return code or 1
        found = {place: digest.hexdigest() for place, digest in recorder.masks.items()}
        (run.path / f"masks{recorder.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    worker.end(main())
