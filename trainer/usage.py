"""What training makes of its devices: model FLOPs utilisation and memory."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from trainer.planning.throughput import peak_flops


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


def peaks_beside_plan(
    gather: Callable[[np.ndarray], list[np.ndarray]], plan: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """The ranks' peaks so far and what the plan expected of each, in bytes. Every rank must make the call.

    {"peak_bytes": the largest, "rank": whose, "least_bytes": the smallest, "planned_bytes": None where the plan has no
    estimate, "counted": ``allocated`` (by torch's allocator, which knows nothing of CUDA's context: neither does
    planned_bytes then) or ``resident``}.
    """
    peaks = [int(part[0]) for part in gather(np.array([peak_memory(device)], dtype=np.int64))]
    memory = plan["memory"]
    on_gpu = device.type == "cuda"
    return {
        "peak_bytes": max(peaks),
        "rank": peaks.index(max(peaks)),
        "least_bytes": min(peaks),
        # the pages of files that are mapped count as resident, as long as the system leaves them in memory
        "planned_bytes": memory and memory["total"] + (-memory["overhead"] if on_gpu else memory.get("nvme", 0)),
        "counted": "allocated" if on_gpu else "resident",
    }
