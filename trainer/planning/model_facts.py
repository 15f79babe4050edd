"""Facts about a model without building it: parameter names and shapes from its Hugging Face config, or from the headers
of its safetensors files. The tests hold every family against the real model on the meta device.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.config.schema import ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.selection import adapter_shapes, select, trained_names

Shape = tuple[int, ...]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model. ``None``: not known.

    Attributes:
        parameters: how many there are; tied weights count once.
        trainable_parameters: those that are not frozen.
        lookup_parameters: embeddings that are only looked up, not multiplied with.
        largest_block: parameters of the largest layer (embeddings and the head count as one each).
        pinned: frozen weights are in the model's own files, and checkpoints leave them out.
        small_parameters: parameters in tensors of at most 100,000 elements, which ZeRO-3 keeps whole on every rank.
        gated: whether the MLP multiplies two projections (SwiGLU, GeGLU).
        source: where the counts come from.
        note: what is not known, and why.
    """

    model_type: str
    parameters: int | None = None
    trainable_parameters: int | None = None
    lookup_parameters: int = 0
    largest_block: int | None = None
    small_parameters: int = 0
    pinned: bool = False
    vocabulary: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    gated: bool = True
    max_positions: int | None = None
    source: Literal["config", "safetensors", "unknown"] = "unknown"
    note: str | None = None


@dataclass(frozen=True)
class _Family:
    """How a model type lays out its parameters; defaults are those of its transformers config class."""

    shapes: Callable[[dict[str, Any]], Iterator[tuple[str, Shape]]]
    defaults: Json
    # Llama-like layouts differ in little:
    qkv_bias: bool = False
    bias_keys: tuple[str, ...] = ("attention_bias",)  # config keys that this family heeds
    qk_norm: Literal["", "head", "all"] = ""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    gated: bool = True


def model_facts(model: ModelConfig) -> ModelFacts:
    """The facts of the config's `model` section: reads config.json and safetensors headers, never weights.

    Raises:
        UserError: the folder or its config.json cannot be read, a size in it is wrong, or `freeze` or an adapter
            matches nothing.
    """
    if model.config is not None:
        return facts_of_config(model.config, model.freeze, model.train_only, model.adapter)
    assert model.path is not None
    folder = model_folder(model.path)
    if folder is None:
        note = (
            f"{model.path} is not in the Hugging Face cache of this machine; `hf download {model.path}` puts it there"
        )
        return ModelFacts("unknown", note=note)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path: {folder} has no config.json; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"model.path: {path} is not a JSON object; expected a Hugging Face model config")
    facts = facts_of_config(config, model.freeze, model.train_only, model.adapter)
    shapes = {} if facts.parameters is not None else safetensors_shapes(folder)
    facts = replace(facts, pinned=next(folder.glob("*.safetensors"), None) is not None)
    if not shapes:
        return facts
    return _counted(facts, shapes, model.freeze, model.train_only, model.adapter, "safetensors")


def facts_of_config(
    config: Json,
    freeze: tuple[str, ...] = (),
    train_only: tuple[str, ...] = (),
    adapter: AdapterConfig | None = None,
) -> ModelFacts:
    """The facts of a Hugging Face config dict; the counts only for families whose layout is known here."""
    model_type = str(config.get("model_type", "unknown"))
    family = _FAMILIES.get(model_type)
    sizes = _sizes(config, family)
    facts = ModelFacts(
        model_type,
        vocabulary=sizes.get("vocab_size"),
        hidden_size=sizes.get("hidden_size"),
        layers=sizes.get("num_hidden_layers"),
        heads=sizes.get("num_attention_heads"),
        kv_heads=sizes.get("num_key_value_heads") or sizes.get("num_attention_heads"),
        head_dim=sizes.get("head_dim"),
        intermediate_size=sizes.get("intermediate_size"),
        gated=family.gated if family else True,
        max_positions=sizes.get("max_position_embeddings"),
    )
    if family is None:
        return replace(facts, note=f"the parameter layout of model_type {model_type!r} is not known to dsft")
    shapes = dict(parameter_shapes(config))
    tied = bool(sizes["tie_word_embeddings"])
    return _counted(facts, shapes, freeze, train_only, adapter, "config", tied)


