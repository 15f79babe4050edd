"""What training makes of its devices: model FLOPs utilisation and memory."""

from __future__ import annotations

import resource

import torch

from trainer.planning.flops import peak_flops


class Utilisation:
    """Model FLOPs utilisation, where the devices' peak is known; the formula is in plan.json.

    Args:
        flops_per_token: of the whole model, from the plan; None: not known.
        head_parameters: elements of weights that do not run at positions without a label.
        world_size: number of devices.
        device: of this rank.
    """

    def __init__(
        self, flops_per_token: float | None, head_parameters: int, world_size: int, device: torch.device
    ) -> None:
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if peak is None else peak * world_size
        self._per_token, self._head = flops_per_token, 6.0 * head_parameters

    def __call__(self, tokens: int, target_tokens: int, seconds: float) -> dict[str, float]:
        """{"mfu": share of the devices' dense bf16 peak} of a step, or nothing."""
        if self._peak is None or self._per_token is None:
            return {}
        flops = self._per_token * tokens - self._head * (tokens - target_tokens)
        return {"mfu": flops / (seconds * self._peak)}


def peak_memory(device: torch.device) -> int:
    """Peak memory of this rank in bytes: the GPU's allocator, or the resident set on CPUs."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
