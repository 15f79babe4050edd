"""When an attempt hangs, how long it may stand still, and which rank the others wait for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.hangs import Watched, find_hang, limit_seconds, main_stack, top_frame, with_stack
from launcher.heartbeats import HeartbeatWatch
from launcher.verdict import Snapshot, classify
from trainer.config.schema import ResilienceConfig
from trainer.heartbeat import Heartbeat, Phase

AUTO = ResilienceConfig()


def beat(rank: int, phase: Phase = "step", step: int = 7, **more: Any) -> Heartbeat:
    values: dict[str, Any] = {
        "collectives": (40, 5),
        "longest_step_seconds": 20.0,
        "beats": 9,
        "progress": 3,
        "phase_seconds": 1.0,
    }
    return Heartbeat(rank=rank, node=f"node-{rank // 2}", phase=phase, step=step, **values | more)


def seen(one: Heartbeat, quiet: float = 200.0, stale: float = 1.0) -> Watched:
    return Watched(one, quiet, stale)


@pytest.mark.parametrize(
    ("longest", "phases", "settings", "limit"),
    [
        ([0.5, 0.7], ["step", "step"], {}, 60.0),
        ([20.0, 30.0], ["step", "data"], {}, 150.0),  # five times the longest of any rank
        ([0.0, 0.0], ["step", "step"], {}, 1800.0),  # the first step
        ([20.0, 20.0], ["step", "checkpoint"], {}, 1800.0),  # one of them waits for a disk
        ([20.0, 20.0], ["step", "step"], {"hang_timeout_seconds": 30.0}, 30.0),
        ([0.0, 0.0], ["step", "step"], {"hang_timeout_seconds": 30.0}, 1800.0),
        ([20.0, 20.0], ["evaluation"] * 2, {"hang_timeout_seconds": 30.0, "slow_phase_timeout_seconds": 90.0}, 90.0),
        ([0.0, 2.0], ["ended", "step"], {}, 60.0),
    ],
)
def test_limits_are_learned_from_steps(
    longest: list[float], phases: list[Phase], settings: dict[str, float], limit: float
) -> None:
    beats = [beat(k, phases[k], longest_step_seconds=longest[k]) for k in range(2)]
    assert limit_seconds(beats, ResilienceConfig(**settings)) == limit


def test_a_rank_that_gets_on_shows_that_none_hangs() -> None:
    assert find_hang([seen(beat(0)), seen(beat(1), quiet=99.0)], 2, AUTO) is None
    assert find_hang([seen(beat(0)), seen(beat(1), quiet=101.0)], 2, AUTO) is not None
    assert find_hang([seen(beat(0))] * 2, 2, ResilienceConfig(hang_timeout_seconds=None)) is None
    assert find_hang([], 2, AUTO) is None


def test_the_rank_that_did_not_enter_a_collective_is_the_cause() -> None:
    ranks = [seen(beat(k, collectives=(40, 6 if k != 2 else 5))) for k in range(4)]
    hang = find_hang(ranks, 4, AUTO)
    assert hang is not None
    assert (hang.ranks, hang.node, hang.others, hang.limit_seconds) == ((2,), "node-1", (0, 1, 3), 100.0)
    assert "rank 2 did not enter collective 6 of process group 1, in which 3 ranks wait" in hang.message


def test_the_rank_that_is_behind_is_the_cause_whatever_other_threads_do() -> None:
    # rank 1 is stuck before it has its data; its own reading thread is ahead
    ranks = [seen(beat(0, "step", 8)), seen(beat(1, "data", 8, collectives=(40, 6)))]
    hang = find_hang(ranks, 2, AUTO)
    assert hang is not None
    assert (hang.ranks, hang.phase, hang.step) == ((1,), "data", 8)


def test_a_suspended_rank_is_the_cause() -> None:
    # what it wrote last is from before, and its file did not change since
    ranks = [seen(beat(0)), seen(beat(1, step=6, collectives=(38, 5)), stale=180.0)]
    hang = find_hang(ranks, 2, AUTO)
    assert hang is not None
    assert (hang.ranks, hang.suspended, hang.others, hang.step) == ((1,), (1,), (0,), 7)
    assert "no sign of life for 180 s" in hang.why


def test_storage_that_takes_no_heartbeat_at_all_is_given_time() -> None:
    ranks = [seen(beat(k), stale=200.0) for k in range(2)]
    assert find_hang(ranks, 2, AUTO) is None
    hang = find_hang([seen(beat(k), quiet=1801.0, stale=1801.0) for k in range(2)], 2, AUTO)
    assert hang is not None
    assert hang.ranks == ()


def test_a_single_rank_that_stands_still_or_is_suspended_is_named() -> None:
    for stale in (1.0, 200.0):
        hang = find_hang([seen(beat(0), stale=stale)], 1, AUTO)
        assert hang is not None
        assert hang.ranks == (0,)


def test_where_all_entered_the_same_collectives_no_rank_is_blamed() -> None:
    hang = find_hang([seen(beat(0)), seen(beat(1))], 2, AUTO)
    assert hang is not None
    assert (hang.ranks, hang.node, hang.others) == ((), None, (0, 1))
    assert "network" in hang.message


def test_a_rank_that_never_came_is_the_cause() -> None:
    assert find_hang([seen(beat(0, "setup", 0))], 2, AUTO) is None
    hang = find_hang([seen(beat(0, "setup", 0), quiet=1801.0)], 2, AUTO)
    assert hang is not None
    assert hang.ranks == (1,)
    assert "rank 1 never started" in hang.message


def test_ranks_that_have_ended_are_neither_waited_for_nor_blamed() -> None:
    ended = [seen(beat(k, "ended"), quiet=5000.0, stale=5000.0) for k in (1, 2)]
    assert find_hang(ended, 2, AUTO) is None
    assert find_hang([seen(beat(0, "export"), quiet=1700.0), *ended], 3, AUTO) is None
    hang = find_hang([seen(beat(0, "export"), quiet=1801.0), *ended], 3, AUTO)
    assert hang is not None
    assert hang.ranks == (0,)


STACK = """Thread 0x00007f1 [python] (most recent call first):
  File "/x/threading.py", line 331 in wait

