"""Scores of the evaluation data: (sum, count) over all ranks, so the result does not depend on their number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from trainer.collectives import sum_step
from trainer.data.stream import GlobalBatch
from trainer.engine import Engine
from trainer.forward import LanguageModelLoss


def evaluate(engine: Engine, loss: LanguageModelLoss, batches: Iterable[GlobalBatch], group: Any) -> dict[str, float]:
    """Mean loss (nats per target token), perplexity, and the number of target tokens, over one pass of the data."""
    total, targets = 0.0, 0
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            share = 0.0
            for micro_batch in batch.micro_batches:
                loss_sum, _ = loss(engine.forward, micro_batch.sequences)
                share += float(loss_sum)
            total += sum_step(group, share, 0, 0)[0]
            targets += batch.target_tokens
    engine.train()
    mean = total / targets if targets else math.nan
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "target_tokens": targets}
