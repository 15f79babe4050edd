"""When the next checkpoint is due. Pure functions of times in seconds; torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# Before a run has failed: one failure a day, weighing as much as one that was seen.
PRIOR_MTBF_SECONDS = 24 * 3600.0
# Writing goes on beside training, but takes bandwidth of shared storage: at most this share of the time.
_WRITING_SHARE = 0.2


def young_daly_seconds(cost: float, mtbf: float) -> float:
    """The checkpoint interval that loses least time, for saves that cost ``cost`` and failures every ``mtbf``.

    Daly (2006), "A higher order estimate of the optimum checkpoint interval for restart dumps", eq. 37; its leading
    term is Young's (1974) sqrt(2 * cost * mtbf). Counted from the end of one save to the beginning of the next.
    """
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def auto_interval_seconds(stall: float, write: float, mtbf: float) -> float:
    """Young/Daly by the time training stands still, but never so often that a save meets the one before."""
    return max(young_daly_seconds(stall, mtbf), write / _WRITING_SHARE)


def estimate_mtbf_seconds(events: Iterable[dict[str, Any]], now: float) -> float:
    """Mean time between failures of a run, from its ledger: (prior + time attempts ran) / (1 + failures).

    An attempt runs from its ``attempt`` event to the last event before the next attempt, or to ``now``; it failed if
    another one followed without ``stopped`` or ``trained``, and the failure was no drill's.
    """
    ran, failures = 0.0, 0
    begin = last = None
    ended_well = True
    for event in events:
        time = float(event["time"])
        if event["event"] == "attempt":
            if begin is not None and last is not None:
                ran += last - begin
                failures += not ended_well
            begin, ended_well = time, False
        elif event["event"] in ("stopped", "trained", "finished", "drill"):
            ended_well = True
        last = time
    if begin is not None:
        ran += max(now - begin, 0.0)
    return (PRIOR_MTBF_SECONDS + ran) / (1 + failures)
