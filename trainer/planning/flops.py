"""Training FLOPs per token and the peaks of known devices: what an MFU figure is made of."""

from __future__ import annotations

import re

FORMULA = "6 * parameters + 12 * layers * hidden size * sequence length (Chowdhery et al. 2022, appendix B)"

# Dense bf16 peak of a device in FLOP/s, from its maker's data sheet (where that states a figure with sparsity, half of
# it), by a part of the name that nvidia-smi or torch reports. The first match counts: longer names come first.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),  # NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s with sparsity, 72 GPUs
    ("B200", 2250e12),  # NVIDIA DGX B200 data sheet
    ("GH200", 989.4e12),  # NVIDIA GH200 data sheet
    ("H200 NVL", 835.5e12),  # NVIDIA H200 data sheet
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),  # NVIDIA H100 data sheet
    ("H100 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("A100", 312e12),  # NVIDIA A100 data sheet
    ("A800", 312e12),
    ("A30", 165e12),  # NVIDIA A30 data sheet
    ("A10G", 70e12),  # AWS G5 instances
    ("A10", 125e12),  # NVIDIA A10 data sheet
    ("A40", 149.7e12),  # NVIDIA A40 data sheet
    ("A6000", 154.8e12),  # NVIDIA RTX A6000 data sheet
    ("L40S", 362.05e12),  # NVIDIA L40S data sheet
    ("L40", 181.05e12),  # NVIDIA L40 data sheet
    ("L4", 121e12),  # NVIDIA L4 data sheet
    ("RTX 6000 Ada", 364.25e12),  # NVIDIA Ada architecture white paper
    ("RTX 4090", 165.2e12),  # NVIDIA Ada architecture white paper, fp32 accumulation
    ("RTX 3090", 71e12),  # NVIDIA Ampere GA102 white paper, fp32 accumulation
    ("MI300X", 1307.4e12),  # AMD Instinct MI300X data sheet
    ("MI325X", 1307.4e12),  # AMD Instinct MI325X data sheet
    ("MI250X", 383e12),  # AMD Instinct MI250X data sheet
)

# Makers' names of GPUs without matrix products in 8-bit floating point: NVIDIA's before Ada, AMD's before MI300. Names
# as a whole, so that "A30" is not found in "MI300A".
_WITHOUT_FP8 = re.compile(
    r"(?<![a-z0-9])(A\d{2,4}|V100|P100|P40|T4|K80|(RTX|GTX)[ _-]?[123]0\d\d|Quadro|TITAN|MI(50|60|100|210|250))(?!\d)",
    re.IGNORECASE,
)


def lacks_fp8(device_name: str) -> bool:
    """Whether a device is known to have no products in 8 bits, by its name; False where it is not known."""
    return _WITHOUT_FP8.search(device_name) is not None


def flops_per_token(parameters: int, layers: int, hidden_size: int, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 N + 12 L H T (`FORMULA`).

    ``parameters`` should leave out an embedding that is only looked up, and experts that a token does not run through.
    Recomputation by gradient checkpointing is not counted (that is what makes it MFU, not hardware utilisation).
    """
    return 6.0 * parameters + 12.0 * layers * hidden_size * sequence_length


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name, or None where it is not known (CPUs, MIG instances)."""
    if " MIG " in device_name:
        return None
    return next((peak for name, peak in PEAK_FLOPS if name.lower() in device_name.lower()), None)
