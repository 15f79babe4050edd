"""Linear layers whose frozen weight is kept in 4 bits (QLoRA, Dettmers et al. 2023), in the pieces of ZeRO-3.

The packed weight is a parameter of the model's dtype, [elements, 1], with four bits of each weight (NF4) in its bits:
ZeRO-3 cuts, gathers and releases it as any other. The scales that undo it, one for each block of 64 weights and
themselves in 8 bits (double quantisation), are whole on every rank, and no parameter or buffer: nothing casts them.
Weights are packed one by one as transformers reads them, by the rank that reads, and scattered: no rank ever holds the
model, in 4 bits or in more. bitsandbytes does the arithmetic.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import xxhash

from trainer.adapters import is_linear
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.kernels import on_gpu
from trainer.selection import adapter_targets

BLOCK, SCALES_BLOCK = 64, 256  # weights with one scale, scales with one scale of their own: bitsandbytes' defaults


def bitsandbytes() -> Any:
    """Its functions. Raises UserError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise UserError(
            f"model.adapter.type: qlora needs bitsandbytes ({error}); pip install bitsandbytes, or use lora"
        ) from None
    return bitsandbytes.functional


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(packed weight of the same dtype, bitsandbytes' QuantState) of a matrix, [out, in]."""
    found: tuple[torch.Tensor, Any] = bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=weight.dtype
    )
    return found


