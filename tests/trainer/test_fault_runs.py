"""Real runs of two ranks in which one computes NaN or raises: the same twice at a step ends a run, once does not.

`pytest -m matrix -s tests/trainer/test_fault_runs.py` prints a row of docs/failures.md for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_hang_runs import supervise
from training_runs import figures, make_run

from trainer.processes import kill_run, processes_of_run
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(600)]


@pytest.fixture
def run(tmp_path: Path, workspace: Path) -> Iterator[RunDirectory]:
    made = make_run(tmp_path / "run", workspace, 2, on_nonfinite="stop")
    yield made
    kill_run(made.path)


def exported(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.export_dir.glob("*.safetensors")}


def found_after(run: RunDirectory) -> float:
    """Seconds from the first fault to its verdict; asserts that nothing is left of the run."""
    assert processes_of_run(run.path) == []
    failed = next(event["time"] for event in run.merged_events() if event["event"] == "failure")
    return float(failed) - float((run.attempt_dir(1) / "hung").read_text())


@pytest.mark.parametrize(("kind", "failure_class"), [("nan", "numeric"), ("bug", "unknown")])
def test_what_does_not_come_again_is_made_good(
    run: RunDirectory, finished: RunDirectory, kind: str, failure_class: str
) -> None:
    result = supervise(run, f"1:6:{kind}")
    assert (result.verdict.outcome, result.attempts) == ("finished", 2)
    first = run.verdicts()[0]
    assert (first["class"], first["step"], first["action"]) == (failure_class, 6, "retry")
    assert figures(run) == figures(finished)
    assert exported(run) == exported(finished) != {}
    seconds = found_after(run)
    assert seconds <= 5
    print(f"| local | {kind} at step 7, once | {failure_class} (retry) | found after {seconds:.1f} s | 0 | 0 |")


@pytest.mark.parametrize(
    ("kind", "failure_class", "attempts", "code", "reason"),
    [
        ("nan", "numeric", 2, 1, "the same failure twice at the same step"),
        ("bug", "unknown", 2, 1, "the same failure twice at the same step"),
        ("user", "user", 1, 2, "a user error is never retried"),
    ],
)
def test_what_comes_every_time_ends_the_run(
    run: RunDirectory, kind: str, failure_class: str, attempts: int, code: int, reason: str
) -> None:
    result = supervise(run, f"1:6:{kind} 1:6:{kind} 1:6:{kind}")
    assert (result.attempts, result.action.exit_code, result.action.reason) == (attempts, code, reason)
    assert (result.verdict.failure_class, result.verdict.step) == (failure_class, 6)
    if kind != "nan":  # which is in the loss of all ranks
        assert result.verdict.rank == 1
        assert "train_step" in (result.verdict.traceback or "")
    seconds = found_after(run)
    assert seconds <= 5
    verdict = f"{failure_class} ({reason})"
    print(f"| local | {kind} at step 7, every time | {verdict} | found after {seconds:.1f} s | - | - |")
