"""Sections that say what of a model is trained, and how fast: adapters, the optimizer and its groups."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.section import Auto, Beta, Flag, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class AdapterConfig(Section):
    """LoRA (Hu et al. 2021): low-rank updates of linear layers are trained, the model's own weights are not."""

    type: Literal["lora", "qlora"] = Field(
        "lora", description="qlora: the weights under the adapter are kept in 4 bits (NF4, scales in 8 bits)"
    )
    rank: PositiveInt = Field(16, description="Of the update B A of each matrix")
    alpha: PositiveFloat = Field(32.0, description="The update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = Field(0.0, description="Of the adapter's input")
    targets: Auto | tuple[str, ...] = Field(
        "auto",
        description="Linear modules that get an adapter: the end of a name, a pattern, or layers:FIRST-LAST; auto: all "
        "of those in the model's layers",
    )
    use_dora: Flag = Field(False, description="Learn each row's length by itself (DoRA, Liu et al. 2024)")
    modules_to_save: tuple[str, ...] = Field(
        (), description="Modules trained as a whole besides the adapter; the head of a task always is"
    )

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: Auto | tuple[str, ...]) -> Auto | tuple[str, ...]:
        if not value:
            raise ValueError('name at least one module, or "auto"')
        return value

    @model_validator(mode="after")
    def _no_lengths_of_packed_rows(self) -> AdapterConfig:
        if self.type == "qlora" and self.use_dora:
            raise ValueError("`use_dora` would unpack every matrix in each pass to measure its rows: use it with lora")
        return self


class ParameterGroup(Section):
    """Parameters with a learning rate or weight decay of their own."""

    match: tuple[str, ...] = Field(
        min_length=1, description="Names of modules or parameters, fnmatch patterns, or layers:FIRST-LAST"
    )
    learning_rate: PositiveFloat | None = Field(None, description="Its peak, instead of the optimizer's")
    learning_rate_factor: PositiveFloat | None = Field(None, description="Times the optimizer's learning rate")
    weight_decay: NonNegativeFloat | None = Field(None, description="Of all parameters matched, vectors as well")

    @model_validator(mode="after")
    def _something(self) -> ParameterGroup:
        if self.learning_rate is not None and self.learning_rate_factor is not None:
            raise ValueError("give `learning_rate` or `learning_rate_factor`, not both")
        if self.learning_rate is None and self.learning_rate_factor is None and self.weight_decay is None:
            raise ValueError("give `learning_rate`, `learning_rate_factor` or `weight_decay`")
        return self


class OptimizerConfig(Section):
    """torch.optim's AdamW (decoupled weight decay, Loshchilov & Hutter 2019), or Adafactor (Shazeer & Stern 2018)."""

    type: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: PositiveFloat = Field(1e-5, description="The peak, after warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, description="Applied to matrices; never to biases and norms")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Of AdamW")
    eps: PositiveFloat = Field(1e-8, description="Of AdamW")
    groups: tuple[ParameterGroup, ...] = Field((), description="The first group that matches a parameter holds")
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None,
        description="Layer-wise learning-rate decay (Clark et al. 2020): times this for each layer below the head",
    )

    @model_validator(mode="after")
    def _known_to_it(self) -> OptimizerConfig:
        if self.type == "adafactor" and (self.betas != (0.9, 0.999) or self.eps != 1e-8):
            raise ValueError("`betas` and `eps` are AdamW's; Adafactor has none to set: leave them out")
        return self

    @property
    def moment_bytes(self) -> int:
        """Of each trained parameter, about: Adafactor's row and column factors are too few to count."""
        return 8 if self.type == "adamw" else 0


class Unfreeze(Section):
    """Parameters that stay as they are at first (gradual unfreezing, Howard & Ruder 2018)."""

    match: tuple[str, ...] = Field(
        min_length=1, description="Names of modules or parameters, fnmatch patterns, or layers:FIRST-LAST"
    )
    from_step: Annotated[int, Field(ge=2, strict=True)] = Field(description="The first step that trains them")
