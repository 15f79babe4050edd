"""Real runs of two ranks in which one hangs: found in time, named, its stack saved, and made good by a retry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import STEPS, figures, make_run

from launcher import hangs
from launcher.backends.local import LocalBackend
from launcher.supervisor import Result, Supervisor
from trainer.config.schema import ResilienceConfig
from trainer.heartbeat import read
from trainer.lease import acquire
from trainer.processes import kill_run, processes_of_run
from trainer.rundir import RunDirectory, read_json

pytestmark = pytest.mark.faults

HERE = str(Path(__file__).parent)


def supervise(run: RunDirectory, hang: str) -> Result:
    variables = {"PYTHONPATH": HERE, "HANG": hang, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    backend = LocalBackend(run, 2, variables, worker_module="hanging_worker")
    with acquire(run.lock_dir, lease_seconds=5.0, renew_seconds=1.0) as lease:
        return Supervisor(run, backend, ResilienceConfig(), lease).supervise()


def verdict_of(run: RunDirectory, attempt: int, rank: int, step: int) -> dict[str, Any]:
    """The verdict on an attempt in which `rank` hung; it was found in time."""
    verdict: dict[str, Any] = read_json(run.verdict_path(attempt))
    assert (verdict["class"], verdict["rank"], verdict["step"]) == ("hang", rank, step), verdict
    assert (verdict["action"], verdict["victims"]) == ("retry", [1 - rank])
    (found,) = (e for e in run.merged_events() if e["event"] == "hang" and e["attempt"] == attempt)
    seconds = found["time"] - float((run.attempt_dir(attempt) / "hung").read_text())
    print(f"{verdict['message']}: found after {seconds:.1f} s, limit {found['limit_seconds']:.1f} s")
    assert seconds < 1.5 * found["limit_seconds"]
    return verdict


def test_a_rank_asleep_and_a_suspended_one_are_named_and_made_good(
    workspace: Path, finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangs, "FLOOR_SECONDS", 12.0)  # found 2 s and a tenth later; the rest is for a busy machine
    run = make_run(tmp_path / "run", workspace, 2)
    try:
        result = supervise(run, "1:6:sleep 0:10:suspend")
        assert processes_of_run(run.path) == []
    finally:
        kill_run(run.path)
    assert (result.verdict.outcome, result.attempts) == ("finished", 3)
    assert run.step_lines()[-1]["step"] == STEPS
    assert figures(run) == figures(finished)

    last = [read(run.heartbeat_path(3, rank)) for rank in (0, 1)]
    assert [(beat.phase, beat.step) for beat in last if beat] == [("ended", STEPS)] * 2
    assert last[0] is not None
    assert last[1] is not None
    assert last[0].probes == last[1].probes > 2
    assert last[0].own_data_seconds > 0

    asleep = verdict_of(run, 1, rank=1, step=6)
    assert "did not enter collective" in asleep["message"]
    assert "wait_for_a_lock_that_nobody_frees (hanging_worker.py" in asleep["message"]
    assert "wait_for_a_lock_that_nobody_frees" in asleep["traceback"].splitlines()[0]
    assert "wait_for_a_lock_that_nobody_frees" not in run.stack_path(1, 0).read_text()  # the victim waits elsewhere

    suspended = verdict_of(run, 2, rank=0, step=10)
    assert "no sign of life" in suspended["message"]
    assert "rank 0 could not write its stack" in suspended["evidence"]
    assert "train.py" in run.stack_path(2, 1).read_text()
    # what the kernel said is known though the agent was killed
    assert [len(run.agent_reports(attempt)) for attempt in (1, 2, 3)] == [1, 1, 1]
