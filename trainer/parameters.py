"""What a model is made of: whole shapes, buffers, and a rank's slices where ZeRO has cut its parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one parameter.

    Attributes:
        name: the parameter's name in the model.
        numel: elements of the whole parameter.
        offset: where the slice begins in the flattened parameter.
        length: elements of the slice, without ZeRO's padding.
        tensors: ``master`` (fp32) and the optimizer's moments (Adam's ``exp_avg`` and ``exp_avg_sq``, Adafactor's
            ``variance`` of vectors), ``ema`` (fp32) where weights are averaged, for trained parameters; ``frozen`` (the
            model's dtype) for the others. 1-D views of ``length`` elements: writing to them changes the state.
    """

    name: str
    numel: int
    offset: int
    length: int
    tensors: dict[str, torch.Tensor]


def whole_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(name, buffer) of those that belong into a model's state, by name."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return sorted(found.items())
