"""From packed sequences to a summed loss, for language models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.attention import VARLEN, sample_bounds, takes_one_row
from trainer.data.sample import PackedSequence, Sample
from trainer.engine import Engine
from trainer.failures import UserError, classify
from trainer.loss import IGNORED, LabelledPositions, cross_entropy_sum, filled_up
from trainer.parameters import whole_shape
from trainer.sequence_parallel import SequenceParallel
from trainer.tasks.base import Objective

# Tokens. Matrix kernels like multiples of 8, and the CPU's keep a compiled one and its workspace for every shape they
# meet: without coarser steps memory grows with every batch.
_PAD_TO = 8  # 64 for rows longer than that
# Tokens of the rows that a model is tried on, without padding (DeepSeek-V4 sums up 128 at a time); of these, tokens of
# the sample before, and those at the end of its own.
_FEW, _MANY, _BEFORE, _CHANGED = 15, 256, 7, 4
_OTHERS = ((2, 6), (3, 7))  # tokens before and at the end in place of 1 and 5


@dataclass(frozen=True)
class LanguageModelBatch:
    """One micro-batch of token sequences.

    Attributes:
        input_ids: int64 [rows, length].
        position_ids: int64 [rows, length]; they restart at 0 with every sample. transformers builds the block-diagonal
            causal mask from them, and only where no attention_mask is passed.
        positions: int64 [targets]; where in the flattened rows a label is predicted.
        labels: int64 [targets]; IGNORED where the list is filled up to a round length.
        padded_tokens: tokens of ``input_ids`` that are padding; of the whole rows in the first of several shards.
        whole_position_ids: as ``position_ids``; of the whole rows where these are cut into shards.
        bounds: of the samples, where all are in one row: see `attention.sample_bounds`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    padded_tokens: int
    whole_position_ids: torch.Tensor
    bounds: dict[str, Any]


