"""The search of `dsft tune`: which keys vary, how their values are drawn, and how many trials there are."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.section import Finite, Flag, NonNegativeInt, PositiveFloat, PositiveInt, Section

# A trial's own, or what its score depends on: scores of trials would not be comparable
_FIXED = ("name", "output_dir", "extends", "tune", "cluster", "evaluation", "data.evaluation")


class Range(Section):
    """What has two ends."""

    low: Any
    high: Any

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"`low` ({self.low}) has to be less than `high` ({self.high})")
        return self


class Uniform(Range):
    """Any number from `low` to `high`."""

    type: Literal["uniform"]
    low: Finite
    high: Finite


class LogUniform(Range):
    """Any number from `low` to `high`, each order of magnitude as likely as the others."""

    type: Literal["log_uniform"]
    low: PositiveFloat
    high: PositiveFloat


class Integer(Range):
    """`low`, `low` + `step`, ... up to `high`."""

    type: Literal["int"]
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]
    step: PositiveInt = 1


class Categorical(Section):
    """One of `choices`, which may be any JSON values that the key takes."""

    type: Literal["categorical"]
    choices: tuple[Any, ...] = Field(min_length=1)

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({json.dumps(choice, sort_keys=True) for choice in choices}) < len(choices):
            raise ValueError("a choice is there twice; leave one out")
        return choices


Parameter = Annotated[Uniform | LogUniform | Integer | Categorical, Field(discriminator="type")]


class TuneConfig(Section):
    """A search over values of the config's keys. See docs/tune.md."""

    space: dict[str, Parameter] = Field(
        min_length=1, description='Key of the config, as --set takes it ("training.global_batch_size") -> its values'
    )
    trials: PositiveInt | None = Field(None, description="In all, failed ones too; default: 20, of a grid all of it")
    parallel: PositiveInt = Field(1, description="Trials at a time of each `dsft tune`, or of the array")
    array: Flag = Field(
        False, description="On SLURM: an array of jobs, one a trial, in place of jobs from a login node"
    )
    metric: str | None = Field(None, description="What to search by; default: `evaluation.metric`")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="tpe: see Bergstra et al. 2011")
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="Ends trials that are worse than others were at the same step"
    )
    seed: NonNegativeInt = 0
    keep_checkpoints: Flag = Field(False, description="Of trials that have ended; with it they export as well")

    @field_validator("space")
    @classmethod
    def _comparable(cls, space: dict[str, Any]) -> dict[str, Any]:
        for key in space:
            fixed = next((name for name in _FIXED if key == name or key.startswith(f"{name}.")), None)
            if fixed is not None:
                raise ValueError(f"{key}: `{fixed}` is the same for all trials")
            inside = next((other for other in space if other.startswith(f"{key}.")), None)
            if inside is not None:
                raise ValueError(f"{inside} is a part of {key}; keep one of them")
        return space

    @model_validator(mode="after")
    def _countable(self) -> TuneConfig:
        endless = [key for key, of in self.space.items() if isinstance(of, Uniform | LogUniform)]
        if self.sampler == "grid" and endless:
            raise ValueError(f"sampler: a grid has no end with {', '.join(endless)}; give `categorical` choices")
        return self
