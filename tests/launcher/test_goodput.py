"""The account of a run's time: every second once, whatever the ledger holds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.goodput import PARTS, account, failure_times, timeline

Json = dict[str, Any]


def event(time: float, name: str, attempt: int | None = None, **fields: Any) -> Json:
    return {"time": time, "event": name, **({} if attempt is None else {"attempt": attempt}), **fields}


def step(time: float, number: int, seconds: float = 2.0) -> Json:
    return {"time": time, "step": number, "loss": 1.0, "step_seconds": seconds}


def parts(events: list[Json], lines: list[Json], **more: Any) -> dict[str, float]:
    value = account(timeline(events, lines, **more))
    assert sum(value["seconds"].values()) == pytest.approx(value["wall_seconds"])
    return {name: seconds for name, seconds in value["seconds"].items() if seconds}


WHOLE = [
    event(100.2, "launched", started=100),
    event(101, "attempt", 1),
    event(105, "setup", 1),
    event(110, "first_step", 1, step=1, seconds=3.0, data_seconds=1.0),  # its batch was there at 108
    event(113, "checkpoint_started", 1, step=2, stall_seconds=1.0),
    event(118, "evaluation", 1, step=4, seconds=1.5),
    event(120, "trained", 1, step=4),
    event(124, "exported", 1, seconds=3.0),
    event(125, "finished", 1, exit_code=0),
]


def test_a_run_without_trouble() -> None:
    lines = [step(110, 1), step(112, 2), step(114.5, 3), step(116.5, 4)]
    assert parts(WHOLE, lines) == {
        "start": 5.0,
        "load": 3.0,
        "useful": 7.5,  # 108 to 116.5, without the second of the save
        "checkpoint": 3.0,  # and after the evaluation, until the last one was written
        "evaluation": 1.5,
        "export": 3.0,
        "shutdown": 2.0,
    }


def test_the_start_of_a_launch_is_not_known_to_old_ledgers() -> None:
    assert parts(WHOLE[1:], [step(110, 1)])["start"] == 4.0


def failing(last: int = 4) -> list[Json]:
    return [
        event(0, "submitted", job_id="7"),
        event(60, "attempt", 1),
        event(70, "first_step", 1, step=1),
        event(74, "checkpoint_started", 1, step=2, stall_seconds=0.5),
        event(81, "failure", 1, step=last),
        event(82, "attempt", 2),
        event(90, "first_step", 2, step=3),
        event(94, "trained", 2, step=4),
        event(95, "finished", 2),
    ]


def test_steps_made_again_are_not_useful() -> None:
    lines = [step(70, 1), step(73, 2), step(75, 3), step(77, 4), step(90, 3), step(92, 4)]
    found = parts(failing(), lines)
    assert found == {
        "queue": 60.0,
        "start": 10.0 - 2.0 + 8.0 - 2.0,
        "useful": 2.0 + 3.0 + 2.0 + 2.0 + 0.5,  # steps 1, 2, 3, 4, and from step 2 to its save, which is no stall
        "checkpoint": 0.5 + 2.0,
        "repeated": 3.0,
        "recovery": 81 - 77 + 1.0,
        "shutdown": 1.0,
    }
    value = account(timeline(failing(), lines))
    assert value["ettr"] == pytest.approx(9.5 / 35)
    assert value["ratio"] == pytest.approx(9.5 / 95)


def test_sparse_logs() -> None:
    """Steps 1, 10 and 20 are logged; steps 16 to 20 were lost."""
    lines = [step(70, 1), step(80, 11), step(90, 21)]
    events = [event(60, "attempt", 1), event(70, "first_step", 1, step=1, seconds=1.0), event(95, "failure", 1)]
    events += [event(96, "attempt", 2), event(99, "first_step", 2, step=16, seconds=1.0), event(100, "stopped", 2)]
    found = parts(events, lines)
    assert found["repeated"] == pytest.approx(6.0)
    assert found["useful"] == pytest.approx(1.0 + 10.0 + 4.0 + 1.0)


def test_waiting_for_the_save_before_is_no_training() -> None:
    events = [event(0, "attempt", 1), event(2, "first_step", 1, step=1, seconds=1.0), event(30, "stopped", 1)]
    events.append(event(20, "checkpoint_postponed", 1, step=2, seconds=4.0))
    assert parts(events, [step(2, 1), step(20, 2), step(30, 3)]) == {"start": 1.0, "useful": 25.0, "checkpoint": 4.0}


def test_a_rollback_makes_steps_repeated_too() -> None:
    events = [event(0, "attempt", 1), event(2, "first_step", 1, step=1, seconds=1.0)]
    events += [event(8, "rollback", 1, step=4, to_step=2), event(20, "stopped", 1)]
    lines = [step(2, 1), step(3, 2), step(4, 3), step(5, 4), step(9, 3), step(10, 4)]
    found = parts(events, lines)
    assert (found["useful"], found["repeated"], found["recovery"]) == (4.0, 2.0, 3.0)


def test_time_between_launches_is_idle_and_between_jobs_queue() -> None:
    first = [event(0, "attempt", 1, job_id="7"), event(10, "stopped", 1, exit_code=75)]
    again = [event(100, "attempt", 2, job_id="7"), event(105, "stopped", 2, exit_code=143)]
    assert parts([*first, *again], [])["idle"] == 90.0
    assert parts([*first, *again], [], verdicts=[{"attempt": 1, "requeue": True}])["queue"] == 90.0
    waiting = parts(first, [], verdicts=[{"attempt": 1, "requeue": True}], now=50.0)
    assert waiting["queue"] == 40.0


@pytest.mark.parametrize(("job", "part"), [("7", "recovery"), (None, "idle")])
def test_a_supervisor_that_was_killed(job: str | None, part: str) -> None:
    """It lasted to its last sign of life; the scheduler starts its job again, or a person the run."""
    name = {"job_id": job} if job else {}
    events = [event(0, "attempt", 1, **name), event(5, "first_step", 1, step=1, seconds=1.0)]
    events += [event(100, "launched", started=99), event(101, "attempt", 2, **name), event(110, "finished", 2)]
    found = parts(events, [step(5, 1), step(9, 2)])
    assert found[part] == 90.0
    assert found["useful"] == 5.0


def test_a_run_that_is_under_way() -> None:
    events = [event(0, "attempt", 1), event(5, "first_step", 1, step=1, seconds=1.0)]
    assert parts(events, [step(5, 1)], now=20.0) == {"start": 4.0, "useful": 16.0}
    assert parts(events, [step(5, 1)]) == {"start": 4.0, "useful": 1.0}
    assert parts([event(0, "submitted")], [], now=9.0) == {"queue": 9.0}
    assert timeline([], []) == []
    assert account([])["ettr"] is None


def test_a_submission_told_after_its_job_has_begun() -> None:
    events = [
        event(10, "launched", started=10),
        event(11, "submitted"),
        event(12, "attempt", 1),
        event(20, "failed", 1),
    ]
    assert parts(events, []) == {"start": 10.0}


def test_times_of_failures() -> None:
    drilled = sorted([*failing(), event(78, "drill", 1, fault="kill-rank")], key=lambda e: e["time"])
    found = failure_times(drilled)[1]
    assert found == {"time": 81, "injected": "kill-rank", "detection_seconds": 3, "recovery_seconds": 9}
    told = [{**e, "noticed": 80} if e["event"] == "failure" else e for e in drilled]  # then the others were ended
    assert failure_times(told)[1] == found | {"time": 80, "detection_seconds": 2, "recovery_seconds": 10}
    assert failure_times(failing()[:5])[1]["recovery_seconds"] is None
    assert failure_times(failing())[1]["injected"] is None


NAMES = ["submitted", "launched", "attempt", "setup", "first_step", "checkpoint_started", "evaluation", "rollback"]
NAMES += ["failure", "stopped", "trained", "exported", "finished", "failed", "drill", "warning", "nonsense"]
times = st.floats(0, 1e6)
steps = st.integers(0, 30)
some_events = st.builds(
    lambda time, name, attempt, number, seconds: event(
        time, name, attempt, step=number, to_step=max(number - 3, 0), seconds=seconds, stall_seconds=seconds
    ),
    times,
    st.sampled_from(NAMES),
    st.integers(1, 4),
    steps,
    st.floats(0, 1e4),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(some_events, max_size=40),
    st.lists(st.builds(step, times, steps, st.floats(0, 1e4)), max_size=40),
    st.none() | st.floats(0, 2e6),
)
def test_parts_add_up_whatever_the_ledger_says(events: list[Json], lines: list[Json], now: float | None) -> None:
    """Clocks that differ, writers that died, events in any order: no second is lost, none counted twice."""
    spans = timeline(events, lines, (), now)
    assert all(one.end == other.start and one.start < one.end for one, other in pairwise(spans))
    value = account(spans)
    assert set(value["seconds"]) == set(PARTS)
    assert all(seconds >= 0 for seconds in value["seconds"].values())
    assert sum(value["seconds"].values()) == pytest.approx(value["wall_seconds"], rel=1e-9, abs=1e-6)
    launches = [e["time"] for e in events if e["event"] in ("submitted", "launched", "attempt", "failure", "finished")]
    if launches:
        whole = max([now or 0.0, *(e["time"] for e in events), *(line["time"] for line in lines)]) - min(launches)
        assert value["wall_seconds"] >= whole - 1e-6