def collate(
    sequences: Sequence[PackedSequence],
    pad_id: int,
    one_row: bool,
    device: torch.device,
    shard: int = 0,
    shards: int = 1,
    row_length: int = 1,
) -> LanguageModelBatch:
    """Rows of a micro-batch, padded to the longest one, or all of it in one row without padding (``one_row``).

    Of several ``shards`` it is number ``shard``: every row is cut into as many equally long pieces.

    Padding continues the positions of a row's last sample: it attends backwards only, nothing attends to it, and a row
    with one sample keeps the plain causal mask. Without sequences (a rank with less work than the others) the
    batch is one row of padding without labels. The width is a multiple of ``row_length``.
    """
    rows = [list(sequence.samples) for sequence in sequences]
    if one_row:
        rows = [[sample for row in rows for sample in row]]
    lengths = [sum(len(sample.tokens) for sample in row) for row in rows]
    width = max(lengths, default=0)
    step = 1
    if not (one_row and width):
        step = 8 * _PAD_TO if width > 8 * _PAD_TO else _PAD_TO
    step = math.lcm(step, shards, row_length)
    width = max(-(-width // step), 1) * step
    shape = (max(len(rows), 1), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.tile(np.arange(width, dtype=np.int64), (shape[0], 1))
    grid = np.full(shape, IGNORED, dtype=np.int64)  # labels
    for index, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.tokens)
            input_ids[index, start:end] = sample.tokens
            position_ids[index, start:] = np.arange(width - start)
            grid[index, start : end - 1] = np.where(sample.targets[1:], sample.tokens[1:], IGNORED)
            start = end
    piece = slice(shard * width // shards, (shard + 1) * width // shards)
    labels = grid[:, piece].ravel()
    positions = np.flatnonzero(labels != IGNORED)
    positions, labels = filled_up(positions, labels[positions])
    whole = torch.from_numpy(position_ids).to(device, non_blocking=True)
    return LanguageModelBatch(
        torch.from_numpy(np.ascontiguousarray(input_ids[:, piece])).to(device, non_blocking=True),
        whole[:, piece].contiguous(),
        torch.from_numpy(positions).to(device, non_blocking=True),
        torch.from_numpy(labels).to(device, non_blocking=True),
        shape[0] * width - sum(lengths) if shard == 0 else 0,
        whole,
        sample_bounds(position_ids, device) if one_row else {},
    )


class LanguageModelLoss(Objective):
    """Runs a causal language model on micro-batches and sums the loss of their target tokens.

    With ``parallel`` the ranks of a group are given the same micro-batch, and each sums the loss of its part of it.
    ``row_length`` is what rows are filled up to a multiple of, where shapes had better be constant; ``longest``: tokens
    of the longest sequence.
    A model that cannot have head and loss as one (``fused``) is refused with ``insists``, and has logits without.
    """

    parallel: SequenceParallel | None = None
    row_length = 1
    longest = _MANY

    def __init__(
        self,
        model: Any,
        pad_id: int | None,
        attention: str,
        device: torch.device,
        packing: bool = True,
        fused: bool = False,
        insists: bool = True,
    ) -> None:
        self._model, self._packing = model, packing
        self.head_parameters = math.prod(whole_shape(model.get_output_embeddings().weight))
        self._attention = attention
        self._head = LabelledPositions(model)
        self._fused, self._insists = fused, insists
        if fused and (problem := self._head.fuse()):
            self._leave_logits(problem)
        self._pad_id = 0 if pad_id is None else pad_id  # never attended to, never a label: any id will do
        self._one_row = takes_one_row(attention)
        self._device = device

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        """(sum of the loss over target tokens, fp32 scalar; padded tokens)."""
        shard, shards = (0, 1) if self.parallel is None else (self.parallel.shard, self.parallel.shards)
        batch = collate(sequences, self._pad_id, self._one_row, self._device, shard, shards, self.row_length)
        if self.parallel is not None:
            self.parallel.begin(batch.whole_position_ids)
        bounds = batch.bounds if self._attention == VARLEN else {}
        with self._head.only(batch.positions, batch.labels if self._fused else None):
            output = forward(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **bounds)
        loss = output.logits if self._fused else cross_entropy_sum(output.logits, batch.labels)
        return loss, batch.padded_tokens

    def check(self, engine: Engine) -> None:
        """That the ranks of a group compute together what one computes alone, and that tokens see what they may."""
        if self.parallel is not None:
            self.check_shards(engine, self.parallel)
        loss = self.check_sight(engine)
        if self._fused:
            self.check_fused(engine, loss)

    def check_shards(self, engine: Engine, parallel: SequenceParallel) -> None:
        """Prove on the model itself that slices of a sequence give the loss of the whole.

        Raises:
            UserError: they do not: the model mixes tokens by other means than attention.
        """
        length = 8 * parallel.size
        samples = [
            Sample(np.arange(first, first + length, dtype=np.int32) % length, np.arange(length) > 0)
            for first in (1, 5, 9)
        ]
        try:
            together = self._probe(engine, samples)
        except RuntimeError as error:
            if classify(error) != "unknown":
                raise
            raise UserError(
                f"{type(self._model).__name__} with {self._attention} attention cannot be run by {parallel.size} ranks "
                f"that share its sequences ({error}): leave out model.sequence_parallel"
            ) from error
        with parallel.whole():
            alone = self._probe(engine, samples)
        if self._differ(together, alone):
            raise UserError(
                f"{type(self._model).__name__} with {self._attention} attention gives another loss ({together:.4f}, "
                f"not {alone:.4f}) when {parallel.size} ranks share its sequences: leave out model.sequence_parallel"
            )

    def _leave_logits(self, problem: str) -> None:
        if self._insists:
            raise UserError(f"model.fused_loss does not go here: {problem}; set it to false")
        print(f"model.fused_loss: left out: {problem}", flush=True)
        self._fused = False

    def check_fused(self, engine: Any, fused: float) -> None:
        """Prove on the model itself that the fused loss, as `check_sight` found it, is that of its logits.

        Raises:
            UserError: it is not, and the config insists on it.
        """
        self._fused = False
        plain = self._loss_of_few(engine, 1, 5)
        if self._differ(fused, plain):
            name = type(self._model).__name__
            self._leave_logits(f"{name} changes the logits after its head (a loss of {fused:.4f}, not {plain:.4f})")
        else:
            self._fused = True
            print("model.fused_loss: head and loss work as one", flush=True)

    def _differ(self, loss: float, expected: float) -> bool:
        """By more than rounding in the model's dtype."""
        dtype = next(self._model.parameters()).dtype
        return abs(loss - expected) > (1e-4 if dtype == torch.float32 else 2e-2) * abs(expected)

    def _probe(self, engine: Engine, samples: Sequence[Sample]) -> float:
        """The loss of one packed sequence of these samples."""
        loss = float(self(engine.probe, [PackedSequence(tuple(samples))])[0].detach())
        return loss if self.parallel is None else self.parallel.sum(loss)

    def _loss_of_few(self, engine: Any, before: int, after: int, length: int = _FEW) -> float:
        """The loss of some of the tokens of a sample, with these tokens in the sample before it and at its own end.

        In all ``length`` tokens. Those with a loss are its first ones, and the last ones before its end: few, so that
        each of them counts.
        """
        same = length - _BEFORE - _CHANGED
        tokens = np.append(1 + np.arange(same) % 4, np.full(_CHANGED, after)).astype(np.int32)
        targets = np.zeros(len(tokens), dtype=bool)
        targets[1:4] = targets[max(same - 4, 1) : same] = True
        samples = [Sample(tokens, targets)]
        if self._packing:
            samples.insert(0, Sample(np.full(_BEFORE, before, dtype=np.int32), np.zeros(_BEFORE, dtype=bool)))
        return self._probe(engine, samples)

    def check_sight(self, engine: Any) -> float:
        """Prove on the model itself that a token sees neither what comes after it nor the samples beside its own.

        The loss of a sample's tokens must not move when the sample before it and its own last tokens change: of a short
        one, where the change weighs much, and of a long one, since what a model sums up over many tokens comes late;
        twice, since one change may weigh next to nothing.
        Some architectures ignore restarting position ids and would mix samples in silence; encoders (BERT) also load as
        causal language models, see the answer and learn to copy it. Returns the loss of the short one.

        Raises:
            UserError: it sees them.
        """
        name = type(self._model).__name__
        both_ways = _reads_both_ways(self._model.config.get_text_config())
        few = self._loss_of_few(engine, 1, 5)
        for length in sorted({_FEW, max(min(self.longest, _MANY), _FEW)}):
            expected = few if length == _FEW else self._loss_of_few(engine, 1, 5, length)
            changed = (self._loss_of_few(engine, *tokens, length) for tokens in _OTHERS)
            if not both_ways and all(_same(expected, loss) for loss in changed):
                continue
            if both_ways or not _same(expected, self._loss_of_few(engine, 1, 6, length)):
                raise UserError(
                    f"{name} lets tokens see those that come after them, and would learn to copy them: causal-lm takes "
                    "a decoder; train an encoder with another task"
                )
            raise UserError(
                f"{name} with {self._attention} attention lets packed samples attend to one another: set data.packing "
                "to false, or choose another model.attention"
            )
        return few


def _reads_both_ways(config: Any) -> bool:
    """Whether a transformers config asks for attention that is not causal, which not every implementation heeds."""
    asked = getattr(config, "use_bidirectional_attention", None)
    return getattr(config, "is_causal", True) is False or asked is True or asked == "all"  # or of images alone


def _same(loss: float, other: float) -> bool:
    return abs(loss - other) <= 1e-6 * abs(loss)
