"""LoRA and DoRA by peft, put into the model in place: its class, hooks and the names of other parameters stay.

A linear module X with an adapter has its weight as ``X.base_layer.weight`` and beside it ``X.lora_A.default.weight``
[rank, in], ``X.lora_B.default.weight`` [out, rank] and, for DoRA, ``X.lora_magnitude_vector.default.weight`` [out].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.selection import adapter_targets, select

_BASE = ".base_layer."
_PIECES = ("lora_A", "lora_B", "lora_magnitude_vector")


def plain_name(name: str) -> str:
    """A parameter's name in the model without an adapter."""
    return name.replace(_BASE, ".")


def piece_of(name: str) -> tuple[str, str] | None:
    """(module, kind of piece) of an adapter's parameter; None for the model's own."""
    parts = name.split(".")
    return next(((".".join(parts[:i]), part) for i, part in enumerate(parts) if part in _PIECES), None)


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether a linear module keeps its weight as [in, out] (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"


def add_adapter(model: Any, config: AdapterConfig, seed: int) -> None:
    """Freeze the model but for its head and `modules_to_save`, and put the adapter into it, in place.

    The adapter is drawn on every rank from ``seed``, B = 0: the same at any world size. It is whole on every rank until
    DeepSpeed partitions it. Must run while transformers knows of ZeRO-3, for peft to gather what DoRA starts from.

    Raises:
        UserError: a target or a module to save is not in the model.
    """
    import peft

    linear = [name for name, module in model.named_modules() if is_linear(module)]
    targets = adapter_targets(linear, config.targets)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None and getattr(model.config, "tie_word_embeddings", False):
        tied = next((name for name in targets if model.get_submodule(name) is output), None)
        if tied:
            raise UserError(f"model.adapter.targets: {tied} is tied to the input embeddings; leave it out")
    names = [name for name, _ in model.named_parameters()]
    saved = select(names, config.modules_to_save, "model.adapter.modules_to_save")
    saved |= {name for name in names if name.partition(".")[0] in head_modules(model)}
    chosen = set(targets)
    if twice := next((name for name in sorted(saved) if name.rpartition(".")[0] in chosen), None):
        raise UserError(
            f"model.adapter: {twice} is trained as a whole (`modules_to_save`, or the task's head) and has an adapter"
        )
    transposed = is_transposed(model.get_submodule(targets[0]))
    if config.use_dora and transposed:
        raise UserError(f"model.adapter.use_dora: not for layers kept as [in, out], such as {targets[0]}; turn it off")
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(lora_config(config, targets, transposed), model)
    for name, parameter in model.named_parameters():
        if piece_of(name) is not None:
            parameter.data = parameter.data.to(model.dtype)  # peft's are fp32; ZeRO keeps the fp32 masters
        parameter.requires_grad_(piece_of(name) is not None or name in saved)


def head_modules(model: Any) -> set[str]:
    """Top-level modules that a task has put onto the model, such as a classifier: new, hence always trained."""
    base = getattr(model, "base_model_prefix", "")
    if not base or not hasattr(model, base):
        return set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name
        for name, child in model.named_children()
        if name != base and not any(module is output for module in child.modules())
    }


def lora_config(config: AdapterConfig, targets: Iterable[str], transposed: bool, **more: Any) -> Any:
    """peft's own config; ``more`` are further fields of it."""
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a factor like any other
        lora_dropout=config.dropout,
        target_modules=list(targets),
        use_dora=config.use_dora,
        fan_in_fan_out=transposed,
        **more,
    )


def is_linear(module: torch.nn.Module) -> bool:
    """Whether an adapter can go onto a module."""
    return isinstance(module, torch.nn.Linear) or is_transposed(module)
