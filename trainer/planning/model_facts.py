"""Facts about a model without building it: parameter names and shapes from its Hugging Face config, or from the headers
of its safetensors files. The tests hold every family against the real model on the meta device.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from trainer.config.schema import ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.planning.layouts import FAMILIES, Json, Shape, has_plain_logits, parameter_shapes, sizes_of
from trainer.selection import adapter_shapes, check_trained, layers_of, select, trained_names

HEAD = "task_head"  # what `trainer.modeling_head` calls the layers of `task.head`
_EMBEDDING = "(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|shared)"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt"})  # their layers keep weights as [in, out]
# Families whose packed samples see one another in transformers 5.23, for most attentions: they carry a state from token
# to token, or their masks know of no samples. Every run tries its own model (`trainer.forward`), once it is loaded.
MIXES_SAMPLES = frozenset(
    [
        "afmoe",
        "bailing_hybrid",
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "gpt_oss",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ]
)


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model. ``None``: not known.

    Attributes:
        parameters: how many there are; tied weights count once.
        trainable_parameters: those that are not frozen.
        lookup_parameters: embeddings that are only looked up, not multiplied with.
        idle_parameters: of experts that a token of a mixture does not run through.
        packed_parameters: those in 4 bits (QLoRA). ZeRO-3 holds four to a bfloat16, eight to a float32, and the next
            three count what it holds.
        largest_block: elements of the largest layer (embeddings and the head count as one each).
        small_parameters: elements in tensors of at most 100,000, which ZeRO-3 keeps whole on every rank.
        held_elements: all of them.
        largest_packed: parameters of the largest matrix in 4 bits.
        for_fp8: trained matrices that can be multiplied in 8 bits (`trainer.float8`), where that is known.
        expert_share: of a mixture's experts, those that a token runs through.
        pinned: frozen weights are in the model's own files, and checkpoints leave them out.
        vocabulary: tokens that the head predicts; None where it predicts none.
        trained_head: the matrix of the head is trained; with tied weights, the embeddings' is.
        plain_logits: the model is known to hand out what its head, a plain matrix, gives.
        gated: whether the MLP multiplies two projections (SwiGLU, GeGLU).
        tower: sizes of the layers that read images, where they are trained; the others here are those of the text's.
        patches_per_token: of an image, for each of the tokens that stand for it.
        source: where the counts come from.
        note: what is not known, and why.
    """

    model_type: str
    parameters: int | None = None
    trainable_parameters: int | None = None
    lookup_parameters: int = 0
    idle_parameters: int | None = 0
    packed_parameters: int = 0
    largest_block: int | None = None
    small_parameters: int = 0
    held_elements: int | None = None
    largest_packed: int = 0
    for_fp8: int | None = None
    expert_share: float | None = 1.0
    pinned: bool = False
    vocabulary: int | None = None
    hidden_size: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    trained_head: bool = True
    plain_logits: bool = False
    gated: bool = True
    max_positions: int | None = None
    tower: ModelFacts | None = None
    patches_per_token: int = 1
    source: Literal["config", "safetensors", "unknown"] = "unknown"
    note: str | None = None


def model_facts(
    model: ModelConfig,
    patterns: Mapping[str, Sequence[str]] = MappingProxyType({}),
    new_head: bool = False,
    head_sizes: Sequence[int] = (),
) -> ModelFacts:
    """The facts of the config's `model` section: reads config.json and safetensors headers, never weights.

    Args:
        model: the section.
        patterns: of parameters besides the section's own, by their keys in the config.
        new_head: the task puts one of its own on the model, which predicts no tokens. Its parameters, and so what
            patterns match, are not known;
        head_sizes: but for layers of these widths in it.

    Raises:
        UserError: the folder or its config.json cannot be read, a size in it is wrong, or `freeze`, an adapter or one
            of ``patterns`` matches nothing.
    """
    config = read_config(model)
    if config is None:
        note = (
            f"{model.path} is not in the Hugging Face cache of this machine; `hf download {model.path}` puts it there"
        )
        return ModelFacts("unknown", note=note)
    facts = facts_of_config(
        config, model.freeze, model.train_only, model.adapter, patterns, new_head, head_sizes, model.dtype
    )
    folder = model.path and model_folder(model.path)
    if not folder:
        return facts
    shapes = {} if facts.parameters is not None else safetensors_shapes(folder)
    facts = replace(facts, pinned=next(folder.glob("*.safetensors"), None) is not None)
    if not shapes:
        return facts
    # names in a file may carry another prefix than the model's own; these two families' also lack a part
    if facts.model_type in ("qwen2_vl", "qwen2_5_vl"):
        text = re.compile(r"^model\.(?!language_model\.|visual\.)")
        shapes = {text.sub("model.language_model.", name): shape for name, shape in shapes.items()}
    facts = replace(facts, source="safetensors")
    return _counted(facts, shapes, model.freeze, model.train_only, model.adapter, new_head, model.dtype, strict=False)


