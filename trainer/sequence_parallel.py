"""Long sequences shared by the ranks of a group (Ulysses: Jacobs et al. 2023, arXiv 2309.14509).

The ranks of a group get the same micro-batch, and each a slice of its rows: of R ranks in a group, rank r holds tokens
[r T / R, (r + 1) T / R) of every row. All but attention works on tokens by themselves. Around attention an all-to-all
turns [rows, heads, T / R] of every rank into [rows, heads / R, T], and another one back. ZeRO knows nothing of groups:
parameters are cut over all ranks, and since the loss is a sum over tokens, summing gradients over all ranks is right.

DeepSpeed's UlyssesSPAttentionHF does the same but drops the mask under SDPA, so that packed samples would see one
another; here the mask of the whole sequence comes from transformers' own functions.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from trainer.failures import UserError

_PREFIX = "sequence_parallel_"
# Rotary embeddings that depend on the longest position they are called with, which is another one in every slice
_POSITIONS_OF_ALL = frozenset({"dynamic", "longrope"})
_OF_ATTENTION = frozenset({"full_attention", "sliding_attention"})  # whose masks are known here


class SequenceParallel:
    """Shares the attention of a model out among the ranks of each group, from now on.

    Args:
        model: of transformers, built; its attention implementation is replaced.
        size: ranks of a group, which are neighbours.
        timeout_seconds: of their collectives.

    Attributes:
        size, index: of the group, and this rank's place in it.

    Raises:
        UserError: the model cannot be run so.
    """

    def __init__(self, model: Any, size: int, timeout_seconds: float) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.size, self.index = size, rank % size
        for first in range(0, world_size, size):  # every rank makes every group
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout_seconds))
            if first <= rank < first + size:
                self._group = group
        self._on, self._position_ids = True, torch.zeros((1, 0), dtype=torch.int64)
        self._core = str(model.config._attn_implementation)
        _refuse(model.config.get_text_config(), size)
        from transformers import AttentionInterface, AttentionMaskInterface

        name = _PREFIX + self._core
        AttentionInterface.register(name, self._attention)
        AttentionMaskInterface.register(name, self._mask)
        model.set_attn_implementation(name)

    @property
    def shard(self) -> int:
        """Which piece of each row this rank runs."""
        return self.index if self._on else 0

    @property
    def shards(self) -> int:
        """Pieces of each row."""
        return self.size if self._on else 1

    def begin(self, position_ids: torch.Tensor) -> None:
        """A forward pass over slices follows. ``position_ids``: int64 [rows, whole length], on the model's device.

        They serve until the next call: recomputation in the backward pass needs them again.
        """
        self._position_ids = position_ids

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every rank runs whole sequences by itself."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def sum(self, value: float) -> float:
        """The sum of the ranks' values in this group."""
        if not self._on:
            return value
        device = self._position_ids.device
        total = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._group)
        return float(total)

    def _mask(self, batch_size: int, q_length: int, kv_length: int, **options: Any) -> Any:
        """The mask of the whole sequence, from its position ids; as transformers' create_causal_mask makes it."""
        from transformers import masking_utils

        make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[self._core]
        if not self._on:
            return make(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **options)
        window, positions = options.get("local_size"), self._position_ids
        function = (
            masking_utils.causal_mask_function
            if window is None
            else masking_utils.sliding_window_causal_mask_function(window)
        )
        packed = masking_utils.find_packed_sequence_indices(positions)
        if packed is not None:
            function = masking_utils.packed_sequence_compatibility_function(function, positions, packed)
        length = positions.shape[1]
        whole = {
            "q_length": length,
            "kv_length": length,
            "mask_function": function,
            "attention_mask": None,
            "allow_is_causal_skip": packed is None,
        }
        return make(batch_size=batch_size, **{**options, **whole})

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Attention on slices: [rows, heads, T / R, head size] to [rows, T / R, heads, head size]."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        core = _eager(module) if self._core == "eager" else ALL_ATTENTION_FUNCTIONS[self._core]
        if not self._on:
            result: tuple[torch.Tensor, Any] = core(module, query, key, value, attention_mask, **options)
            return result
        groups = getattr(module, "num_key_value_groups", None)
        if key.shape[1] % self.size:  # fewer of these heads than ranks: each goes to several
            copies = self.size // key.shape[1]
            key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
        query, key, value = (self._to_heads(heads) for heads in (query, key, value))
        if "position_ids" in options:  # of FlashAttention, which finds packed samples by them
            options["position_ids"] = self._position_ids
        if groups is not None:
            module.num_key_value_groups = query.shape[1] // key.shape[1]
        try:
            output, _ = core(module, query, key, value, attention_mask, **options)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups
        return self._to_tokens(output), None

    def _to_heads(self, slices: torch.Tensor) -> torch.Tensor:
        """[rows, heads, T / R, size] of this rank's tokens -> [rows, heads / R, T, size] of this rank's heads."""
        rows, heads, length, size = slices.shape
        parts = slices.reshape(rows, self.size, heads // self.size, length, size).transpose(0, 1)
        received = self._exchange(parts)  # [slice, rows, heads / R, T / R, size]
        return received.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.size, self.size * length, size)

    def _to_tokens(self, output: torch.Tensor) -> torch.Tensor:
        """[rows, T, heads / R, size] -> [rows, T / R, heads, size]."""
        rows, length, heads, size = output.shape
        parts = output.reshape(rows, self.size, length // self.size, heads, size).transpose(0, 1)
        received = self._exchange(parts)  # [share of the heads, rows, T / R, heads / R, size]
        return received.permute(1, 2, 0, 3, 4).reshape(rows, length // self.size, self.size * heads, size)

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Part i, [R, ...], goes to rank i of the group; the parts for this rank, by sender."""
        received: torch.Tensor = _Exchange.apply(parts, self._group)  # type: ignore[no-untyped-call]
        return received


class _Exchange(torch.autograd.Function):
    """An all-to-all over the first dimension; gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        returned = torch.empty_like(gradient)
        dist.all_to_all_single(returned, gradient, group=ctx.group)
        return returned, None


def _eager(module: Any) -> Any:
    """The plain attention that a model's own file defines."""
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"]


def _refuse(config: Any, size: int) -> None:
    """Raise UserError for a model whose heads or positions cannot be shared out."""
    heads = config.num_attention_heads
    others = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (others % size and size % others):
        raise UserError(
            f"model.sequence_parallel is {size}, but the model's {heads} attention heads ({others} of keys and values) "
            "cannot be shared evenly by so many ranks: choose a divisor of both"
        )
    if mixing := set(getattr(config, "layer_types", None) or ()) - _OF_ATTENTION:
        raise UserError(
            f"model.sequence_parallel: layers of type {', '.join(sorted(mixing))} mix tokens by other means than "
            "attention, over whose bounds no rank sees; leave it out for this model"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(item.get("rope_type")) for item in (rope, *rope.values()) if isinstance(item, dict)}
    if kinds & _POSITIONS_OF_ALL:
        raise UserError(
            f"model.sequence_parallel: rotary embeddings of type {', '.join(sorted(kinds & _POSITIONS_OF_ALL))} depend "
            "on the length of the whole sequence, which no rank sees; leave it out for this model"
        )


def one_of_each_group(gather: Any, size: int) -> Any:
    """A gather over ranks as one over groups, whose ranks all give the same."""
    return gather if size == 1 else lambda array: gather(array)[::size]
