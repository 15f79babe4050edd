"""What gpu.py compares: models, and ways to train them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE = 2e-5
# As in the config.json of Qwen3-1.7B, Llama-3.2-3B and Llama-3.1-8B, vocabularies too; the tokenizer is a small one
MODELS: dict[str, dict[str, Any]] = {
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 2048},
}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        sets: changes of dsft's config; both sides are planned from it. FOLDER stands for the benchmark's own.
        hf: further TrainingArguments of transformers' Trainer; None: dsft trains.
        attention: HF's attn_implementation; None: FlashAttention 2 where it is installed, else SDPA.
        padded: HF's rows are single samples of about one length, padded, in micro-batches of as many tokens at most.
        apart: it rounds otherwise, or learns less or in another order: its losses are not compared with the others'.
    """

    sets: tuple[str, ...] = ()
    hf: dict[str, Any] | None = None
    attention: str | None = None
    padded: bool = False
    apart: bool = False

    @property
    def side(self) -> str:
        return "dsft" if self.hf is None else "hf"


def _hf(stage: int, recompute: bool, arguments: dict[str, Any], *sets: str, **settings: Any) -> Variant:
    sets += (f"deepspeed.zero_stage={stage}", f"model.gradient_checkpointing={json.dumps(recompute)}")
    return Variant(sets, arguments, **settings)


# Liger's fused head takes the head's weight outside of its module, where ZeRO-3 has not gathered it
_LIGER: dict[str, Any] = {"use_liger_kernel": True}
_LIGER_3 = _LIGER | {"liger_kernel_config": {"fused_linear_cross_entropy": False, "cross_entropy": True}}
_STAGE_2 = "deepspeed.zero_stage=2"
_COMPILED = "model.compile=true"
VARIANTS: dict[str, Variant] = {
    "dsft, ZeRO-3": Variant(),
    "dsft, ZeRO-3, whole logits": Variant(("model.fused_loss=false",)),
    "dsft, ZeRO-3, compiled": Variant((_COMPILED,)),
    "dsft, ZeRO-2": Variant((_STAGE_2,)),
    "dsft, ZeRO-2, compiled": Variant((_STAGE_2, _COMPILED)),
    "fp8 rowwise: dsft, ZeRO-3, compiled": Variant((_COMPILED, "model.fp8=rowwise"), apart=True),
    "fp8 tensorwise: dsft, ZeRO-3, compiled": Variant((_COMPILED, "model.fp8=tensorwise"), apart=True),
    "fp8 tensorwise: dsft, ZeRO-2, compiled": Variant((_STAGE_2, _COMPILED, "model.fp8=tensorwise"), apart=True),
    "HF Trainer, ZeRO-2, kept, Liger": _hf(2, False, _LIGER),
    "HF Trainer, ZeRO-2, recomputed, Liger": _hf(2, True, _LIGER),
    "HF Trainer, ZeRO-3, kept, Liger": _hf(3, False, _LIGER_3),
    "HF Trainer, ZeRO-3, recomputed, Liger": _hf(3, True, _LIGER_3),
    "HF Trainer, ZeRO-3, recomputed": _hf(3, True, {}),
}
# only where a sequence has many samples
PACKED: dict[str, Variant] = {
    "dsft, ZeRO-2, flex attention": Variant((_STAGE_2, "model.attention=flex_attention")),
    "HF Trainer, ZeRO-2, kept, Liger, flex attention": _hf(2, False, _LIGER, attention="flex_attention"),
    "HF Trainer, ZeRO-2, kept, Liger, padded by length": _hf(2, False, _LIGER, padded=True, apart=True),
}
# each has its own measure beside speed: memory, or how long training stands still for a save
OTHERS: dict[str, Variant] = {
    "other: dsft, LoRA": Variant(("model.adapter.type=lora",), apart=True),
    "other: dsft, QLoRA": Variant(("model.adapter.type=qlora",), apart=True),
    "other: dsft, optimizer in files": Variant(
        ("deepspeed.offload_optimizer=nvme", "deepspeed.nvme_path=FOLDER"), apart=True
    ),
    "other: dsft, a save at every fifth step": Variant(("checkpoint.interval_steps=5",), apart=True),
}
# its steps are relative to the size of the weights
_ADAFACTOR = ("training.optimizer.type=adafactor", "training.optimizer.learning_rate=1e-3")
_HF_ADAFACTOR: dict[str, Any] = {"optim": "adafactor", "learning_rate": 1e-3}
LARGE: dict[str, Variant] = {
    "dsft, 8B, Adafactor": Variant(_ADAFACTOR),
    "dsft, 8B, Adafactor, compiled": Variant((*_ADAFACTOR, _COMPILED)),
    "fp8 rowwise: dsft, 8B, Adafactor, compiled": Variant((*_ADAFACTOR, _COMPILED, "model.fp8=rowwise"), apart=True),
    "fp8 tensorwise: dsft, 8B, Adafactor, compiled": Variant(
        (*_ADAFACTOR, _COMPILED, "model.fp8=tensorwise"), apart=True
    ),
    # its Adafactor makes steps of another size, from weights that it draws itself
    "HF Trainer, 8B, Adafactor, ZeRO-3, kept, Liger": _hf(3, False, _LIGER_3 | _HF_ADAFACTOR, *_ADAFACTOR, apart=True),
    "HF Trainer, 8B, Adafactor, ZeRO-3, recomputed, Liger": _hf(
        3, True, _LIGER_3 | _HF_ADAFACTOR, *_ADAFACTOR, apart=True
    ),
}
SMALL = {name: VARIANTS[name] for name in ("dsft, ZeRO-3", "fp8 rowwise: dsft, ZeRO-3, compiled")}
SMALL |= {"HF Trainer, ZeRO-3, recomputed": VARIANTS["HF Trainer, ZeRO-3, recomputed"]}
SMALL |= {"HF Trainer, ZeRO-2, padded by length": _hf(2, False, {}, padded=True, apart=True)}  # Liger wants a GPU
SMALL |= {"other: dsft, a save at every fifth step": OTHERS["other: dsft, a save at every fifth step"]}


def variants_of(model: str, data: str) -> dict[str, Variant]:
    """All that can be run with a model on this kind of data, by name."""
    if model == "8b":
        return LARGE
    return {**VARIANTS, **({} if data == "documents" else PACKED), **OTHERS}


def config_of(
    model: str,
    text: Path,
    folder: Path,
    *,
    weights: Path | None = None,
    name: str = "run",
    length: int = 4096,
    batch: int = 16,
    micro: int | str = "auto",
    steps: int = 15,
    on_long: str = "truncate",
) -> dict[str, Any]:
    """The config of a run of ``model`` (of MODELS) on ``text``; without ``weights`` it draws its own."""
    shape = {"model_type": "llama", "max_position_embeddings": length, **MODELS[model]}
    origin: dict[str, Any] = {"path": str(weights)} if weights else {"config": shape}
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": origin | {"tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(text)}],
            "sequence_length": length,
            "on_long": on_long,
        },
        "training": {
            "global_batch_size": batch,
            "micro_batch_size": micro,
            "max_steps": steps,
            "optimizer": {"learning_rate": LEARNING_RATE},
            "schedule": {"type": "constant"},
        },
        "checkpoint": {"interval_steps": None},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": 1},
    }
