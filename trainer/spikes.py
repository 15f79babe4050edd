"""When training goes back behind a bad step, and which global batches it then leaves out. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from trainer.config.schema import LossSpikeConfig, TrainingConfig

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_SMALLEST_SCALE = 1e-3  # of the median: a flat loss must not make noise a spike


@dataclass(frozen=True)
class Cause:
    """Why to go back.

    Attributes:
        reason: ``nonfinite`` or ``loss_spike``.
        message: for people.
        steps: how many steps, ending with this one, trained on suspect batches.
    """

    reason: str
    message: str
    steps: int


def is_spike(history: Sequence[float], loss: float, config: LossSpikeConfig) -> bool:
    """Whether ``loss`` lies above the median of the last ``window`` losses by ``threshold`` robust deviations.

    The deviation is 1.4826 times the median absolute deviation (Hampel 1974), and at least a thousandth of the median.
    Nothing is a spike before the window is full.
    """
    if len(history) < config.window:
        return False
    recent = list(history)[-config.window :]
    middle = median(recent)
    scale = _MAD_TO_SIGMA * median(abs(value - middle) for value in recent)
    return loss > middle + config.threshold * max(scale, _SMALLEST_SCALE * abs(middle))


def cause_to_go_back(training: TrainingConfig, history: Sequence[float], loss: float, applied: bool) -> Cause | None:
    """Why the step that had this loss calls for a rollback, if it does; the same on every rank."""
    if not (math.isfinite(loss) and applied):
        if training.on_nonfinite == "rollback":
            return Cause("nonfinite", f"loss {loss}, gradients {'' if applied else 'not '}finite", 1)
        return None
    spike = training.loss_spike
    if spike is not None and is_spike(history, loss, spike):
        before = median(list(history)[-spike.window :])
        return Cause("loss_spike", f"loss {loss:.6g} after a median of {before:.6g}", 1 + spike.batches_before)
    return None


def rollbacks_of(events: Iterable[dict[str, Any]]) -> tuple[int, frozenset[int]]:
    """(rollbacks so far, global batches left out) of a run's ledger."""
    found = [event for event in events if event["event"] == "rollback"]
    return len(found), frozenset(int(batch) for event in found for batch in event["skipped_batches"])
