"""How families of models lay out their parameters: names and shapes from a Hugging Face config, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.failures import UserError

Shape = tuple[int, ...]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How a model type lays out its parameters; defaults are those of its transformers config class."""

    shapes: Callable[[dict[str, Any]], Iterator[tuple[str, Shape]]]
    defaults: Json
    # Llama-like layouts differ in little:
    qkv_bias: bool = False
    bias_keys: tuple[str, ...] = ("attention_bias",)  # config keys that this family heeds
    qk_norm: Literal["", "head", "all"] = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    gated: bool = True
    joined: bool = False  # queries, keys and values are one matrix, gate and up another


def parameter_shapes(config: Json) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every parameter of a known family, in the model's own names; tied weights once.

    Raises:
        KeyError: the family is not known.
        UserError: a size is not a positive integer, or heads do not divide what they share.
    """
    family = FAMILIES[config["model_type"]]
    sizes = sizes_of(config, family)
    return family.shapes({**sizes, "family": family})


def has_plain_logits(config: Json) -> bool:
    """Whether the model is known to hand out what its head gives: neither scaled nor soft-capped."""
    return (
        config.get("model_type") in PLAIN_LOGITS
        and config.get("logits_scaling", 1) == 1
        and not config.get("final_logit_softcapping")
    )


# -- sizes -------------------------------------------------------------------------------------------------------------

_SYNONYMS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def sizes_of(config: Json, family: Family | None) -> dict[str, Any]:
    """The config's sizes under their common names, with the defaults of the family."""
    ignored = "intermediate_size" if config.get("model_type") == "gpt2" else None  # GPT-2 reads `n_inner` alone
    given = {_SYNONYMS.get(key, key): value for key, value in config.items() if key != ignored}
    sizes: dict[str, Any] = {**(family.defaults if family else {}), **given}
    # `None` stands for a value derived from others, where the config class has one
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    if family and sizes.get("intermediate_size") is None and isinstance(sizes.get("hidden_size"), int):
        sizes["intermediate_size"] = 4 * sizes["hidden_size"]
    for key in (*_REQUIRED, *_OPTIONAL):
        value = sizes.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            continue
        if family and (value is not None or key in _REQUIRED):
            raise UserError(f"model.config.{key}: found {json.dumps(value)}; expected a positive integer")
        sizes[key] = None  # a family that is not known here may have a list of them
    hidden, heads, kv = (sizes.get(k) for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if sizes.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if family and hidden % heads:
            raise UserError(f"model.config: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        sizes["head_dim"] = hidden // heads
    if isinstance(heads, int) and isinstance(kv, int) and family and heads % kv:
        raise UserError(
            f"model.config: num_attention_heads {heads} is not divisible by num_key_value_heads {kv} "
            f"({'given' if 'num_key_value_heads' in given else 'the default of this model_type: give your own'})"
        )
    return sizes


# -- layouts -----------------------------------------------------------------------------------------------------------


def _module(name: str, *shape: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    """A linear layer or a norm."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _llama(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Llama and those that differ from it by biases, norms on queries and keys, norms around sublayers, and matrices
    that are one."""
    family: Family = c["family"]
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    o_bias, mlp_bias = (key in family.bias_keys and bool(c.get(key)) for key in ("attention_bias", "mlp_bias"))
    qkv_bias = family.qkv_bias or o_bias
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        if family.joined:
            yield from _module(f"{layer}.self_attn.qkv_proj", queries + 2 * keys, hidden)
            yield from _module(f"{layer}.mlp.gate_up_proj", 2 * inner, hidden)
        else:
            yield from _module(f"{layer}.self_attn.q_proj", queries, hidden, bias=qkv_bias)
            yield from _module(f"{layer}.self_attn.k_proj", keys, hidden, bias=qkv_bias)
            yield from _module(f"{layer}.self_attn.v_proj", keys, hidden, bias=qkv_bias)
            yield from _module(f"{layer}.mlp.gate_proj", inner, hidden, bias=mlp_bias)
            yield from _module(f"{layer}.mlp.up_proj", inner, hidden, bias=mlp_bias)
        yield from _module(f"{layer}.self_attn.o_proj", hidden, queries, bias=o_bias)
        yield from _module(f"{layer}.mlp.down_proj", hidden, inner, bias=mlp_bias)
        if family.qk_norm:
            yield from _module(f"{layer}.self_attn.q_norm", head if family.qk_norm == "head" else queries)
            yield from _module(f"{layer}.self_attn.k_norm", head if family.qk_norm == "head" else keys)
        for norm in family.norms:
            yield from _module(f"{layer}.{norm}", hidden)
    yield from _module("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _gpt2(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    yield "transformer.wte.weight", (c["vocab_size"], hidden)
    yield "transformer.wpe.weight", (c["max_position_embeddings"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        yield from _module(f"{layer}.ln_1", hidden, bias=True)
        # Conv1D keeps its matrices transposed
        yield f"{layer}.attn.c_attn.weight", (hidden, 3 * hidden)
        yield f"{layer}.attn.c_attn.bias", (3 * hidden,)
        yield f"{layer}.attn.c_proj.weight", (hidden, hidden)
        yield f"{layer}.attn.c_proj.bias", (hidden,)
        yield from _module(f"{layer}.ln_2", hidden, bias=True)
        yield f"{layer}.mlp.c_fc.weight", (hidden, inner)
        yield f"{layer}.mlp.c_fc.bias", (inner,)
        yield f"{layer}.mlp.c_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.c_proj.bias", (hidden,)
    yield from _module("transformer.ln_f", hidden, bias=True)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _gpt_neox(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c["attention_bias"])
    yield "gpt_neox.embed_in.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        yield from _module(f"{layer}.input_layernorm", hidden, bias=True)
        yield from _module(f"{layer}.post_attention_layernorm", hidden, bias=True)
        yield from _module(f"{layer}.attention.query_key_value", 3 * hidden, hidden, bias=bias)
        yield from _module(f"{layer}.attention.dense", hidden, hidden, bias=bias)
        yield from _module(f"{layer}.mlp.dense_h_to_4h", inner, hidden, bias=True)
        yield from _module(f"{layer}.mlp.dense_4h_to_h", hidden, inner, bias=True)
    yield from _module("gpt_neox.final_layer_norm", hidden, bias=True)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _defaults(
    vocabulary: int,
    hidden: int,
    inner: int | None,
    layers: int,
    heads: int,
    kv_heads: int | None,
    positions: int,
    *,
    tied: bool = False,
    head_dim: int | None = None,
    attention_bias: bool = False,
) -> Json:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "head_dim": head_dim,
        "attention_bias": attention_bias,
    }


_GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_BOTH = ("attention_bias", "mlp_bias")
_OLMO2_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

_GEMMA = _defaults(256000, 3072, 24576, 28, 16, 16, 8192, tied=True, head_dim=256)
_GEMMA2 = _defaults(256000, 2304, 9216, 26, 8, 4, 8192, tied=True, head_dim=256)
_GEMMA3 = _defaults(262208, 2304, 9216, 26, 8, 4, 131072, tied=True, head_dim=256)

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _defaults(32000, 4096, 11008, 32, 32, None, 2048), bias_keys=_BOTH),
    "mistral": Family(_llama, _defaults(32000, 4096, 14336, 32, 32, 8, 131072), bias_keys=()),
    "qwen2": Family(_llama, _defaults(151936, 4096, 22016, 32, 32, 32, 32768), qkv_bias=True, bias_keys=()),
    "qwen3": Family(_llama, _defaults(151936, 4096, 22016, 32, 32, 32, 32768, head_dim=128), qk_norm="head"),
    "gemma": Family(_llama, _GEMMA),
    "gemma2": Family(_llama, _GEMMA2, norms=_GEMMA2_NORMS),
    "gemma3_text": Family(_llama, _GEMMA3, norms=_GEMMA2_NORMS, qk_norm="head"),
    "olmo2": Family(_llama, _defaults(50304, 4096, 11008, 32, 32, None, 2048), norms=_OLMO2_NORMS, qk_norm="all"),
    "smollm3": Family(_llama, _defaults(128256, 2048, 11008, 36, 16, 4, 32768, tied=True), bias_keys=_BOTH),
    "granite": Family(_llama, _defaults(32000, 4096, 11008, 32, 32, None, 2048), bias_keys=_BOTH),
    "phi3": Family(_llama, _defaults(32064, 3072, 8192, 32, 32, None, 4096), joined=True, bias_keys=()),
    "gpt2": Family(_gpt2, _defaults(50257, 768, None, 12, 12, None, 1024, tied=True), gated=False),
    "gpt_neox": Family(_gpt_neox, _defaults(50432, 6144, 24576, 44, 64, None, 2048, attention_bias=True), gated=False),
}

# They hand out what their head gives, unless the config says otherwise; tests/trainer/test_forward.py proves it of each
PLAIN_LOGITS = FAMILIES.keys() - {"gemma2"} | {
    *("exaone4", "glm4", "glm4_moe", "gpt_oss", "granitemoe", "llama4_text", "ministral3", "mixtral", "olmo3", "phi"),
    *("qwen2_moe", "qwen3_moe", "seed_oss", "starcoder2"),
}