def _run_of(folder: Path) -> Path | None:
    """The run whose directory, or a checkpoint in it, a folder is."""
    run = folder.parent if folder.name == "checkpoints" else folder
    run = folder.parent.parent if folder.parent.name == "checkpoints" else run
    return run if (run / "attempts").is_dir() else None


def facts_of_config(
    config: Json,
    freeze: tuple[str, ...] = (),
    train_only: tuple[str, ...] = (),
    adapter: AdapterConfig | None = None,
    patterns: Mapping[str, Sequence[str]] = MappingProxyType({}),
    new_head: bool = False,
    head_sizes: Sequence[int] = (),
    dtype: str = "bfloat16",
) -> ModelFacts:
    """As `model_facts`, of a Hugging Face config dict; the counts only for families whose layout is known here."""
    model_type = str(config.get("model_type", "unknown"))
    family = FAMILIES.get(model_type)
    facts = replace(_sized(config.get("text_config") or config), model_type=model_type)
    if new_head:
        facts = replace(facts, vocabulary=None)
    if isinstance(tower := config.get("vision_config"), Mapping):
        facts = replace(facts, tower=_tower(tower), patches_per_token=_patches_per_token(config, tower))
    if adapter is not None and adapter.type == "qlora" and model_type in TRANSPOSED:
        raise UserError(f"model.adapter: qlora packs torch.nn.Linear, which {model_type} has not; use lora")
    if family is None:
        return replace(facts, note=f"the parameter layout of model_type {model_type!r} is not known to dsft")
    shapes = dict(parameter_shapes(config))
    if new_head:
        shapes.pop("lm_head.weight", None)
        for index, (width, size) in enumerate(pairwise((facts.hidden_size or 0, *head_sizes))):
            shapes |= {f"{HEAD}.{index}.weight": (size, width), f"{HEAD}.{index}.bias": (size,)}
    elif adapter is None:  # which adds parameters
        trained = trained_names(list(shapes), freeze, train_only)
        for key, found in patterns.items():
            check_trained(select(list(shapes), found, key), trained, key)
    facts = replace(facts, source="config")
    return _counted(facts, shapes, freeze, train_only, adapter, new_head, dtype, strict=not new_head)


def _tower(config: Json) -> ModelFacts:
    """Sizes of the layers that read images, also by the names that Qwen has for them."""
    names = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "embed_dim": "hidden_size"}
    renamed = {names[key]: value for key, value in config.items() if key in names}
    return replace(_sized({**config, **renamed}), gated=False)


def _patches_per_token(config: Json, tower: Json) -> int:
    """How many patches of an image the tower reads for each token that the text model does."""
    side = config.get("scale_factor") or config.get("downsample_factor") or 1 / (config.get("downsample_ratio") or 1)
    side = max(side, *(part.get("spatial_merge_size") or 1 for part in (config, tower)))
    size, patch, tokens = tower.get("image_size"), tower.get("patch_size"), config.get("mm_tokens_per_image")
    if isinstance(size, int) and isinstance(patch, int) and isinstance(tokens, int):  # of Gemma 3
        return (size // patch) ** 2 // tokens or 1
    return round(side**2)


def _sized(config: Json) -> ModelFacts:
    """Facts without counts."""
    model_type = str(config.get("model_type", "unknown"))
    family = FAMILIES.get(model_type)
    sizes = sizes_of(config, family)
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 1)
    chosen = config.get("num_experts_per_tok")
    return ModelFacts(
        model_type,
        expert_share=1.0 if experts <= 1 else chosen / experts if isinstance(chosen, int) else None,
        vocabulary=sizes.get("vocab_size"),
        hidden_size=sizes.get("hidden_size"),
        layers=sizes.get("num_hidden_layers"),
        heads=sizes.get("num_attention_heads"),
        kv_heads=sizes.get("num_key_value_heads") or sizes.get("num_attention_heads"),
        head_dim=sizes.get("head_dim"),
        intermediate_size=sizes.get("intermediate_size"),
        plain_logits=has_plain_logits(config),
        gated=family.gated if family else True,
        max_positions=sizes.get("max_position_embeddings"),
    )