def parameter_shapes(config: Json) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every parameter of a known family, in the model's own names; tied weights once.

    Raises:
        KeyError: the family is not known.
        UserError: a size is not a positive integer, or heads do not divide what they share.
    """
    family = _FAMILIES[config["model_type"]]
    sizes = _sizes(config, family)
    return family.shapes({**sizes, "family": family})


def _counted(
    facts: ModelFacts,
    shapes: Mapping[str, Shape],
    freeze: tuple[str, ...],
    train_only: tuple[str, ...],
    adapter: AdapterConfig | None,
    source: Literal["config", "safetensors"],
    tied: bool = True,
) -> ModelFacts:
    strict = source == "config"  # names in a file may carry another prefix than the model's own
    if adapter is None:
        trained = trained_names(list(shapes), freeze, train_only, strict)
    else:
        added = dict(adapter_shapes(shapes, adapter))
        trained = added.keys() | select(list(shapes), adapter.modules_to_save, "model.adapter.modules_to_save", strict)
        shapes = {**shapes, **added}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    blocks: dict[str, int] = {}
    for name, count in counts.items():
        match = re.match(r".*?\.\d+(?=\.)", name)
        block = match[0] if match else name
        blocks[block] = blocks.get(block, 0) + count
    lookups = [name for name in counts if re.search(r"(embed_tokens|wte|embed_in)\.weight$", name) and not tied]
    lookups += [name for name in counts if re.search(r"(wpe|embed_positions|position_embeddings)\.weight$", name)]
    return replace(
        facts,
        parameters=sum(counts.values()),
        trainable_parameters=sum(counts[name] for name in trained),
        lookup_parameters=sum(counts[name] for name in lookups),
        largest_block=max(blocks.values()),
        small_parameters=sum(count for count in counts.values() if count <= 100_000),
        source=source,
        note=None,
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


def _sizes(config: Json, family: _Family | None) -> dict[str, Any]:
    """The config's sizes under their common names, with the defaults of the family."""
    ignored = "intermediate_size" if config.get("model_type") == "gpt2" else None  # GPT-2 reads `n_inner` alone
    given = {_SYNONYMS.get(key, key): value for key, value in config.items() if key != ignored}
    sizes: dict[str, Any] = {**(family.defaults if family else {}), **given}
    # `None` stands for a value derived from others, where the config class has one
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads")
    if family and sizes.get("intermediate_size") is None and isinstance(sizes.get("hidden_size"), int):
        sizes["intermediate_size"] = 4 * sizes["hidden_size"]
    checked = [*_REQUIRED, "num_key_value_heads"] if family else []
    for key in checked:
        value = sizes.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UserError(f"model.config.{key}: found {json.dumps(value)}; expected a positive integer")
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


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, size: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if bias:
        yield f"{name}.bias", (size,)


