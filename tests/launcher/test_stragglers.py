"""Who is told to be slow: only ranks that were slow several times in a row, and only where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.stragglers import IN_A_ROW, WINDOW_SECONDS, Straggler, StragglerWatch, slow_ranks
from trainer.heartbeat import Heartbeat


def beats(
    probes: int = 0, seconds: Sequence[float] = (0.01,) * 4, own: Sequence[float] = (0.0,) * 4, wait: float = 0.0
) -> list[Heartbeat]:
    shared: dict[str, Any] = {
        "beats": 1,
        "progress": 1,
        "phase_seconds": 0.0,
        "step_seconds": 1.0,
        "data_seconds": wait,
    }
    return [
        Heartbeat(
            rank=k, node=f"n{k}", phase="step", step=9, probes=probes, probe_seconds=s, own_data_seconds=o, **shared
        )
        for k, (s, o) in enumerate(zip(seconds, own, strict=True))
    ]


def test_the_ratio_is_to_the_median_which_a_slow_rank_does_not_move() -> None:
    assert slow_ranks({0: 1.0, 1: 1.1, 2: 0.9, 3: 3.0}) == {3: 3.0}
    assert slow_ranks({0: 1.0, 1: 1.6}) == {1: 1.6}  # of two, to the quicker one
    assert slow_ranks({0: 1.0, 1: 1.4}) == {}
    assert slow_ranks({0: 1.0}) == slow_ranks({0: 0.0, 1: 0.0}) == {}


def test_a_device_that_is_slow_probe_after_probe_is_told_once() -> None:
    watch, found = StragglerWatch(), []
    slow = (0.01, 0.01, 0.02, 0.011)
    for count in range(1, IN_A_ROW + 3):
        for _ in range(5):  # a probe stays in the heartbeats until the next one
            found += [(count, one) for one in watch.update(beats(count, slow), 0.0)]
    assert found == [(IN_A_ROW, Straggler(2, "n2", "compute", 2.0, 0.02, 0.01))]


def test_a_device_that_is_slow_now_and_then_is_not_told() -> None:
    watch = StragglerWatch()
    for count in range(1, 20):
        slow = (0.01, 0.01, 0.02 if count % IN_A_ROW else 0.01, 0.01)
        assert watch.update(beats(count, slow), 0.0) == []


def test_ranks_that_are_not_at_the_same_probe_are_not_compared() -> None:
    watch = StragglerWatch()
    for count in range(1, 10):
        mixed = [*beats(count, (0.01, 0.01, 0.05, 0.01))[:3], beats(count + 1)[3]]
        assert watch.update(mixed, 0.0) == []


def test_a_rank_that_makes_its_batches_slowly_is_told_where_training_waits_for_them() -> None:
    def run(wait: float, slow: float) -> list[Straggler]:
        watch, found = StragglerWatch(), []
        for window in range(IN_A_ROW + 2):
            busy = [window * share * WINDOW_SECONDS for share in (0.2, 0.25, 0.2, slow)]
            found += watch.update(beats(own=busy, wait=wait), window * WINDOW_SECONDS)
        return found

    (told,) = run(0.5, 0.9)
    assert (told.rank, told.kind, round(told.ratio, 2), round(told.seconds)) == (3, "data", 4.5, 54)
    assert run(0.0, 0.9) == []  # its batches are early enough
    assert run(0.5, 0.25) == []
