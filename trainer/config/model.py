"""The sections `model` and `deepspeed`: which model, how it is held in memory, and what makes it fast."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.section import Flag, PositiveInt, Section
from trainer.config.trained import AdapterConfig


class CheckpointedLayers(Section):
    """Recomputation in some of the layers."""

    every: PositiveInt = Field(description="Layers 0, k, 2k, ... are computed again, the others keep everything")


class CompileConfig(Section):
    """How torch.compile goes about it."""

    mode: Literal["default", "max-autotune-no-cudagraphs"] = Field(
        "default", description="max-autotune-no-cudagraphs: tries out matrix kernels first, for minutes"
    )


class ModelConfig(Section):
    """Which model, and how it is held in memory."""

    path: str | None = Field(None, description="Hugging Face model folder, or hub id")
    config: dict[str, Any] | None = Field(
        None, description="Inline model config (`model_type`, ...): random weights from `training.seed`"
    )
    tokenizer: str | None = Field(
        None, description="Folder, tokenizer.json or SentencePiece .model; default: the one in `path`"
    )
    processor: str | None = Field(
        None, description="Folder or hub id with the image processor, for tasks with images; default: `path`"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of weights and activations; the optimizer's masters are in float32 in any case"
    )
    attention: Literal[
        "auto",
        "sdpa",
        "eager",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flex_attention",
        "varlen",
    ] = Field("auto", description="auto: the fastest that keeps packed samples apart here; the log says which and why")
    gradient_checkpointing: Flag | Literal["auto", "selective"] | CheckpointedLayers = Field(
        "auto",
        description="true: a layer keeps its input and is computed again in the backward pass; selective: it keeps the "
        'results of matrix products and attention as well; {"every": k}: only every k-th layer is computed again; '
        "auto: no more is computed again than the memory asks for",
    )
    activation_offload: Flag = Field(False, description="Inputs of layers that are computed again lie in host memory")
    sequence_parallel: PositiveInt = Field(
        1, description="Ranks that share each sequence, a slice each: for contexts too long for one (Ulysses)"
    )
    compile: Flag | CompileConfig = Field(False, description="torch.compile, layer by layer")
    kernels: Literal["auto", "liger", "none"] = Field(
        "auto", description="Fused norms, MLP and rotary embedding; auto: Liger's on GPUs, where it is installed"
    )
    fp8: Literal["none", "rowwise", "rowwise_with_gw_hp", "tensorwise"] = Field(
        "none",
        description="Trained linear layers multiply in 8 bits, scaled by row and column, by tensor, or by row with the "
        "weights' gradients left in full: torchao's recipes. Needs `compile`, and Ada, Hopper or later GPUs",
    )
    fused_loss: Flag | Literal["auto"] = Field(
        "auto",
        description="causal-lm: head and loss work through blocks of positions; logits never exist as a whole. auto: "
        "for families whose logits are what the head gives",
    )
    freeze: tuple[str, ...] = Field(
        (), description="Not trained: names of modules or parameters, fnmatch patterns, layers:FIRST-LAST"
    )
    train_only: tuple[str, ...] = Field((), description="Nothing else is trained; written as `freeze`")
    adapter: AdapterConfig | None = Field(None, description="Train an adapter instead of the weights")
    resize_embeddings: Flag = Field(
        False, description="Add rows for tokens of `tokenizer` that the model in `path` lacks: the mean of its rows"
    )
    trust_remote_code: Flag = Field(False, description="Run Python code that comes with the model")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of `path` (pretrained weights) and `config` (random weights)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError('`config` needs a `model_type`, for example "llama"')
        if self.adapter is not None and (self.freeze or self.train_only):
            raise ValueError(
                "`adapter` freezes all of the model's weights: leave out `freeze` and `train_only`; "
                "`adapter.targets` and `adapter.modules_to_save` say what is trained"
            )
        if self.adapter is not None and self.adapter.type == "qlora":
            if self.path is None:
                raise ValueError(
                    "`adapter.type` qlora needs pretrained weights (`path`); random ones have no use in 4 bits"
                )
            if self.compile:
                raise ValueError("`compile` does not go with `adapter.type` qlora: leave one of them out")
        self._speed_and_memory()
        if self.config is not None and self.resize_embeddings:
            raise ValueError("`resize_embeddings` is for pretrained weights (`path`); set `vocab_size` in `config`")
        if self.resize_embeddings and self.adapter is not None:
            raise ValueError("`resize_embeddings` adds rows that an `adapter` would not train: leave one of them out")
        if self.config is not None and self.tokenizer is None and self.processor is None:
            raise ValueError(
                "`tokenizer` (of tasks with images: `processor`) is needed with `config`, since there is no model "
                "folder to take it from"
            )
        return self

    def fuses_loss(self, plain_logits: bool) -> bool:
        """Whether head and loss are one, in a model of causal-lm whose logits are known to be its head's, or not."""
        return plain_logits if self.fused_loss == "auto" else self.fused_loss

    def _speed_and_memory(self) -> None:
        if self.activation_offload and self.gradient_checkpointing in (False, "selective"):
            raise ValueError(
                "`activation_offload` moves the inputs of layers that are computed again: it needs "
                '`gradient_checkpointing` true or {"every": k}'
            )
        if self.activation_offload and self.compile:
            raise ValueError("`activation_offload` and `compile` do not go together: leave one of them out")
        if self.kernels == "liger" and self.compile:
            raise ValueError("`kernels` and `compile` do not go together: torch.compile fuses norms and MLP itself")
        if self.fp8 != "none" and not self.compile:
            raise ValueError("`fp8` gains nothing unless casts are fused with what is around them: set `compile`")
        if self.fp8 != "none" and self.adapter is not None:
            raise ValueError("`fp8` is for weights that are trained: leave it out with `adapter`")
        if self.sequence_parallel > 1 and self.compile:
            raise ValueError("`sequence_parallel` and `compile` do not go together: leave one of them out")