Current thread 0x00007f2 [python] (most recent call first):
  File "/x/lock.py", line 9 in take
  File "/x/train.py", line 120 in train_step
"""


def test_the_verdict_shows_the_stack_of_the_cause(tmp_path: Path) -> None:
    hang = find_hang([seen(beat(0)), seen(beat(1, collectives=(39, 5)))], 2, AUTO)
    assert hang is not None
    (tmp_path / "rank1.txt").write_text(STACK)
    verdict = classify(Snapshot({}, hang=with_stack(hang, tmp_path)))
    assert (verdict.failure_class, verdict.rank, verdict.victims, verdict.step) == ("hang", 1, (0,), 7)
    assert verdict.message.endswith("it was in take (lock.py:9)")
    assert verdict.traceback is not None
    assert verdict.traceback == main_stack(STACK)
    assert verdict.traceback.count("\n") == 1
    assert top_frame(None) is None

    without = classify(Snapshot({}, hang=with_stack(hang, tmp_path / "nowhere")))
    assert "rank 1 could not write its stack" in without.evidence


def test_an_error_that_a_rank_has_reported_explains_the_hang() -> None:
    hang = find_hang([seen(beat(0)), seen(beat(1))], 2, AUTO)
    record = {"class": "data", "rank": 1, "message": "line 7", "time": 5.0}
    assert classify(Snapshot({}, records=[record], hang=hang)).failure_class == "data"
    assert classify(Snapshot({}, stop_reason="cancel", hang=hang)).outcome == "stopped"


def test_only_time_in_which_heartbeats_could_be_read_counts(tmp_path: Path) -> None:
    watch = HeartbeatWatch(tmp_path, 2, AUTO)

    def publish(rank: int, beats: int, **more: Any) -> None:
        text = json.dumps(asdict(beat(rank, beats=beats, **more))).ljust(2048)
        (tmp_path / f"rank{rank}").write_text(text)

    def ages(now: float) -> list[tuple[float, float]]:
        return [(w.quiet_seconds, w.stale_seconds) for w in watch.look(now)]

    publish(0, 1)
    publish(1, 1)
    assert ages(1000.0) == [(0.0, 0.0), (0.0, 0.0)]
    publish(0, 2)
    assert ages(1004.0) == [(4.0, 0.0), (4.0, 4.0)]
    publish(0, 3, collectives=(41, 5))
    (tmp_path / "rank1").write_text('{"rank": 1, "no')  # read while it is written
    assert ages(1008.0) == [(0.0, 0.0), (8.0, 8.0)]
    assert ages(5000.0) == [(10.0, 10.0), (18.0, 18.0)]  # the supervisor was suspended, or its storage
