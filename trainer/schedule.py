"""The learning rate as a pure function of training progress."""

from __future__ import annotations

import math

from trainer.config.schema import ScheduleConfig, TrainingConfig


def learning_rate(training: TrainingConfig, step: int, progress: float) -> float:
    """Learning rate of an optimizer step (the first is 1), before which ``progress`` epochs were done."""
    warmup = training.schedule.warmup_steps
    if training.max_steps is not None:
        fraction = (step - 1 - warmup) / max(training.max_steps - warmup, 1)
    else:
        assert training.epochs is not None
        done = progress / training.epochs
        # what the warm-up took of it: exact where every step consumes as much
        warm = done * warmup / max(step - 1, warmup, 1)
        fraction = (done - warm) / (1.0 - warm) if warm < 1.0 else 1.0
    return training.optimizer.learning_rate * learning_rate_factor(training.schedule, step, fraction)


def learning_rate_factor(schedule: ScheduleConfig, step: int, fraction: float) -> float:
    """Learning rate of an optimizer step, as a ratio of the peak.

    Args:
        schedule: type, warm-up and final ratio.
        step: number of this step, the first is 1.
        fraction: share of the training after the warm-up that was done before this step, in [0, 1]: of its steps, or
            of the documents to consume where the length is given in epochs.

    Linear warm-up (step / warmup_steps, so no step is wasted at 0), then constant, linear or half-cosine decay
    (Loshchilov & Hutter 2017, SGDR, without restarts) from 1 to ``final_ratio`` over the rest of the training.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.type == "constant":
        return 1.0
    fraction = min(max(fraction, 0.0), 1.0)
    decay = 1.0 - fraction if schedule.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * fraction))
    return schedule.final_ratio + (1.0 - schedule.final_ratio) * decay