def _llama(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Llama and those that differ from it by biases, norms on queries and keys, and norms around sublayers."""
    family: _Family = c["family"]
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    o_bias, mlp_bias = (key in family.bias_keys and bool(c.get(key)) for key in ("attention_bias", "mlp_bias"))
    qkv_bias = family.qkv_bias or o_bias
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _linear(f"{layer}.self_attn.q_proj", queries, hidden, qkv_bias)
        yield from _linear(f"{layer}.self_attn.k_proj", keys, hidden, qkv_bias)
        yield from _linear(f"{layer}.self_attn.v_proj", keys, hidden, qkv_bias)
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, queries, o_bias)
        if family.qk_norm:
            yield from _norm(f"{layer}.self_attn.q_norm", head if family.qk_norm == "head" else queries)
            yield from _norm(f"{layer}.self_attn.k_norm", head if family.qk_norm == "head" else keys)
        yield from _linear(f"{layer}.mlp.gate_proj", inner, hidden, mlp_bias)
        yield from _linear(f"{layer}.mlp.up_proj", inner, hidden, mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", hidden, inner, mlp_bias)
        for norm in family.norms:
            yield from _norm(f"{layer}.{norm}", hidden)
    yield from _norm("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _phi3(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.self_attn.qkv_proj.weight", (queries + 2 * keys, hidden)
        yield f"{layer}.mlp.gate_up_proj.weight", (2 * inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _gpt2(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    yield "transformer.wte.weight", (c["vocab_size"], hidden)
    yield "transformer.wpe.weight", (c["max_position_embeddings"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        yield from _norm(f"{layer}.ln_1", hidden, True)
        # Conv1D keeps its matrices transposed
        yield f"{layer}.attn.c_attn.weight", (hidden, 3 * hidden)
        yield f"{layer}.attn.c_attn.bias", (3 * hidden,)
        yield f"{layer}.attn.c_proj.weight", (hidden, hidden)
        yield f"{layer}.attn.c_proj.bias", (hidden,)
        yield from _norm(f"{layer}.ln_2", hidden, True)
        yield f"{layer}.mlp.c_fc.weight", (hidden, inner)
        yield f"{layer}.mlp.c_fc.bias", (inner,)
        yield f"{layer}.mlp.c_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.c_proj.bias", (hidden,)
    yield from _norm("transformer.ln_f", hidden, True)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], hidden)


def _gpt_neox(c: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c["attention_bias"])
    yield "gpt_neox.embed_in.weight", (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        yield from _norm(f"{layer}.input_layernorm", hidden, True)
        yield from _norm(f"{layer}.post_attention_layernorm", hidden, True)
        yield from _linear(f"{layer}.attention.query_key_value", 3 * hidden, hidden, bias)
        yield from _linear(f"{layer}.attention.dense", hidden, hidden, bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", inner, hidden, True)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", hidden, inner, True)
    yield from _norm("gpt_neox.final_layer_norm", hidden, True)
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

_FAMILIES: dict[str, _Family] = {
    "llama": _Family(_llama, _defaults(32000, 4096, 11008, 32, 32, None, 2048), bias_keys=_BOTH),
    "mistral": _Family(_llama, _defaults(32000, 4096, 14336, 32, 32, 8, 131072), bias_keys=()),
    "qwen2": _Family(_llama, _defaults(151936, 4096, 22016, 32, 32, 32, 32768), qkv_bias=True, bias_keys=()),
    "qwen3": _Family(_llama, _defaults(151936, 4096, 22016, 32, 32, 32, 32768, head_dim=128), qk_norm="head"),
    "gemma": _Family(_llama, _GEMMA),
    "gemma2": _Family(_llama, _GEMMA2, norms=_GEMMA2_NORMS),
    "gemma3_text": _Family(_llama, _GEMMA3, norms=_GEMMA2_NORMS, qk_norm="head"),
    "olmo2": _Family(_llama, _defaults(50304, 4096, 11008, 32, 32, None, 2048), norms=_OLMO2_NORMS, qk_norm="all"),
    "smollm3": _Family(_llama, _defaults(128256, 2048, 11008, 36, 16, 4, 32768, tied=True), bias_keys=_BOTH),
    "granite": _Family(_llama, _defaults(32000, 4096, 11008, 32, 32, None, 2048), bias_keys=_BOTH),
    "phi3": _Family(_phi3, _defaults(32064, 3072, 8192, 32, 32, None, 4096)),
    "gpt2": _Family(_gpt2, _defaults(50257, 768, None, 12, 12, None, 1024, tied=True), gated=False),
    "gpt_neox": _Family(_gpt_neox, _defaults(50432, 6144, 24576, 44, 64, None, 2048, attention_bias=True), gated=False),
}


# -- files -------------------------------------------------------------------------------------------------------------


def model_folder(path: str) -> Path | None:
    """The folder of a local model, or of a hub id in the Hugging Face cache; None where it is not cached.

    Raises:
        UserError: a local path is not a folder.
    """
    if os.path.isabs(path):
        if not os.path.isdir(path):
            raise UserError(f"model.path: there is no folder {path}; expected a Hugging Face model folder or a hub id")
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def safetensors_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes from the headers of a folder's safetensors files (8 bytes of length, then JSON); no weights."""
    shapes: dict[str, Shape] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > 100_000_000:  # the limit of the format
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"model.path: {path} is not a whole safetensors file: {error}") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes
