"""A rank that stands still in the middle of a save, for its run to be killed there; else trainer.worker.

HOLD="STEP:RANK:POINT": at that point (`trainer.checkpoint.POINTS`) of the save of that step, this rank leaves the file
RUN/held and waits.
"""

from __future__ import annotations

import os
import time

from trainer import worker
from trainer.rundir import RunDirectory
from trainer.train import Trainer


def train(run: RunDirectory, attempt: int) -> None:
    trainer = Trainer(run, attempt)
    step, rank, point = os.environ["HOLD"].split(":")

    def at_point(reached: str) -> None:
        if reached == point and trainer.saver.step == int(step) and trainer.rank == int(rank):
            (run.path / "held").touch()
            time.sleep(600)

    trainer.saver.at_point = at_point
    trainer.run_to_end()


if __name__ == "__main__":
    worker.end(worker.main(train=train))
