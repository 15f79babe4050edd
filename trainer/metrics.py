"""metrics.jsonl and TensorBoard: what is reported is true, unrounded, and written once a step by rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.rundir import append_line, wall_time

_SCALARS = ("loss", "learning_rate", "grad_norm", "target_tokens_per_second", "tokens_per_second", "mfu")


class MetricsLog:
    """Appends lines to metrics.jsonl, and the same figures to TensorBoard.

    A line of a step holds: step, loss (mean over target tokens of the global batch, nats), learning_rate, grad_norm
    (before clipping), target_tokens, tokens (not padding), padded_tokens, step_seconds (with data_seconds, the wait for
    data), batch_digest, time (unix seconds), total_steps, progress (epochs), memory_bytes (peak, this rank), and mfu
    where the device's peak is known.
    """

    def __init__(self, path: Path, tensorboard: Path | None) -> None:
        self._path = path
        self._tensorboard = tensorboard
        self._writer: Any = None

    def step(self, line: dict[str, Any]) -> None:
        append_line(self._path, {**line, "time": wall_time()})
        seconds = line["step_seconds"]
        figures = {
            **line,
            "target_tokens_per_second": line["target_tokens"] / seconds,
            "tokens_per_second": line["tokens"] / seconds,
        }
        self._scalars("train", {name: figures.get(name) for name in _SCALARS}, line["step"])

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        append_line(self._path, {"step": step, "evaluation": scores, "time": wall_time()})
        self._scalars("evaluation", scores, step)

    def samples(self, step: int, shown: Sequence[Mapping[str, Any]], signatures: Mapping[str, str]) -> None:
        """What an evaluation generated, a line each, to samples.jsonl beside the metrics, and to TensorBoard."""
        for number, sample in enumerate(shown):
            append_line(self._path.with_name("samples.jsonl"), {"step": step, **sample, "signatures": dict(signatures)})
            if self._tensorboard is not None:
                text = json.dumps(dict(sample), ensure_ascii=False, indent=2)
                self._open(step).add_text(f"sample/{number}", f"```\n{text}\n```", step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items() if self._tensorboard is not None else ():
            if isinstance(value, int | float):
                self._open(step).add_scalar(f"{prefix}/{name}", value, step)

    def _open(self, step: int) -> Any:
        if self._writer is None:  # its import takes a while: not before the first step
            from torch.utils.tensorboard.writer import SummaryWriter

            # after a restart, steps from here on replace those of the attempt that was lost
            self._writer = SummaryWriter(str(self._tensorboard), purge_step=step)
        return self._writer
