"""Training FLOPs per token: what an MFU figure is made of, with the peaks of `trainer.planning.throughput`."""

from __future__ import annotations

FORMULA = "6 * parameters + 12 * layers * hidden size * sequence length (Chowdhery et al. 2022, appendix B)"


def flops_per_token(parameters: int, layers: int, hidden_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H T (`FORMULA`).

    ``parameters`` should leave out an embedding that is only looked up, and experts that a token does not run through.
    Recomputation by gradient checkpointing is not counted (that is what makes it MFU, not hardware utilisation).
    """
    return 6.0 * parameters + 12.0 * layers * hidden_size * sequence_length
