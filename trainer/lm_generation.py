"""The loss of a causal language model together with what it generates from the samples' prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.sample import PackedSequence
from trainer.engine import Engine
from trainer.forward import LanguageModelLoss
from trainer.generation import Generator, Prompt
from trainer.tasks.base import Predictions

if TYPE_CHECKING:
    from trainer.tasks.writing import WritingCausalLM


class WritingLoss(LanguageModelLoss):
    """As LanguageModelLoss; predictions are generated texts."""

    def __init__(
        self, task: WritingCausalLM, model: Any, pad_id: int | None, attention: str, device: torch.device, *more: bool
    ) -> None:
        super().__init__(model, pad_id, attention, device, *more)
        self._task = task
        self._generator = Generator(model, task.generation, task.tokenizer, device)

    def predict(self, engine: Engine, sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, Predictions]:
        """(sum of the loss over target tokens, what was generated)."""
        return self(engine.forward, sequences)[0], self.answer(engine, sequences)

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        """What was generated from each sample that is whole (pieces of long ones have no prompt of their own)."""
        samples = [s for sequence in sequences for s in sequence.samples if s.reference is not None]
        origins = [sample.origin or (0, 0, 0) for sample in samples]
        prompts = [
            Prompt(sample.tokens[: self._task.prompt_length(sample)], origin)
            for sample, origin in zip(samples, origins, strict=True)
        ]
        texts = self._generator(engine, prompts)
        written = [self._task.written(sample, of) for sample, of in zip(samples, texts, strict=True)]
        return list(zip(origins, written, strict=True))
