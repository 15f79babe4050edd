"""A rank whose loss goes wrong on one global batch, as a bad record makes it; else trainer.worker.

POISON="BATCH:FACTOR": the loss of that global batch is multiplied. DIE_AT="STEP": kill -9 after that step.
SLOW="SECONDS": what the thread that makes batches gathers from all ranks comes later from rank 1.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from trainer import worker
from trainer.data.stream import GlobalBatch
from trainer.rundir import RunDirectory
from trainer.train import Trainer


class PoisonedTrainer(Trainer):
    def train_step(self, batch: GlobalBatch) -> tuple[dict[str, Any], int]:
        bad, _, factor = os.environ["POISON"].partition(":")
        loss = self.loss

        class Poisoned:
            def __call__(self, *arguments: Any) -> Any:
                value, padded = loss(*arguments)
                return value * float(factor), padded

        if self.batch_of[self.step] == int(bad):
            self.loss = Poisoned()  # type: ignore[assignment]
        try:
            return super().train_step(batch)
        finally:
            self.loss = loss
            if os.environ.get("DIE_AT") == str(self.step) and self.rollbacks:
                os.kill(os.getpid(), signal.SIGKILL)

    def open_data_group(self) -> None:
        super().open_data_group()
        gather = self.data_gather

        def slow(array: Any) -> Any:
            time.sleep(float(os.environ.get("SLOW", "0")) * int(os.environ["RANK"]))
            return gather(array)

        self.data_gather = slow


def train(run: RunDirectory, attempt: int) -> None:
    PoisonedTrainer(run, attempt).run_to_end()


if __name__ == "__main__":
    worker.end(worker.main(train=train))
