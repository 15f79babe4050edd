"""Which attention a run uses, and attention over packed samples by torch's own variable-length kernel.

`varlen` computes each sample's scores alone, as FlashAttention does, without a wheel that has to fit torch and CUDA: on
GPUs by `torch.nn.attention.varlen` (the FlashAttention 2 that torch is built with), on CPUs sample by sample with SDPA,
which is also how the tests hold it against the other implementations.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trainer.config.schema import LaunchConfig
from trainer.failures import UserError

VARLEN = "varlen"
# Families whose layers hand the samples' bounds down to the attention function and want nothing of it that varlen
# cannot do (soft-capping, sinks, position biases); tests/trainer/test_attention.py holds each of them against SDPA.
VARLEN_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "olmo2", "smollm3", "granite", "phi3"}
)

# What transformers calls each FlashAttention: its package, and the compute capabilities of GPUs that it is for. In the
# order in which "auto" takes them.
_FLASH = {
    "flash_attention_3": ("flash-attn-3", (9,)),
    "flash_attention_4": ("flash-attn-4", (9, 10, 11, 12)),
    "flash_attention_2": ("flash-attn", (8, 9, 10, 11, 12)),
}

# Images, and PaliGemma's prompts, are read in both directions, by a mask that FlashAttention never sees.
_BOTH_WAYS = frozenset({"gemma3", "paligemma"})


def choose_attention(config: LaunchConfig, model_config: Any, device: torch.device) -> tuple[str | None, str]:
    """(the implementation to ask of transformers, or None for its default: SDPA where the model can; why).

    Args:
        model_config: the transformers config of the model.
        device: where it is trained.

    Raises:
        UserError: what `model.attention` asks for cannot be.
    """
    requested = config.model.attention
    if requested != "auto":
        if problem := _not_here(requested, config, model_config, device):
            raise UserError(f"model.attention: {requested} does not go here: {problem}; use auto")
        _register(requested, config)
        return requested, "as configured"
    if device.type != "cuda":
        return None, "no GPU"
    reasons: list[str] = []
    for name in (*(name for name, (package, _) in _FLASH.items() if _installed(package)), VARLEN):
        problem = _not_here(name, config, model_config, device)
        if problem is None and (failed := _kernel_problem(name, model_config, device)):
            problem = f"its kernel fails here: {failed}"
        if problem is None:
            _register(name, config)
            source = "torch's own kernel" if name == VARLEN else f"{_FLASH[name][0]} is installed, which"
            return name, "; ".join([*reasons, f"{source} keeps packed samples apart"])
        reasons.append(f"not {name}: {problem}")
    return None, "; ".join(reasons)


def inference_attention(requested: str) -> str | None:
    """For evaluation and prediction of an exported model, which generate with a cache on any machine: SDPA or eager."""
    return requested if requested in ("sdpa", "eager") else None


def _installed(package: str) -> bool:
    """By the package's name: the modules of flash-attn and flash-attn-4 are both called flash_attn."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _not_here(name: str, config: LaunchConfig, model_config: Any, device: torch.device) -> str | None:
    """Why an implementation cannot be used; None: nothing is known against it."""
    if name == VARLEN:
        return _not_varlen(config, model_config, device)
    if name in _FLASH:
        return _not_flash(name, config, model_config, device)
    return "it has no backward pass on CPUs" if name == "flex_attention" and device.type == "cpu" else None


def _not_flash(name: str, config: LaunchConfig, model_config: Any, device: torch.device) -> str | None:
    """Why a FlashAttention cannot be used; None: it can."""
    if config.task.type == "image-text-to-text" and model_config.model_type in _BOTH_WAYS:
        return f"{model_config.model_type} reads images in both directions, by a mask that FlashAttention does not see"
    package, majors = _FLASH[name]
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in majors:
        return f"it is for GPUs of compute capability {', '.join(f'{major}.x' for major in majors)}"
    if not _installed(package):
        return f"{package} is not installed"
    if config.model.dtype != "bfloat16":
        return "it wants model.dtype bfloat16"
    if name != "flash_attention_2" and (problem := _dropout(model_config.get_text_config())):
        return problem
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING.get(type(model_config), None)
    if not getattr(kind, "_supports_flash_attn", False):  # a tuple has none: no family with several kinds does
        return f"model_type {model_config.model_type} has no FlashAttention in transformers"
    return None


def _dropout(text_config: Any) -> str | None:
    dropped = getattr(text_config, "attention_dropout", 0.0)
    return "it has no dropout, and the model's attention_dropout is not 0" if dropped else None


def _not_varlen(config: LaunchConfig, model_config: Any, device: torch.device) -> str | None:
    """Why varlen cannot be used; None: it can."""
    if config.task.type != "causal-lm":
        return "only causal-lm packs samples"
    if getattr(config.task, "generation", None) is not None:
        return "generating (task.generation) takes a cache"
    if config.model.sequence_parallel > 1:
        return "ranks that share sequences (model.sequence_parallel) exchange them around another one"
    text = model_config.get_text_config()
    if text.model_type not in VARLEN_FAMILIES:
        return f"model_type {text.model_type} is not among {', '.join(sorted(VARLEN_FAMILIES))}"
    if problem := _dropout(text):
        return problem
    if device.type == "cuda":
        if config.model.dtype != "bfloat16":
            return "its kernel wants model.dtype bfloat16"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "its kernel wants a GPU of compute capability 8.0"
        if getattr(text, "head_dim", None) and text.head_dim > 256:
            return "its kernel wants heads of at most 256"
    return None


