"""Liger's fused Triton kernels (Hsu et al. 2024, arXiv 2410.10989) in the place of a model's norms, MLP and rotary
embedding.

Its fused linear cross-entropy is left out: it takes the hidden state of every position, where dsft runs the head only
at those with a label, and multiplies with the head's weight outside of its module, before ZeRO-3 has gathered it.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.config.model import ModelConfig
from trainer.failures import UserError

# Of Liger's own switches; those that a family does not have are passed over.
_LEFT_OUT = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fuse_kernels(model: Any, config: ModelConfig) -> str:
    """Put Liger's kernels into the model, in place, where `kernels` and this machine say so; what was done, and why.

    Raises:
        UserError: `kernels` is "liger", and that cannot be.
    """
    if config.kernels == "none":
        return "the model's own, as configured"
    problem = _problem(model, config)
    if problem is None:
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            with only_this_instance(model):
                _apply_liger_kernel_to_instance(model=model, **_LEFT_OUT)
            return f"Liger's for {model.config.model_type}"
        except ImportError as error:  # of what it knows a family by: before it has changed anything
            problem = f"it does not fit this transformers: {error}"
    if config.kernels == "liger":
        raise UserError(f"model.kernels: liger does not go here: {problem}; use auto or none")
    return f"the model's own: {problem}"


@contextmanager
def only_this_instance(model: torch.nn.Module) -> Iterator[None]:
    """Let what is replaced inside in the Python modules of ``model``'s classes serve no other model.

    Liger also replaces the classes of layers, for models made later, and functions that layers call: an export is
    checked on the CPU, in the same process, where its kernels cannot run. Classes are put back; a function goes by the
    device of its first argument.
    """
    modules = [sys.modules[name] for name in sorted({type(part).__module__ for part in model.modules()})]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        for name, own in names.items():
            made = getattr(module, name)
            if made is not own:
                setattr(module, name, _by_device(made, own) if inspect.isfunction(own) else own)


def _by_device(fused: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    def call(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        return (fused if first.is_cuda else own)(first, *args, **options)

    return call


def on_gpu() -> bool:
    """Whether this run's model is on a GPU: not every run on a machine with some is."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def _problem(model: Any, config: ModelConfig) -> str | None:
    if not on_gpu():
        return "its kernels want a GPU"
    for package, name in (("triton", "triton"), ("liger_kernel", "liger-kernel")):
        if importlib.util.find_spec(package) is None:
            return f"{name} is not installed"
    if config.compile:
        return "torch.compile fuses them itself"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"it has none for {model.config.model_type}"
    return None
