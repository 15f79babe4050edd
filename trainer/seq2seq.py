"""From sources and targets to a summed loss, and to generated texts, for encoder-decoder models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.models.bart.modeling_bart import shift_tokens_right

from trainer.data.sample import PackedSequence
from trainer.engine import Engine
from trainer.generation import Generator
from trainer.loss import IGNORED, LabelledPositions, cross_entropy_sum, filled_up
from trainer.objective import padded
from trainer.parameters import whole_shape
from trainer.tasks.base import Objective, Predictions

if TYPE_CHECKING:
    from trainer.tasks.seq2seq import SequenceToSequence


class SequenceToSequenceObjective(Objective):
    """The loss over target tokens and the texts that a model generates.

    Args:
        model: an encoder-decoder model with a language-model head.
        task: says what is generated, and decodes it.
        device: of the model.
    """

    def __init__(self, model: Any, task: SequenceToSequence, device: torch.device) -> None:
        self._model, self._task, self._device = model, task, device
        self.head_parameters = math.prod(whole_shape(model.get_output_embeddings().weight))
        self._head = LabelledPositions(model)
        self._pad = model.config.pad_token_id or 0
        self._blank = np.array([self._pad == 0], dtype=np.int32)  # no padding: MBart begins by the last other token
        settings = task.settings.generation
        self._generator = Generator(model, settings, task.tokenizer, device) if settings else None

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        """(sum of the loss over target tokens, fp32 scalar; padded tokens, of sources and targets)."""
        samples = [sample for sequence in sequences for sample in sequence.samples]
        sources = [sample.tokens[~sample.targets] for sample in samples] or [self._blank]
        targets = [sample.tokens[sample.targets] for sample in samples] or [self._blank]
        ids, mask = padded(sources, self._pad), padded([np.ones(len(row)) for row in sources], 0)
        labels = padded(targets, IGNORED if samples else self._pad)
        positions = np.flatnonzero(labels != IGNORED) if samples else np.zeros(0, dtype=np.int64)
        positions, flat = filled_up(positions, labels.reshape(-1)[positions])
        given = self._shifted(self._tensor(labels))
        with self._head.only(self._tensor(positions)):
            output = forward(
                input_ids=self._tensor(ids),
                attention_mask=self._tensor(mask),
                decoder_input_ids=given,
                use_cache=False,
            )
        filled = ids.size + labels.size - sum(len(sample.tokens) for sample in samples)
        return cross_entropy_sum(output.logits, self._tensor(flat)), filled

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        """What was generated from each source, as the task writes it down."""
        if self._generator is None:
            return []
        samples = [sample for sequence in sequences for sample in sequence.samples]
        return self._generator.answers(engine, samples, lambda s: s.tokens[~s.targets], self._task.written)

    def _shifted(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels moved to the right as the model's family does it: behind its start token, or its language's."""
        own = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        # M2M100 (NLLB), Blenderbot: in their forward pass alone, which would also compute a loss; it is BART's there
        start = self._model.config.decoder_start_token_id
        moved: torch.Tensor = own(labels=labels) if own else shift_tokens_right(labels, self._pad, start)
        return moved

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
