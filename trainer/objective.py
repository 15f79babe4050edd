"""From padded samples to a summed loss and predictions, for models with a head that reads a whole sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.sample import PackedSequence, Sample
from trainer.engine import Engine
from trainer.tasks.base import Objective, Predictions
from trainer.tasks.encoder import EncoderTask, HeadTask

_PAD_TO = 8  # tokens; matrix kernels like it, and CPU kernels are kept for every shape that they meet

_TYPES = ("xlnet", "funnel")  # models that tell the texts of a pair apart without a table of types


class EncoderObjective(Objective):
    """The loss and the predictions of a `HeadTask` on a model.

    Args:
        model: its forward pass tells which inputs it takes.
        task: computes the loss from the model's output.
        device: of the model.
    """

    def __init__(self, model: Any, task: HeadTask, device: torch.device) -> None:
        self._task, self._device = task, device
        # by its own padding token, and not by the mask, a decoder's head finds the last token of a text
        self._pad_id = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
        # heads look for what every row has: BART's and T5's for the end, Longformer's for what is between two texts
        special = task.encode_texts([("", "")])[0].ids if isinstance(task, EncoderTask) else []
        end = getattr(model.config, "eos_token_id", None)
        self._blank = np.array(special or [end if isinstance(end, int) else self._pad_id], dtype=np.int32)
        accepted = set(inspect.signature(model.forward).parameters)
        if getattr(model.config, "type_vocab_size", 0) < 2 and model.config.model_type not in _TYPES:
            accepted.discard("token_type_ids")  # which GPT-2 and its like look up as further tokens
        self._accepted = frozenset(accepted)

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        samples = [sample for sequence in sequences for sample in sequence.samples]
        inputs, padded = self.collate(samples)
        output = forward(**inputs)
        return self._loss(output, samples), padded

    def predict(self, engine: Engine, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, Predictions]:
        samples = [sample for sequence in sequences for sample in sequence.samples]
        output = engine.forward(**self.collate(samples)[0])
        found = self._task.read(output, samples) if samples else []
        origins = [sample.origin or (0, 0, 0) for sample in samples]
        return self._loss(output, samples), list(zip(origins, found, strict=True))

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        samples = [sample for sequence in sequences for sample in sequence.samples]
        found = self._task.read_answers(engine.forward(**self.collate(samples)[0]), samples)
        return [(sample.origin or (0, 0, 0), item) for sample, item in zip(samples, found, strict=True)]

    def collate(self, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], int]:
        """(inputs of the model; tokens of padding); rows of padding for no samples.

        Inputs are int64 [samples, longest rounded up], or [samples, choices, longest rounded up] of a task that
        chooses; samples with fewer choices than others then repeat their first one.
        """
        parts = [sample.split(sample.tokens) for sample in samples] or [
            [self._blank] * (2 if self._task.chooses else 1)
        ]
        choices = max(map(len, parts))
        rows = _even(parts, choices)
        inputs = {"input_ids": padded(rows, self._pad_id), "attention_mask": padded([np.ones(len(r)) for r in rows], 0)}
        more: Mapping[str, np.ndarray] = (samples[0].inputs or {}) if samples else {}
        for name in self._accepted & more.keys():
            parts = [sample.split(sample.inputs[name]) for sample in samples if sample.inputs]
            inputs[name] = padded(_even(parts, choices), 0)
        filled = inputs["input_ids"].size - sum(len(sample.tokens) for sample in samples)
        shape = (-1, choices) if self._task.chooses else (-1,)
        return {
            name: torch.from_numpy(values.reshape(*shape, values.shape[-1])).to(self._device, non_blocking=True)
            for name, values in inputs.items()
        }, filled

    def _loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        if samples:
            return self._task.loss(output, samples)
        # reaches every parameter, so that ranks without work take part in the same collectives
        values = [value for value in output.values() if isinstance(value, torch.Tensor)]
        return torch.stack([value.float().sum() for value in values]).sum() * 0.0


def _even(parts: Sequence[Sequence[np.ndarray]], choices: int) -> list[np.ndarray]:
    """All rows of samples; those with fewer than ``choices`` repeat their first one."""
    return [part[i] if i < len(part) else part[0] for part in parts for i in range(choices)]


def padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """int64 [rows, longest rounded up]: rows of different lengths, filled up with ``value``."""
    width = -(-max(map(len, rows)) // _PAD_TO) * _PAD_TO
    result = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result