def _kernel_problem(name: str, model_config: Any, device: torch.device) -> str | None:
    """What is wrong with a kernel on this GPU, from a trial of two samples against the CPU's way; None: nothing.

    Kernels and their signatures change with versions and GPUs, and what "auto" chooses has to run. Heads are the
    model's, for which FlashAttention 4 compiles its programs in any case.
    """
    generator = torch.Generator().manual_seed(0)
    positions = np.concatenate([np.arange(9), np.arange(15)])[None]
    found: list[list[torch.Tensor]] = []
    try:
        text = model_config.get_text_config()
        names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "sliding_window")
        # raises where layers differ in one (Gemma 4): a trial of some says nothing of all
        sizes = {key: value for key in names if isinstance(value := getattr(text, key, None), int) and value}
        heads = sizes.get("num_attention_heads", 4)
        size = sizes.get("head_dim", sizes.get("hidden_size", 64 * heads) // heads)
        pairs = max(2 * heads // sizes.get("num_key_value_heads", heads), 2)
        window = 8 if "sliding_window" in sizes else None
        query, key, value, weight = (
            torch.randn(shape, generator=generator).bfloat16()
            for shape in ((1, pairs, 24, size), (1, 2, 24, size), (1, 2, 24, size), (1, 24, pairs, size))
        )
        for implementation, where in ((VARLEN, torch.device("cpu")), (name, device)):
            q, k, v = (tensor.to(where, copy=True).requires_grad_() for tensor in (query, key, value))
            attend, told = attention_function(implementation), sample_bounds(positions, where)
            output, _ = attend(CallingLayer(implementation), q, k, v, None, sliding_window=window, **told)
            gradients = torch.autograd.grad((output.float() * weight.to(where)).sum(), (q, k, v))
            found.append([tensor.detach().float().cpu() for tensor in (output, *gradients)])
        for expected, tensor in zip(*found, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=3e-2, atol=3e-2)  # bfloat16 has 8 bits
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


class CallingLayer(torch.nn.Module):
    """What transformers' attention functions ask of the layer that calls them."""

    is_causal = True

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)


def attention_function(name: str) -> Callable[..., Any]:
    """What computes an implementation of attention."""
    if name == VARLEN:
        return varlen_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    return function


def _register(name: str, config: LaunchConfig) -> None:
    """Have transformers know of the implementation, where it does not, or not as it has to be."""
    if name == "flash_attention_4" and config.model.compile:
        # its programs are made by another compiler, which torch's cannot follow: a layer is compiled around it
        function = torch.compiler.disable(attention_function(name))  # type: ignore[no-untyped-call]
    elif name == VARLEN:
        function = varlen_attention
    else:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)


def sample_bounds(position_ids: np.ndarray, device: torch.device) -> dict[str, Any]:
    """What varlen has to be told of the samples in one row, by the names that transformers hands down to attention.

    Args:
        position_ids: int64 [1, tokens]; they restart at 0 with every sample.
    """
    bounds = np.append(np.flatnonzero(position_ids[0] == 0), position_ids.shape[1])
    longest = int(np.diff(bounds).max())
    edges = torch.from_numpy(bounds.astype(np.int32)).to(device, non_blocking=True)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample of one row, as transformers calls it.

    Args:
        query: [1, heads, tokens, head size]; ``key`` and ``value`` may have fewer heads.
        cu_seq_lens_q: int32 [samples + 1], where samples begin and the last one ends.
        max_length_q: tokens of the longest.

    Returns:
        [1, tokens, heads, head size], None.
    """
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    assert query.shape[0] == 1
    assert not dropout
    window = (sliding_window - 1 if sliding_window else -1, 0)
    grouped = query.shape[1] != key.shape[1]
    samples, tokens = len(cu_seq_lens_q) - 1, query.shape[2]
    if samples * max_length_q == tokens and not 0 <= window[0] < max_length_q - 1:
        # all equally long: SDPA has faster kernels than the variable-length one (cuDNN's, on Hopper and Blackwell)
        q, k, v = (
            tensor[0].view(tensor.shape[1], samples, max_length_q, -1).transpose(0, 1) for tensor in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped
        )  # [samples, heads, length, head size]
        return attended.transpose(1, 2).reshape(1, tokens, *attended.shape[1::2]), None
    if query.device.type == "cuda":
        from trainer.varlen_kernel import TOLD_OF_GROUPS, varlen_attn

        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        edges, longest = cu_seq_lens_q, max_length_q
        told: dict[str, Any] = {"enable_gqa": True} if grouped and TOLD_OF_GROUPS else {}
        output: Any = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scaling, window_size=window, **told)
        return output[None], None
    bounds = cu_seq_lens_q.tolist()
    pieces = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        pieces.append(_one_sample(q, k, v, scaling, window[0], grouped))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _one_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, back: int, grouped: bool
) -> torch.Tensor:
    mask, length = None, query.shape[2]
    if 0 <= back < length - 1:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = ones.tril() & ones.triu(-back)
    return functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def takes_one_row(name: str) -> bool:
    """Whether an implementation takes all samples of a micro-batch in one row without padding."""
    return name.startswith("flash_attention") or name == VARLEN
