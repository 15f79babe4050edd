"""The loss of a causal language model together with what it generates from the samples' prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.sample import PackedSequence
from trainer.engine import Engine
from trainer.forward import LanguageModelLoss
from trainer.generation import Generator
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
        self._generator = Generator(model, task.settings.generation, task.tokenizer, device)

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        """What was generated from each sample that is whole (pieces of long ones have no prompt of their own)."""
        samples = [s for sequence in sequences for s in sequence.samples if s.reference is not None]
        task = self._task
        return self._generator.answers(engine, samples, lambda s: s.tokens[: task.prompt_length(s)], task.written)
