"""Cross-entropy only where there is a label.

The language-model head is most of a small model's work and its logits most of its memory, while two fifths of the
tokens of instruction data carry no label. A hook in front of the head keeps only the positions that predict one, so
that any architecture's own forward pass (scaling, soft-capping) runs as it is, on [targets, vocabulary] logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trainer.engine import chunked_cross_entropy
from trainer.failures import UserError
from trainer.planning.memory import LOGIT_BLOCK

IGNORED = -100  # label of a position that is not learned
_TARGETS_TO = 128  # see `trainer.forward`


class LabelledPositions:
    """Restricts the output embedding of a model to chosen positions while the context is open."""

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        self._labels: torch.Tensor | None = None
        self._model = model
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden = args[0]  # [rows, length, hidden size]
        if hidden.dim() != 3:
            raise UserError(
                f"{type(self._model).__name__} has no head that takes one vector a token (ProphetNet predicts several "
                "tokens at once, FSMT's head is an embedding), which dsft needs: choose another family of models"
            )
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions),)

    def fuse(self) -> str | None:
        """Have the head give the summed loss in the place of logits where `only` is told the labels.

        Returns why it cannot (it is more than a linear layer), or None.
        """
        head = self._model.get_output_embeddings()
        if type(head) is not torch.nn.Linear:
            return "the head has an adapter" if hasattr(head, "base_layer") else f"the head is a {type(head).__name__}"
        plain = head.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            if self._labels is None:
                return plain(hidden)
            weights = [head.weight, head.bias]
            if not torch.is_grad_enabled():  # else their gradients would be made, and thrown away
                weights = [None if weight is None else weight.detach() for weight in weights]
            loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, *weights, self._labels)  # type: ignore[no-untyped-call]
            return loss

        head.forward = forward  # type: ignore[method-assign,assignment]
        return None

    @contextmanager
    def only(self, positions: torch.Tensor, labels: torch.Tensor | None = None) -> Iterator[None]:
        """Inside, logits are [len(positions), vocabulary]; ``positions`` int64, into the flattened rows.

        With ``labels``, int64 [len(positions)], they are the summed loss instead (see `fuse`).
        """
        self._positions, self._labels = positions, labels
        try:
            yield
        finally:
            self._positions = self._labels = None


def filled_up(positions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels of positions, int64, up to a round number of them; those that fill it up are IGNORED."""
    fill = (0, -len(labels) % _TARGETS_TO)
    return np.pad(positions, fill), np.pad(labels.astype(np.int64), fill, constant_values=IGNORED)


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label), in fp32, without ever holding all logits in fp32.

    Args:
        logits: [targets, vocabulary], any float dtype.
        labels: int64 [targets]; those that are IGNORED do not count.

    With no targets the result is 0 and still reaches every parameter, so that ranks without work
    take part in the same collectives.
    """
    return chunked_cross_entropy(logits, labels, IGNORED)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, [m, n] in fp32; within the product where that goes: no other pass, no rounding before."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_in_fp32(left.dtype, left.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@functools.cache
def _adds_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of ``dtype`` can be added to fp32 within it, by a trial: on GPUs, in some versions of torch."""
    left, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=total.dtype, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy_sum` of a linear layer's output, block by block; gradients are made on the way (Hsu et al. 2024,
    arXiv 2410.10989, section 3.2), so that no more than a block of logits ever exists.

    The weight's gradient is summed up in fp32 over blocks. It runs inside of the head's own forward pass, where ZeRO-3
    has gathered the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:3]
        sources = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(source, dtype=torch.float32 if place else source.dtype)
            if want and source is not None
            else None
            for place, (want, source) in enumerate(zip(wanted, sources, strict=True))
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(LOGIT_BLOCK[hidden.device.type] // weight.shape[0], 1)
        for start in range(0, len(hidden), rows):
            part, told = hidden[start : start + rows], labels[start : start + rows]
            logits = functional.linear(part, weight, bias).requires_grad_(any(wanted))
            with torch.enable_grad():
                loss = cross_entropy_sum(logits, told)
            total += loss.detach()
            if not any(wanted):
                continue
            (slope,) = torch.autograd.grad(loss, logits)
            if gradients[0] is not None:
                torch.mm(slope, weight, out=gradients[0][start : start + rows])
            if gradients[1] is not None:
                _add_product(gradients[1], slope.t(), part)
            if gradients[2] is not None:
                gradients[2] += slope.sum(0, dtype=torch.float32)
        ctx.save_for_backward(
            *(
                None if gradient is None or source is None else gradient.to(source.dtype)
                for gradient, source in zip(gradients, sources, strict=True)
            )
        )
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * scale for gradient in ctx.saved_tensors)
        return (*scaled, None)
