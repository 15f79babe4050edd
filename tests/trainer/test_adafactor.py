"""Adafactor's sums over pieces of matrices, and whole steps in one process. Ranks: test_engine.py."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.adafactor import Adafactor, Piece, _from_factors, _row_and_column_sums, make_piece

SHAPES = [(5, 7), (3, 4, 5), (2, 2, 3, 4), (1, 9), (9, 1)]


def pieces_of(shape: tuple[int, ...], ranks: int) -> list[Piece]:
    """As ZeRO-3 cuts a parameter; the last ranks may have nothing."""
    size = math.prod(shape)
    most = -(-size // ranks)
    cuts = [(min(rank * most, size), min((rank + 1) * most, size)) for rank in range(ranks)]
    return [make_piece("w", shape, 0, start, end - start, torch.device("cpu")) for start, end in cuts]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_pieces_add_up(shape: tuple[int, ...], ranks: int) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    square, flat = gradient.double().square(), gradient.view(-1)
    parts = [
        _row_and_column_sums(piece, flat.narrow(0, piece.offset, piece.length)) for piece in pieces_of(shape, ranks)
    ]
    torch.testing.assert_close(sum(rows for rows, _ in parts), square.sum(-1).view(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(columns for _, columns in parts), square.sum(-2).view(-1), rtol=1e-6, atol=0)

    rows, columns = square.mean(-1, keepdim=True).float(), square.mean(-2, keepdim=True).float()
    estimates = []
    for piece in pieces_of(shape, ranks):
        piece.moments["rows"].copy_(rows.view_as(piece.moments["rows"]))
        piece.moments["columns"].copy_(columns.view_as(piece.moments["columns"]))
        estimates.append(_from_factors(piece, 1e-12))
    torch.testing.assert_close(torch.cat(estimates), (rows @ columns / rows.mean(-2, keepdim=True)).view(-1))


def test_steps_are_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = [(5, 7), (6,), (3, 4, 5), ()]
    whole = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    flat = torch.nn.Parameter(torch.cat([parameter.detach().view(-1) for parameter in whole]))
    expected = torch.optim.Adafactor(whole, lr=0.3, weight_decay=0.1)
    found = Adafactor([flat], lr=0.3, weight_decay=0.1)
    starts = [sum(math.prod(shape) for shape in shapes[:place]) for place in range(len(shapes))]
    device = flat.device
    pieces = [make_piece("", s, start, 0, math.prod(s), device) for s, start in zip(shapes, starts, strict=True)]
    found.lay_out(flat, pieces)
    for scale in (1.0, 1e-3, 0.0, 50.0, 1.0):
        for parameter in whole:
            parameter.grad = scale * torch.randn(parameter.shape, generator=draw)
        flat.grad = torch.cat([p.grad.reshape(-1) for p in whole if p.grad is not None])
        expected.step()
        found.step()
        torch.testing.assert_close(flat.data, torch.cat([p.data.view(-1) for p in whole]), rtol=2e-6, atol=1e-7)
