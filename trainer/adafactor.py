"""Adafactor (Shazeer & Stern 2018) on ZeRO's flat pieces: what torch.optim.Adafactor does to whole parameters.

Its factors are means of squared gradients over rows and columns, and its step sizes root mean squares: sums over all
elements of a parameter. Each rank adds up those of its piece, by index; two all-reduces for each flat group make them
whole. A matrix of R rows and C columns then has R + C numbers for a second moment instead of R C, on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_EPS2, _BETA2_DECAY, _CLIP = 1e-3, -0.8, 1.0  # torch's and the paper's
_SUM = torch.float64


@dataclass(frozen=True)
class Piece:
    """A rank's slice of one parameter, in a flat tensor.

    Attributes:
        shape: of the whole parameter; its last two dimensions are factored.
        start: where the slice begins in the flat tensor.
        offset: where it begins in the flattened parameter.
        length: of the slice; 0 where a rank has nothing of the parameter.
        moments: fp32; of matrices ``rows`` [matrices, rows] and ``columns`` [matrices, columns], the same on all
            ranks; of vectors ``variance`` [length].
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    length: int
    moments: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        return math.prod(self.shape[:-2])


def make_piece(name: str, shape: tuple[int, ...], start: int, offset: int, length: int, device: torch.device) -> Piece:
    """A piece with moments of zero."""
    sizes: dict[str, tuple[int, ...]] = {"variance": (length,)}
    if len(shape) > 1:
        matrices = math.prod(shape[:-2])
        sizes = {"rows": (matrices, shape[-2]), "columns": (matrices, shape[-1])}
    moments = {key: torch.zeros(size, dtype=torch.float32, device=device) for key, size in sizes.items()}
    return Piece(name, shape, start, offset, length, moments)


class Adafactor(torch.optim.Optimizer):
    """The arguments are torch.optim.Adafactor's. Flat tensors are made known by `lay_out`; others are whole."""

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._pieces: dict[torch.Tensor, list[Piece]] = {}

    def lay_out(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> None:
        """Say which parameters a flat tensor holds pieces of: the same ones in the same order on all ranks."""
        self._pieces[flat] = list(pieces)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update in place; gradients are used up. A collective for each flat tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    state = self.state[flat]
                    state.setdefault("step", torch.zeros((), dtype=torch.float32)).add_(1)
                    self._update(flat, flat.grad, float(state["step"]), group["lr"], group["weight_decay"])

    def _update(self, flat: torch.Tensor, gradients: torch.Tensor, step: float, lr: float, decay: float) -> None:
        eps = torch.finfo(flat.dtype).eps
        new = step**_BETA2_DECAY
        held = [
            (piece, flat.narrow(0, piece.start, piece.length), gradients.narrow(0, piece.start, piece.length))
            for piece in self._pieces[flat]
        ]
        squares = [torch.stack([_square(weights) for _, weights, _ in held])]
        for piece, _, gradient in held:
            if len(piece.shape) > 1:
                squares += _row_and_column_sums(piece, gradient)
        norms, *sums = _summed(squares)
        found = iter(sums)
        for piece, _, gradient in held:
            if len(piece.shape) > 1:
                for key, size in (("rows", piece.shape[-1]), ("columns", piece.shape[-2])):
                    moment = piece.moments[key]
                    moment.lerp_((next(found) / size).to(moment.dtype).view_as(moment), new)
                estimate = _from_factors(piece, eps)
            else:
                estimate = piece.moments["variance"].lerp_(gradient.square(), new).clone()
            gradient.mul_(estimate.clamp_(min=eps * eps).rsqrt_())  # it is the update from here on
        (lengths,) = _summed([torch.stack([_square(update) for _, _, update in held])])
        for (piece, weights, update), norm, length in zip(held, norms.tolist(), lengths.tolist(), strict=True):
            alpha = max(_EPS2, math.sqrt(norm / piece.numel)) * min(lr, step**-0.5)
            if decay:
                weights.mul_(1 - lr * decay)
            weights.add_(update, alpha=-alpha / max(1.0, math.sqrt(length / piece.numel) / _CLIP))


def _square(values: torch.Tensor) -> torch.Tensor:
    """The sum of squares, fp64."""
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=_SUM)
    return norm.square()


def _rows_of(piece: Piece) -> tuple[int, int, int]:
    """(the first row that the slice touches, of all matrices; how many it touches; elements before it in the first)."""
    columns = piece.shape[-1]
    first = piece.offset // columns
    return first, -(-(piece.offset + piece.length) // columns) - first, piece.offset - first * columns


def _row_and_column_sums(piece: Piece, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Sums of squared gradients of the slice, fp64: [matrices * rows] and [matrices * columns]."""
    height, columns = piece.shape[-2:]
    rows = torch.zeros(piece.matrices * height, dtype=_SUM, device=gradient.device)
    sums = torch.zeros(piece.matrices, columns, dtype=_SUM, device=gradient.device)
    if piece.length:
        first, count, before = _rows_of(piece)
        after = count * columns - before - piece.length
        squares = torch.nn.functional.pad(gradient.square(), (before, after)).view(count, columns)
        rows[first : first + count] = squares.sum(1, dtype=_SUM)
        for matrix in range(first // height, (first + count - 1) // height + 1):
            part = slice(max(matrix * height - first, 0), (matrix + 1) * height - first)
            sums[matrix] = squares[part].sum(0, dtype=_SUM)
    return [rows, sums.view(-1)]


def _from_factors(piece: Piece, eps: float) -> torch.Tensor:
    """The second moments of the slice, fp32 [length]: rows times columns, over the mean of the rows."""
    rows, columns = piece.moments["rows"], piece.moments["columns"]
    if not piece.length:
        return torch.empty(0, device=rows.device)
    first, count, before = _rows_of(piece)
    numbers = torch.arange(first, first + count, device=rows.device)
    scale = rows / rows.mean(1, keepdim=True).clamp_(min=eps)
    chosen = columns if piece.matrices == 1 else columns[numbers // rows.shape[1]]
    return (scale.view(-1)[numbers, None] * chosen).view(-1)[before : before + piece.length]


def _summed(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sums over all ranks, by one all-reduce."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(parts)
    joined = torch.cat(list(parts))
    # offloaded pieces are on the CPU, where NCCL does not reach
    reached = joined.to("cuda") if dist.get_backend() == "nccl" else joined
    dist.all_reduce(reached)
    return list(torch.split(reached.to(joined.device), [len(part) for part in parts]))