def unpack(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The matrix that a packed weight stands for, in its dtype."""
    whole: torch.Tensor = bitsandbytes().dequantize_4bit(packed, state)
    return whole


def digest(packed: torch.Tensor, state: Any) -> str:
    """Checksum of a packed weight with its scales."""
    hasher = xxhash.xxh3_128()
    for tensor in (packed, *_scales(state)):
        hasher.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _scales(state: Any) -> tuple[torch.Tensor, ...]:
    return state.absmax, state.state2.absmax, state.offset


class Linear4bit(torch.nn.Linear):
    """A linear layer with a packed weight, which is never trained; its bias, if any, is as usual.

    Attributes:
        state: bitsandbytes' QuantState; None until the weight is there.
        digest: of weight and scales as they were packed.
    """

    state: Any = None
    digest: str = ""

    def set_up(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        """In the place of ``__init__``: no memory but that of the packed weight."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        like = torch.empty(0, device=device, dtype=dtype)
        size, odd = divmod(in_features * out_features, 2 * like.element_size())
        if odd:
            raise UserError(
                f"model.adapter: a matrix of {out_features} x {in_features} cannot be packed in {like.dtype}; use lora"
            )
        self.weight = torch.nn.Parameter(like.new_empty(size, 1), requires_grad=False)
        self.register_parameter("bias", torch.nn.Parameter(like.new_empty(out_features)) if bias else None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        """Pack what was read; by one rank, while DeepSpeed has the parameters gathered to scatter them anew."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            if tuple(weight.shape) != self.shape:
                raise UserError(
                    f"model.path: {prefix}weight is {tuple(weight.shape)} in its files; the model is another"
                )
            packed, self.state = pack(weight.to(self.weight.device, self.weight.dtype))
            self.weight.data.copy_(packed)
            self.digest = digest(packed, self.state)
        if self.bias is not None and f"{prefix}bias" in state_dict:
            self.bias.data.copy_(state_dict[f"{prefix}bias"])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole weight."""
        return self.out_features, self.in_features

    def stands_for(self, weight: torch.Tensor) -> bool:
        """Whether the packed weight is that of ``weight``, of any dtype and on any device."""
        return digest(*pack(weight.to(self.state.absmax.device, self.state.dtype))) == self.digest

    def whole(self) -> torch.Tensor:
        """The weight, [out, in], while ZeRO has the packed one gathered."""
        return unpack(self.weight.data, self.state)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """x W^T. Keeps the layer alone for the backward pass, for which DeepSpeed gathers its weight anew.

    bitsandbytes' own function keeps the packed weight itself, and so all that ZeRO-3 has gathered.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: Linear4bit) -> torch.Tensor:
        ctx.layer = layer
        return input @ layer.whole().t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.whole(), None


def packing(make: Callable[[], Any], adapter: AdapterConfig) -> AbstractContextManager[Any]:
    """A context in which a model is made with `Linear4bit` where the adapter has its targets.

    ``make`` makes the same model, once and before, on the meta device: layers are known by the order in which they are
    made, since nothing has a name before the whole model is there. transformers must not know of ZeRO-3 yet.

    Raises:
        UserError: bitsandbytes is missing, or a target is no plain linear layer.
    """
    bitsandbytes()
    made: list[torch.nn.Module] = []

    def note(layer: torch.nn.Module, *_: Any, **__: Any) -> bool:
        made.append(layer)
        return False

    with torch.device("meta"), _each_linear(note):
        names = {module: name for name, module in make().named_modules()}
    linear = [name for module, name in names.items() if is_linear(module)]
    targets = set(adapter_targets(linear, adapter.targets))
    if other := targets - {names[layer] for layer in made if layer in names}:
        raise UserError(f"model.adapter: qlora packs torch.nn.Linear itself, not {sorted(other)[0]}; use lora")
    wanted = {index for index, layer in enumerate(made) if names.get(layer) in targets}
    order = itertools.count()

    def replace(layer: torch.nn.Module, *arguments: Any, **options: Any) -> bool:
        if next(order) not in wanted:
            return False
        layer.__class__ = Linear4bit
        layer.set_up(*arguments, **options)  # type: ignore[operator]
        return True

    return _each_linear(replace)


def _each_linear(instead: Callable[..., bool]) -> AbstractContextManager[Any]:
    """Inside, ``instead`` is called for each torch.nn.Linear that is made; False: it is made as usual."""
    usual = torch.nn.Linear.__init__

    def init(self: torch.nn.Linear, *arguments: Any, **options: Any) -> None:
        if type(self) is not torch.nn.Linear or not instead(self, *arguments, **options):
            usual(self, *arguments, **options)

    return patch.object(torch.nn.Linear, "__init__", init)


def packed_layers(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """Name -> layer of all those in 4 bits; the name is that of the weight."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def share_scales(model: torch.nn.Module, adapter: AdapterConfig) -> None:
    """Give all ranks the scales of the packed weights, from the one that has read them; a collective.

    Raises:
        UserError: a weight was not in the model's files.
    """
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    wanted = {f"{name}.weight" for name in adapter_targets(linear, adapter.targets)}
    layers = packed_layers(model)
    if wanted != layers.keys():
        raise UserError("model.adapter: the model is not made twice in the same order, as qlora needs it; use lora")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")
    if dist.get_rank() == 0:
        for name, layer in layers.items():
            if layer.state is None:
                raise UserError(f"model.path: {name} is not in its files: qlora needs pretrained weights")
    else:
        for layer in layers.values():
            layer.state = _blank_state(layer, device)
    digests = [[layer.digest for layer in layers.values()]]
    dist.broadcast_object_list(digests, src=0, device=device)
    for layer, found in zip(layers.values(), digests[0], strict=True):
        layer.digest = found
        for tensor in _scales(layer.state):
            dist.broadcast(tensor, src=0)


@functools.cache
def _scale_codes(device: torch.device) -> torch.Tensor:
    """The 256 values of scales in 8 bits, the same for all layers."""
    codes: torch.Tensor = bitsandbytes().create_dynamic_map().to(device)
    return codes


def _blank_state(layer: Linear4bit, device: torch.device) -> Any:
    """A QuantState with room for the scales."""
    functions = bitsandbytes()
    blocks = -(-layer.in_features * layer.out_features // BLOCK)
    inner = functions.QuantState(
        torch.empty(-(-blocks // SCALES_BLOCK), device=device),
        code=_scale_codes(device),
        blocksize=SCALES_BLOCK,
        dtype=torch.float32,
    )
    return functions.QuantState(
        torch.empty(blocks, dtype=torch.uint8, device=device),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=functions.get_4bit_type("nf4", device=device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=layer.weight.dtype,
        offset=torch.empty((), device=device),
        state2=inner,
    )
