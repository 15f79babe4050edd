"""The GPU of a rank: that torch can use it is tried before anything is built on it."""

from __future__ import annotations

import os

import torch

from trainer.failures import UserError, node_name
from trainer.health import WITHOUT_CUDA, UnfitNodeError


def compute_deterministically() -> None:
    """From now on the same input has the same result, bit for bit; operators that cannot do that raise RuntimeError."""
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its package does not ask torch; transformers reads it


def take_gpu(index: int) -> torch.device:
    """Make GPU ``index`` of this node the current one, once it has worked.

    Raises:
        UserError: this torch is built for no GPU, for another kind, or for a newer driver.
        UnfitNodeError: anything else that keeps torch from using the GPU.
    """
    build = f"torch {torch.__version__} on {node_name()}"
    if not (torch.version.cuda or torch.version.hip):
        raise UserError(f"{build} {WITHOUT_CUDA}")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        if index < (found := torch.cuda.device_count()):
            torch.cuda.set_device(index)
            torch.ones(1, device="cuda").add(1).item()
            return torch.device("cuda", index)
    except Exception as error:  # torch tells drivers, devices and their states apart by words alone
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "driver on your system is too old" in said or "no kernel image" in said:
            raise UserError(f"{build} does not fit its GPUs: install another build there ({said})") from error
        raise UnfitNodeError(f"{build} cannot use GPU {index}: {said}") from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise UnfitNodeError(f"{build} sees {found} GPU(s), a rank wants number {index} (CUDA_VISIBLE_DEVICES: {visible})")