class DeepSpeedConfig(Section):
    """ZeRO. `config` passes through to DeepSpeed for experts; what contradicts the plan is refused."""

    zero_stage: Literal[1, 2, 3, "auto"] = Field(
        3,
        description="1, 2: every rank keeps whole weights; auto: 2 where these fit beside all else and a step is not "
        "expected to take longer for it, else 3",
    )
    offload_optimizer: Literal["none", "cpu", "nvme", "auto"] = Field(
        "none",
        description="Where the optimizer's states are; auto: on the device if they fit it, else in host memory, else "
        "in `nvme_path`, if that is given",
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where each rank's share of the weights is; with ZeRO-3 and offload_optimizer cpu or nvme"
    )
    nvme_path: str | None = Field(
        None,
        pattern="^/",
        description="Folder on a disk of each node (an absolute path), for what is offloaded to nvme",
    )
    hpz: Flag | Literal["auto"] = Field(
        "auto",
        description="Each node keeps a second copy of the weights, so that backward passes gather them in the node; "
        "auto: where the network would hold steps up, and the memory is there",
    )
    config: dict[str, Any] = Field(default_factory=dict, description="Further keys of DeepSpeed's own config")

    @property
    def on_disk(self) -> tuple[str, ...]:
        """What is kept in files in `nvme_path`: ``optimizer``, ``parameters``."""
        places = {"optimizer": self.offload_optimizer, "parameters": self.offload_parameters}
        return tuple(what for what, place in places.items() if place == "nvme")

    @property
    def may_cut_weights(self) -> bool:
        """Whether the stage is 3, or may be."""
        return self.zero_stage in (3, "auto")

    @model_validator(mode="after")
    def _go_together(self) -> DeepSpeedConfig:
        if self.offload_parameters != "none" and (
            not self.may_cut_weights or self.offload_optimizer not in ("cpu", "nvme")
        ):
            raise ValueError('`offload_parameters` needs `zero_stage` 3 and `offload_optimizer` "cpu" or "nvme"')
        if self.on_disk and self.nvme_path is None:
            raise ValueError("nvme needs `nvme_path`, a folder on a disk of each node")
        if self.nvme_path is not None and not self.on_disk and self.offload_optimizer != "auto":
            raise ValueError(
                '`nvme_path` is for `offload_optimizer` "nvme" or "auto", or `offload_parameters` "nvme": set one of '
                "them, or leave it out"
            )
        if self.nvme_path is not None and not self.may_cut_weights:
            raise ValueError("nvme needs `zero_stage` 3")
        if self.hpz is True and (not self.may_cut_weights or self.offload_parameters != "none"):
            raise ValueError("`hpz` needs `zero_stage` 3, and its copies cannot be offloaded (`offload_parameters`)")
        return self
