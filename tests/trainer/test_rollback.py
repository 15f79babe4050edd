"""Going back behind bad steps: real runs that leave out exactly the offending batches, also over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import poisoned_worker
import pytest
from training_runs import launch, logs, make_run

from trainer.config.schema import EvaluationConfig, LossSpikeConfig, TrainingConfig
from trainer.evaluation import BEST, OVER, judge
from trainer.failures import UserError
from trainer.rundir import RunDirectory
from trainer.spikes import cause_to_go_back, is_spike, rollbacks_of

pytestmark = pytest.mark.faults

WORKER = (poisoned_worker.__file__,)


def test_a_metric_that_was_chosen_later_is_judged_from_there_on() -> None:
    settings = EvaluationConfig(metric="math/loss", patience=2)
    lines = [{"step": step, "evaluation": {"loss": 1.0}} for step in (1, 2, 3)]
    with pytest.raises(UserError, match=r"no 'math/loss' among the scores loss"):
        judge(settings, lines, True)
    lines.append({"step": 4, "evaluation": {"loss": 1.0, "math/loss": 0.5}})
    assert judge(settings, lines, True) == BEST
    lines += [{"step": step, "evaluation": {"math/loss": 0.6}} for step in (5, 6)]
    assert judge(settings, lines, True) == OVER


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> list[str]:
    """Of global batches 0, 1, ... without any trouble."""
    run = make_run(tmp_path_factory.mktemp("runs") / "clean", workspace, 1, max_steps=15)
    assert launch(run, 1) == 0, logs(run)
    return digests_of(run)


def digests_of(run: RunDirectory) -> list[str]:
    return [line["batch_digest"] for line in run.step_lines()]


def rollbacks(run: RunDirectory) -> list[tuple[Any, ...]]:
    keys = ("reason", "step", "to_step", "skipped_batches")
    return [tuple(e[key] for key in keys) for e in run.merged_events() if e["event"] == "rollback"]


def test_a_spike_is_left_behind_and_stays_so_after_a_kill(workspace: Path, digests: list[str], tmp_path: Path) -> None:
    """Step 10 has the spike: batches 8 and 9 are left out from step 8 on, though all ranks are killed at step 11."""
    run = make_run(tmp_path / "spike", workspace, 2, loss_spike={"window": 8, "threshold": 20.0})
    assert launch(run, 2, worker=WORKER, POISON="9:50", DIE_AT="11") != 0
    assert rollbacks(run) == [("loss_spike", 10, 8, [8, 9])], logs(run)
    assert launch(run, 2, 2, worker=WORKER, POISON="9:50") == 0, logs(run)
    assert rollbacks(run) == [("loss_spike", 10, 8, [8, 9])]
    assert digests_of(run) == digests[:8] + digests[10:14]
    assert max(line["loss"] for line in run.step_lines()) < 10


def test_a_batch_that_is_not_finite_is_left_out(workspace: Path, digests: list[str], tmp_path: Path) -> None:
    """While rank 0 waits for what rank 1 will learn from next."""
    run = make_run(tmp_path / "nan", workspace, 2, on_nonfinite="rollback")
    assert launch(run, 2, worker=WORKER, POISON="5:nan", SLOW="0.3") == 0, logs(run)
    assert rollbacks(run) == [("nonfinite", 6, 4, [5])]
    assert digests_of(run) == digests[:5] + digests[6:13]


def test_the_budget_ends_a_run_that_keeps_going_wrong(workspace: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "budget", workspace, 1, on_nonfinite="rollback", max_rollbacks=0)
    assert launch(run, 1, worker=WORKER, POISON="5:inf") != 0
    (record,) = run.failure_records(1)
    assert (record["class"], rollbacks(run)) == ("numeric", [])
    assert "global batches [5]" in record["message"]


def test_spikes_are_judged_by_median_and_mad() -> None:
    config = LossSpikeConfig(window=8, threshold=5.0)
    history = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1]  # median 2, MAD 0.1: the line is at 2 + 5 * 0.14826
    assert not is_spike(history, 2.74, config)
    assert is_spike(history, 2.75, config)
    assert not is_spike(history[:-1], 100.0, config)  # the window is not full
    assert is_spike([100.0, *history], 2.75, config)  # only the window counts
    assert is_spike([*history[:-1], 50.0], 3.0, config)  # an outlier in the window does not hide the next one
    assert not is_spike([2.0] * 8, 2.009, config)  # a flat loss: a thousandth of it is no noise
    assert is_spike([2.0] * 8, 2.011, config)


def test_what_is_done_about_steps_that_are_not_finite() -> None:
    def cause(policy: str, loss: float, applied: bool) -> Any:
        training = TrainingConfig.model_validate({"global_batch_size": 1, "max_steps": 1, "on_nonfinite": policy})
        return cause_to_go_back(training, [], loss, applied)

    assert cause("skip", float("nan"), False) is None
    assert cause("rollback", 1.0, True) is None
    assert cause("rollback", float("nan"), True).steps == 1
    assert cause("rollback", 1.0, False).reason == "nonfinite"


def test_the_ledger_tells_what_was_left_out() -> None:
    events = [{"event": "rollback", "skipped_batches": [3, 4]}, {"event": "attempt"}]
    assert rollbacks_of([*events, {"event": "rollback", "skipped_batches": [9]}]) == (2, frozenset({3, 4, 9}))
