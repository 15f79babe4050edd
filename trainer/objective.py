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
_LONG = 64  # tokens of the text that a short one is padded beside, to see what comes of that
# How much its hidden states may then move, in relation to their size. Seen of 70 families with random weights: up to
# 3e-7 in fp32 and 0.04 in bf16 of those that mask padding; 1e-3 (Nystromformer) to 1 (FNet) of the others.
_ROUNDING, _ROUNDING_16_BITS = 1e-4, 0.1

_TYPES = ("xlnet", "funnel")  # models that tell the texts of a pair apart without a table of types


class EncoderObjective(Objective):
    """The loss and the predictions of a `HeadTask` on a model.

    Args:
        model: its forward pass tells which inputs it takes.
        task: computes the loss from the model's output.
        device: of the model.
    """

    def __init__(self, model: Any, task: HeadTask, device: torch.device) -> None:
        self._model, self._task, self._device = model, task, device
        # by its own padding token, and not by the mask, a decoder's head finds the last token of a text
        self._pad_id = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
        # heads look for what every row has: BART's and T5's for the end, Longformer's for what is between two texts
        special = task.encode_texts([("", "")])[0].ids if isinstance(task, EncoderTask) else []
        end = getattr(model.config, "eos_token_id", None)
        known = isinstance(end, int) and end < getattr(model.config.get_text_config(), "vocab_size", 0)
        self._blank = np.array(special or [end if known else self._pad_id], dtype=np.int32)
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

    def check(self, engine: Engine) -> str | None:
        """Try on the model itself whether what it makes of a text depends on the padding behind the text.

        Families that convolve, pool or transform whole rows do not mask it: two passes, of a text alone and of the same
        beside a longer one. In 16 bits only what is larger than rounding is seen.
        """
        if not isinstance(self._task, EncoderTask):
            return None
        name, depend = type(self._model).__name__, "losses and scores depend on micro-batches and ranks"
        if getattr(self._model.config, "attention_type", None) == "block_sparse":  # BigBird; not to be tried
            return (
                f"block_sparse attention of {name} turns into full attention, for good, at the first micro-batch of "
                f"short texts: {depend}, unless config.json of the model has attention_type original_full"
            )
        short, long = (self._of_length(length) for length in (1, min(_LONG, self._task.config.data.sequence_length)))
        alone, beside = (self._hidden(engine, samples) for samples in ([short], [short, long]))
        if alone is None or beside is None:
            return None
        expected = alone.float()
        moved = float((beside[:, : alone.shape[1]].float() - expected).norm() / expected.norm())
        if moved <= (_ROUNDING if alone.dtype == torch.float32 else _ROUNDING_16_BITS):
            return None
        return (
            f"{name} does not mask padding: what it makes of a text moves by {moved:.2g} of its size beside a longer "
            f"one: {depend}, unless training.micro_batch_size is 1; most other families do not have this"
        )

    def _of_length(self, length: int) -> Sample:
        """A sample of this many tokens, rounded up, one of them over and over behind the first special one."""
        length = -(-max(length, len(self._blank)) // _PAD_TO) * _PAD_TO
        token = next(token for token in range(length) if token not in (*self._blank, self._pad_id))
        ids = np.insert(self._blank, 1, np.full(length - len(self._blank), token))
        rows = 2 if self._task.chooses else 1
        return Sample(np.tile(ids, rows), np.zeros(rows * length, dtype=bool), rows=(length,) * rows)

    def _hidden(self, engine: Engine, samples: Sequence[Sample]) -> torch.Tensor | None:
        """[1, length, width]: what the model makes of the first text, in front of its head; None: it does not tell."""
        found: list[Any] = []
        handle = self._model.base_model.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
        try:
            engine.probe(**self.collate(samples)[0])
        finally:
            handle.remove()
        return found[-1][:1] if found and found[-1].dim() == 3 else None

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
