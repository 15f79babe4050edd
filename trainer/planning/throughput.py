"""How long a step will take, roughly: from FLOPs, bytes that ZeRO moves, and data-sheet figures of devices.

Two bounds, not a promise: with communication wholly hidden behind computation, and with none of it hidden. A run's own
metrics replace them after its first steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Share of the dense bf16 peak that matrix-heavy training reaches on the devices below while it computes. A round figure
# in the range that large trainings report as model FLOPs utilisation (Chowdhery et al. 2022: 0.46; Narayanan et al.
# 2021: 0.52), which contains some communication; dsft on one H200: 0.58 with 1.7B parameters, 0.45 with 8B.
EFFICIENCY = 0.5

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: memory in bytes, bandwidth to the other GPUs of a node in bytes/s and direction, and the
    dense bf16 peak in FLOP/s."""

    memory: int
    link: float
    peak: float


# By a part of the name that nvidia-smi or torch reports; the first match counts: longer names come first. From their
# makers' data sheets and (RTX) white papers. Links: NVLink where the product has it (half of the bidirectional figure),
# else PCIe x16 of its generation (4: 32 GB/s, 5: 64 GB/s). Peaks: half of a figure with sparsity; of RTX 3090 and 4090
# that with fp32 accumulation.
DEVICES: tuple[tuple[str, Device], ...] = (
    ("GB200", Device(186 * GIB, 900e9, 2500e12)),
    ("B200", Device(180 * GIB, 900e9, 2250e12)),
    ("GH200", Device(96 * GIB, 450e9, 989.4e12)),
    ("H200 NVL", Device(140 * GIB, 450e9, 835.5e12)),
    ("H200", Device(140 * GIB, 450e9, 989.4e12)),
    ("H100 PCIe", Device(80 * GIB, 64e9, 756e12)),
    ("H100 NVL", Device(94 * GIB, 300e9, 835.5e12)),
    ("H100", Device(80 * GIB, 450e9, 989.4e12)),
    ("H800", Device(80 * GIB, 200e9, 989.4e12)),
    ("A100-SXM4-40GB", Device(40 * GIB, 300e9, 312e12)),
    ("A100-PCIE-40GB", Device(40 * GIB, 32e9, 312e12)),
    ("A100", Device(80 * GIB, 300e9, 312e12)),
    ("A800", Device(80 * GIB, 200e9, 312e12)),
    ("A30", Device(24 * GIB, 32e9, 165e12)),
    ("A10G", Device(24 * GIB, 32e9, 70e12)),
    ("A10", Device(24 * GIB, 32e9, 125e12)),
    ("A40", Device(48 * GIB, 32e9, 149.7e12)),
    ("A6000", Device(48 * GIB, 32e9, 154.8e12)),
    ("L40S", Device(48 * GIB, 32e9, 362.05e12)),
    ("L40", Device(48 * GIB, 32e9, 181.05e12)),
    ("L4", Device(24 * GIB, 32e9, 121e12)),
    ("RTX 6000 Ada", Device(48 * GIB, 32e9, 364.25e12)),
    ("RTX 4090", Device(24 * GIB, 32e9, 165.2e12)),
    ("RTX 3090", Device(24 * GIB, 32e9, 71e12)),
    ("MI300X", Device(192 * GIB, 448e9, 1307.4e12)),
    ("MI325X", Device(256 * GIB, 448e9, 1307.4e12)),
    ("MI250X", Device(64 * GIB, 200e9, 383e12)),
)

# Makers' names of GPUs without matrix products in 8-bit floating point: NVIDIA's before Ada, AMD's before MI300
_WITHOUT_FP8 = r"A\d{2,4}|V100|P100|P40|T4|K80|(RTX|GTX)[ _-]?[123]0\d\d|Quadro|TITAN|MI(50|60|100|210|250)"


def device(name: str | None) -> Device | None:
    """Figures of a device by its name, or None where it is not known (CPUs, MIG instances)."""
    if name is None or " MIG " in name:
        return None
    return next((found for part, found in DEVICES if _named(re.escape(part), name)), None)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name, or None where it is not known."""
    found = device(name)
    return None if found is None else found.peak


def lacks_fp8(name: str) -> bool:
    """Whether a device is known to have no products in 8 bits, by its name; False where it is not known."""
    return _named(_WITHOUT_FP8, name)


def _named(pattern: str, name: str) -> bool:
    """Whether it is a name as a whole: "A30" is found neither in "MI300A" nor in "RTX A3000"."""
    return re.search(rf"(?<![a-z0-9])({pattern})(?!\d)", name, re.IGNORECASE) is not None


FORMULA = "6 * parameters + 12 * layers * hidden size * sequence length (Chowdhery et al. 2022, appendix B)"


def flops_per_token(parameters: int, layers: int, hidden_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H T (`FORMULA`).

    ``parameters`` should leave out an embedding that is only looked up, and experts that a token does not run through.
    Recomputation by gradient checkpointing is not counted (that is what makes it MFU, not hardware utilisation).
    """
    return 6.0 * parameters + 12.0 * layers * hidden_size * sequence_length


@dataclass(frozen=True)
class StepTime:
    """Bounds of the time of one optimizer step, in seconds, and what they are made of."""

    compute_seconds: float
    communication_seconds: float

    @property
    def least(self) -> float:
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def most(self) -> float:
        return self.compute_seconds + self.communication_seconds


def step_time(
    *,
    flops_per_token: float,
    tokens_per_rank: float,
    recompute: float,
    peak_flops: float,
    parameters: int,
    trainable: int,
    stage: int,
    parameter_bytes: int,
    gradient_bytes: int,
    micro_batches: int,
    nodes: int,
    gpus_per_node: int,
    link: float,
    network: float | None,
    hpz: bool = False,
) -> StepTime | None:
    """Bounds of a step's time; None where the nodes' network is not known and there are several.

    Computation: ``flops_per_token * tokens_per_rank`` (a third more where all layers are computed again) at EFFICIENCY
    of the peak. Communication of a rank (Rajbhandari et al. 2020, section 7): ZeRO-3 gathers all parameters for each
    forward and each backward pass and reduces the gradients after each backward; stages 1 and 2 gather once a step. A
    ring over W ranks moves (W - 1) / W of the bytes through each rank; across nodes the GPUs of one share its network.

    Args:
        tokens_per_rank: of one step, padding included.
        recompute: share of the forward pass that is computed again in the backward pass.
        parameters, trainable: elements of the whole model.
        parameter_bytes, gradient_bytes: of one element on the wire.
        micro_batches: of one rank in one step.
        link: bytes/s of a GPU to the others of its node, one direction.
        network: bytes/s of a node to the others, one direction; None: not known.
        hpz: backward passes gather within the node (Wang et al. 2023).
    """
    world_size = nodes * gpus_per_node
    if nodes > 1 and network is None:
        return None
    flops = flops_per_token * tokens_per_rank * (1 + recompute / 3)
    gathers = 2 * micro_batches if stage == 3 else 1
    whole = gathers * parameters * parameter_bytes + micro_batches * trainable * gradient_bytes
    bandwidth = min(link, network / gpus_per_node) if nodes > 1 and network is not None else link
    within = micro_batches * parameters * parameter_bytes if hpz else 0
    seconds = (whole - within) * (world_size - 1) / world_size / bandwidth
    seconds += within * (gpus_per_node - 1) / gpus_per_node / link
    return StepTime(flops / (EFFICIENCY * peak_flops), seconds)
