"""Products of linear layers in 8 bits while training (fp8, Micikevicius et al. 2022), by torchao.

torchao's layer keeps the weight as the same parameter, in the model's dtype: ZeRO-3 cuts and gathers it as any other,
and checkpoints and exports know nothing of it. Casts to 8 bits are worth their while where torch.compile fuses them
with what is before and after, and compiled layers keep the parameters themselves for the backward pass, not all that
ZeRO-3 has gathered: `compile` is asked for.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch.nn import functional

from trainer.config.model import ModelConfig
from trainer.failures import UserError
from trainer.kernels import on_gpu
from trainer.layers import repeated_layers

_MULTIPLE = 16  # what the kernels want the sides of a weight to be divisible by
_NEEDED = (8, 9)  # compute capability: Ada, Hopper and later


def use_float8(model: torch.nn.Module, config: ModelConfig) -> str:
    """Let the trained linear layers inside of the repeated layers multiply in 8 bits, in place; what was done.

    In evaluation mode they multiply as usual: what is evaluated is what will be exported.

    Raises:
        UserError: torchao is missing, the GPU has no such kernels, or the model no such layers.
    """
    if on_gpu() and (found := torch.cuda.get_device_capability()) < _NEEDED:
        raise UserError(
            f"model.fp8: {torch.cuda.get_device_name()} (compute capability {found[0]}.{found[1]}) has no products in "
            "8 bits, which came with 8.9 (Ada, Hopper); set it to none"
        )
    if on_gpu() and config.dtype != "bfloat16":
        raise UserError("model.fp8: on GPUs it needs model.dtype bfloat16")
    for name in ("torchao", "torch.utils._pytree"):  # of kernels for other GPUs, and of torch's deprecations
        logging.getLogger(name).setLevel(logging.ERROR)
    if sys.modules.get("torchao", sys) is None:  # `quiet_libraries`
        del sys.modules["torchao"]
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"model.fp8 needs torchao ({error}); pip install torchao, or set it to none") from None
    wanted = {
        module
        for layer in repeated_layers(model)
        for module in layer.modules()
        if type(module) is torch.nn.Linear
        and module.weight.requires_grad
        and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
    }
    if not wanted:
        raise UserError(
            f"model.fp8: {type(model).__name__} has no trained linear layers (torch.nn.Linear in its repeated layers, "
            f"with sides divisible by {_MULTIPLE}); set it to none"
        )
    recipe = Float8LinearConfig.from_recipe_name(config.fp8)
    # gradients of weights sum over tokens, whose number need not be a multiple
    object.__setattr__(recipe, "pad_inner_dim", True)  # frozen, and made by name alone
    convert_to_float8_training(model, module_filter_fn=lambda module, _: module in wanted, config=recipe)
    made = [module for module in model.modules() if hasattr(module, "linear_mm_config")]
    replaced = _while_training(type(made[0]))
    for module in made:
        module.__class__ = replaced
    return f"{config.fp8}, {len(made)} linear layers"


def _while_training(layer: Any) -> type:
    """``layer``, a class of torchao's, that multiplies as usual in evaluation mode."""

    def forward(self: Any, input: torch.Tensor) -> Any:
        if self.training:
            return layer.forward(self, input)
        return functional.linear(input, self.weight, self.bias)

    return type(layer.__name__, (layer,), {"forward": forward})
