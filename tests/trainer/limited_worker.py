"""A rank that may take HEADROOM more bytes than it has once everything is loaded; else trainer.worker."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from trainer import worker
from trainer.rundir import RunDirectory
from trainer.train import Trainer


class LimitedTrainer(Trainer):
    def run_to_end(self) -> None:
        (held,) = re.findall(r"^VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        limit = int(held) * 1024 + int(os.environ["HEADROOM"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        super().run_to_end()


def train(run: RunDirectory, attempt: int) -> None:
    LimitedTrainer(run, attempt).run_to_end()


if __name__ == "__main__":
    worker.end(worker.main(train=train))
