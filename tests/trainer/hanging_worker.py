"""A rank that hangs or fails, once in each of the first attempts; else trainer.worker.

HANG="RANK:STEP:KIND ..." for attempts 1, 2, ...; KIND is `sleep` (in Python, before the first collective of the step),
`suspend` (SIGSTOP), `nan` (its loss), `bug` or `user` (an exception). It notes when: attempts/NNNN/hung. The straggler
probe is made after nearly every step.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from trainer import stragglers, worker
from trainer.data.stream import GlobalBatch
from trainer.failures import UserError
from trainer.rundir import RunDirectory
from trainer.train import Trainer

stragglers._INTERVAL_SECONDS = 0.05


class HangingTrainer(Trainer):
    def train_step(self, batch: GlobalBatch) -> tuple[dict[str, Any], int]:
        hangs = os.environ["HANG"].split()
        rank, step, kind = hangs[self.attempt - 1].split(":") if self.attempt <= len(hangs) else ("-1", "-1", "")
        if (self.rank, self.step) == (int(rank), int(step)):
            (self.run.attempt_dir(self.attempt) / "hung").write_text(str(time.time()))
            match kind:
                case "suspend":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "sleep":
                    wait_for_a_lock_that_nobody_frees()
                case "nan":
                    self.loss = not_finite(self.loss)
                case "bug":
                    raise ValueError("list index out of range, or so")
                case "user":
                    raise UserError("this cannot work")
        return super().train_step(batch)


def not_finite(loss: Any) -> Any:
    def poisoned(*arguments: Any) -> Any:
        value, padded = loss(*arguments)
        return value * float("nan"), padded

    return poisoned


def wait_for_a_lock_that_nobody_frees() -> None:
    time.sleep(600)


def train(run: RunDirectory, attempt: int) -> None:
    HangingTrainer(run, attempt).run_to_end()


if __name__ == "__main__":
    worker.end(worker.main(train=train))
