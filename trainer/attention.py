"""Which attention a run uses, and attention over packed samples by torch's own variable-length kernel.

`varlen` computes each sample's scores alone, as FlashAttention does, without a wheel that has to fit torch and CUDA: on
GPUs by `torch.nn.attention.varlen` (the FlashAttention 2 that torch is built with), on CPUs sample by sample with SDPA,
which is also how the tests hold it against the other implementations.
"""

from __future__ import annotations

import importlib.util
import itertools
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


def choose_attention(config: LaunchConfig, model_config: Any, device: torch.device) -> tuple[str | None, str]:
    """(the implementation to ask of transformers, or None for its default: SDPA where the model can; why).

    Args:
        model_config: the transformers config of the model.
        device: where it is trained.

    Raises:
        UserError: what `model.attention` asks for cannot be.
    """
    requested = config.model.attention
    if requested == VARLEN:
        if problem := _not_varlen(config, model_config, device):
            raise UserError(f"model.attention: varlen does not go here: {problem}; use auto")
        _register()
        return VARLEN, "as configured"
    if requested == "flex_attention" and device.type == "cpu":
        raise UserError("model.attention: flex_attention has no backward pass on CPUs; use auto or sdpa")
    if requested == "flash_attention_3" and (problem := _not_flash_3(model_config, device)):
        raise UserError(f"model.attention: flash_attention_3 does not go here: {problem}; use auto")
    if requested != "auto":
        return requested, "as configured"
    if device.type != "cuda":
        return None, "no GPU"
    if not _not_flash_3(model_config, device):
        return "flash_attention_3", "flash_attn_3 is installed, and it is made for this GPU"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2", "flash_attn is installed"
    if problem := _not_varlen(config, model_config, device):
        return None, f"flash_attn is not installed, and varlen does not go here: {problem}"
    if problem := _kernel_problem(device):
        return None, f"flash_attn is not installed, and torch's variable-length kernel fails here: {problem}"
    _register()
    return VARLEN, "flash_attn is not installed; torch's own kernel keeps packed samples apart"


def inference_attention(requested: str, device: torch.device) -> str | None:
    """As `choose_attention`, for rows that are padded and generate with a cache: not for varlen."""
    if requested not in ("auto", VARLEN):
        return requested
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else None


def _not_flash_3(model_config: Any, device: torch.device) -> str | None:
    """Why FlashAttention 3 cannot be used; None: it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for Hopper GPUs"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_3 is not installed"
    if getattr(model_config.get_text_config(), "attention_dropout", 0.0):
        return "it has no dropout, and the model's attention_dropout is not 0"
    return None


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
    if getattr(text, "attention_dropout", 0.0):
        return "it has no dropout, and the model's attention_dropout is not 0"
    if device.type == "cuda":
        if config.model.dtype != "bfloat16":
            return "its kernel wants model.dtype bfloat16"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "its kernel wants a GPU of compute capability 8.0"
        if getattr(text, "head_dim", None) and text.head_dim > 256:
            return "its kernel wants heads of at most 256"
    return None


def _kernel_problem(device: torch.device) -> str | None:
    """What is wrong with the kernel on this GPU, from a trial of two samples against the CPU's way; None: nothing.

    Its signature and the GPUs it knows change with torch's versions, and what "auto" chooses has to run.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value, weight = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((1, 4, 24, 64), (1, 2, 24, 64), (1, 2, 24, 64), (1, 24, 4, 64))
    )
    bounds = sample_bounds(np.concatenate([np.arange(9), np.arange(15)])[None], torch.device("cpu"))
    found: list[list[torch.Tensor]] = []
    try:
        for where in (torch.device("cpu"), device):
            q, k, v = (tensor.to(where, copy=True).requires_grad_() for tensor in (query, key, value))
            edges, longest = bounds["cu_seq_lens_q"].to(where), bounds["max_length_q"]
            output, _ = varlen_attention(
                torch.nn.Identity(), q, k, v, None, sliding_window=8, cu_seq_lens_q=edges, max_length_q=longest
            )
            gradients = torch.autograd.grad((output.float() * weight.to(where)).sum(), (q, k, v))
            found.append([tensor.detach().float().cpu() for tensor in (output, *gradients)])
        for expected, tensor in zip(*found, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=3e-2, atol=3e-2)  # bfloat16 has 8 bits
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)


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