def _counted(
    facts: ModelFacts,
    shapes: Mapping[str, Shape],
    freeze: tuple[str, ...],
    train_only: tuple[str, ...],
    adapter: AdapterConfig | None,
    new_head: bool,
    dtype: str,
    strict: bool,
) -> ModelFacts:
    packed: set[str] = set()
    if adapter is None:
        trained = trained_names(list(shapes), freeze, train_only, strict)
    else:
        added = dict(adapter_shapes(shapes, adapter))
        if adapter.type == "qlora":
            packed = {name.replace(".lora_A.", ".") for name in added if ".lora_A." in name}
        trained = added.keys() | select(list(shapes), adapter.modules_to_save, "model.adapter.modules_to_save", strict)
        trained |= {name for name in shapes if name.startswith(f"{HEAD}.")}
        shapes = {**shapes, **added}
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    to_an_element = 4 if dtype == "bfloat16" else 8
    held = {name: count // to_an_element if name in packed else count for name, count in counts.items()}
    blocks: dict[str, int] = {}
    for name, count in held.items():
        match = re.match(r".*?\.\d+(?=\.)", name)
        block = match[0] if match else name
        blocks[block] = blocks.get(block, 0) + count
    heads = [name for name in counts if re.search(r"(lm_head|embed_out)\.weight$", name)]
    tied = not new_head and not heads
    embeddings = [name for name in counts if re.search(rf"{_EMBEDDING}\.weight$", name)]
    lookups = [] if tied else list(embeddings)
    lookups += [name for name in counts if re.search(r"(wpe|embed_positions|position_embeddings)\.weight$", name)]
    return replace(
        facts,
        parameters=sum(counts.values()),
        trainable_parameters=sum(counts[name] for name in trained),
        lookup_parameters=sum(counts[name] for name in lookups),
        idle_parameters=_idle(facts.expert_share, counts, shapes),
        packed_parameters=sum(counts[name] for name in packed),
        largest_block=max(blocks.values()),
        tower=facts.tower if any("vision" in name or "visual" in name for name in trained) else None,
        small_parameters=sum(count for count in held.values() if count <= 100_000),
        held_elements=sum(held.values()),
        largest_packed=max((counts[name] for name in packed), default=0),
        trained_head=not trained.isdisjoint(embeddings if tied else heads),
        for_fp8=_for_fp8(facts, shapes, trained) if facts.source == "config" else None,
        plain_logits=facts.plain_logits
        and not any(re.match(r"(lm_head|embed_out)\.lora_A\.", name) for name in trained),
        note=None,
    )


def _idle(share: float | None, counts: Mapping[str, int], shapes: Mapping[str, Shape]) -> int | None:
    """Parameters of the experts that are not chosen; None where that cannot be told."""
    if share == 1.0:
        return 0
    inside = [count for name, count in counts.items() if ".experts." in name or len(shapes[name]) == 3]
    return None if share is None or not inside else round((1 - share) * sum(inside))


def _for_fp8(facts: ModelFacts, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    matrices = set(trained) & layers_of(shapes).keys() if facts.model_type not in TRANSPOSED else set()
    return sum(len(shapes[name]) == 2 and not any(side % 16 for side in shapes[name]) for name in matrices)


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


def read_config(model: ModelConfig) -> dict[str, Any] | None:
    """The Hugging Face config of the config's `model` section; None where it is the hub's, and not cached.

    Raises:
        UserError: the folder or its config.json cannot be read.
    """
    if model.path is None:
        return model.config
    folder = model_folder(model.path)
    if folder is None:
        return None
    if (run := _run_of(folder)) is not None:
        raise UserError(
            f"model.path: {folder} is of a run of dsft; name its model, {run / 'export'}, or that of an earlier step: "
            f"`dsft export {run} --step N --output DIR`"
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.path: {folder} has no config.json; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"model.path: {path} is not a JSON object; expected a Hugging Face model config")
    return config


def safetensors_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes from the headers of a folder's safetensors files; no weights."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, Shape] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.path: {path} is not a whole safetensors file: {error}") from error
    return shapes
