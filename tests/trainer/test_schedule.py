"""The learning rate as a function of progress."""

from __future__ import annotations

import pytest

from trainer.config.schema import ScheduleConfig, TrainingConfig
from trainer.schedule import learning_rate, learning_rate_factor


def test_warmup_rises_by_equal_parts_to_the_peak() -> None:
    schedule = ScheduleConfig(type="cosine", warmup_steps=4, final_ratio=0.1)
    assert [learning_rate_factor(schedule, step, 0.0) for step in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "half"), [("constant", 1.0), ("linear", 0.2 + 0.8 * 0.5), ("cosine", 0.2 + 0.8 * 0.5)]
)
def test_decay(kind: str, half: float) -> None:
    schedule = ScheduleConfig(type=kind, final_ratio=0.2)  # type: ignore[arg-type]
    assert learning_rate_factor(schedule, 10, 0.5) == pytest.approx(half)
    assert learning_rate_factor(schedule, 1, 0.0) == 1.0
    end = 1.0 if kind == "constant" else 0.2
    assert learning_rate_factor(schedule, 99, 1.0) == pytest.approx(end)
    assert learning_rate_factor(schedule, 99, 1.5) == pytest.approx(end)


def test_cosine_is_flatter_than_linear_at_both_ends() -> None:
    cosine, linear = ScheduleConfig(type="cosine"), ScheduleConfig(type="linear")
    assert learning_rate_factor(cosine, 9, 0.1) > learning_rate_factor(linear, 9, 0.1)
    assert learning_rate_factor(cosine, 9, 0.9) < learning_rate_factor(linear, 9, 0.9)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_epochs_and_steps_are_the_same_schedule(kind: str) -> None:
    """And the decay goes on from the peak, whatever part of the training was the warm-up."""
    given = {"global_batch_size": 8, "schedule": {"type": kind, "warmup_steps": 12, "final_ratio": 0.1}}
    steps = TrainingConfig.model_validate({**given, "max_steps": 40})
    epochs = TrainingConfig.model_validate({**given, "epochs": 2.0})
    rates = [learning_rate(epochs, step, 2.0 * (step - 1) / 40) for step in range(1, 41)]
    assert rates == pytest.approx([learning_rate(steps, step, 0.0) for step in range(1, 41)])
    assert rates[11] == rates[12] == max(rates)
    # no warm-up; one that is longer than the training; the last documents were fewer
    plain = TrainingConfig.model_validate({**given, "epochs": 2.0, "schedule": {"type": kind}})
    assert learning_rate(plain, 1, 0.0) == plain.optimizer.learning_rate
    assert learning_rate(epochs, 13, 2.0) == pytest.approx(0.1 * epochs.optimizer.learning_rate)
    assert learning_rate(epochs, 45, 2.0) == pytest.approx(0.1 * epochs.optimizer.learning_rate)
