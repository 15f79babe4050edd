"""Scores of the evaluation data, the same at any number of ranks, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.collectives import sum_step
from trainer.config.schema import DataSource, EvaluationConfig, LaunchConfig
from trainer.data.stream import BatchStream, GlobalBatch, build_evaluation_stream
from trainer.engine import Engine
from trainer.failures import UserError
from trainer.tasks.base import BaseTask, Objective, Predictions

BEST, OVER = 1, 2  # flags: to be saved as the best so far; not getting better any more


def evaluation_streams(config: LaunchConfig, task: BaseTask, **options: Any) -> dict[str | None, BatchStream]:
    """A stream for the evaluation sources of each name; see build_evaluation_stream for the options."""
    sets: dict[str | None, tuple[DataSource, ...]] = {}
    for source in config.data.evaluation:
        sets[source.name] = (*sets.get(source.name, ()), source)
    return {name: build_evaluation_stream(config, task, sources=of, **options) for name, of in sets.items()}


def evaluate(
    engine: Engine,
    task: BaseTask,
    objective: Objective,
    sets: Mapping[str | None, Iterable[GlobalBatch]],
    group: Any,
) -> dict[str, float]:
    """Mean loss (over targets), the task's scores on rank 0, and the number of targets, over one pass of all data.

    Sets that have a name are scored by themselves as well, as ``name/metric``.
    """
    parts: list[tuple[float, int, Predictions]] = []
    named: dict[str, float] = {}
    engine.eval()
    with torch.no_grad(), engine.averaged():
        for name, batches in sets.items():
            parts.append(_pass(engine, task, objective, batches, group))
            if name is not None:
                named |= {f"{name}/{key}": value for key, value in _scores(task, *parts[-1]).items()}
    engine.train()
    everything = [item for _, _, found in parts for item in found]
    return {**_scores(task, sum(p[0] for p in parts), sum(p[1] for p in parts), everything), **named}


def _pass(
    engine: Engine, task: BaseTask, objective: Objective, batches: Iterable[GlobalBatch], group: Any
) -> tuple[float, int, Predictions]:
    """(loss sum, targets, predictions on rank 0) of one set, over all ranks."""
    total, targets = 0.0, 0
    predictions: Predictions = []
    for batch in batches:
        share = 0.0
        for micro_batch in batch.micro_batches:
            loss_sum, found = objective.predict(engine, micro_batch.sequences)
            share += float(loss_sum)
            predictions += found
        total += sum_step(group, share, 0, 0)[0]
        targets += batch.target_tokens
    return total, targets, gather_predictions(predictions, group) if task.predicts else []


def gather_predictions(predictions: Predictions, group: Any) -> Predictions:
    """Those of all ranks on rank 0, in the order of the data; nothing on the others."""
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(predictions, parts, group=group)
    return sorted((item for part in parts or [] for item in part), key=lambda item: item[0])


def _scores(task: BaseTask, total: float, targets: int, predictions: Predictions) -> dict[str, float]:
    mean = total / targets if targets else math.nan
    scores = task.scores(mean, predictions) if dist.get_rank() == 0 else {}
    return {"loss": mean, **scores, task.counted: targets}


def judge(settings: EvaluationConfig, lines: Sequence[Mapping[str, Any]], keeps_best: bool) -> int:
    """Flags BEST and OVER after the last one of a run's evaluations. Pure.

    Args:
        settings: names the metric, which way it is better, and the patience.
        lines: `RunDirectory.evaluation_lines`: {"step", "evaluation": scores}, in rising order of step.
        keeps_best: whether the best model is to be saved.

    Evaluations without the metric, of before it was chosen, are no better than any.

    Raises:
        UserError: the metric is none of the scores.
    """
    if lines and settings.metric not in lines[-1]["evaluation"]:
        raise UserError(
            f"evaluation.metric: there is no {settings.metric!r} among the scores {', '.join(lines[-1]['evaluation'])}"
        )
    sign = 1.0 if settings.maximise else -1.0
    values = [sign * float(line["evaluation"].get(settings.metric, math.nan)) for line in lines]
    best = max(range(len(values)), key=lambda i: (not math.isnan(values[i]), values[i], -i))
    flags = BEST * (keeps_best and best == len(values) - 1 and not math.isnan(values[best]))
    if settings.patience is not None and len(values) - 1 - best >= settings.patience:
        flags |= OVER
    return flags
