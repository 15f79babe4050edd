"""The typed, strict schema of a dsft config (pydantic 2).

Field names are the contract with users: units are in the names, unknown keys are errors, and ``"auto"`` is
allowed where dsft can compute a better value. Loading (files, ``extends``, ``--set``, error texts) is in
``trainer.config.loading``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.clusters import Cluster as Cluster
from trainer.config.clusters import LocalCluster as LocalCluster
from trainer.config.clusters import SlurmCluster as SlurmCluster
from trainer.config.clusters import SshCluster as SshCluster
from trainer.config.data import DataConfig as DataConfig
from trainer.config.data import DataSource as DataSource
from trainer.config.model import DeepSpeedConfig as DeepSpeedConfig
from trainer.config.model import ModelConfig as ModelConfig
from trainer.config.notifications import Notification
from trainer.config.section import (
    Auto,
    Flag,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from trainer.config.tasks import PACKED_TASKS, Task
from trainer.config.trained import OptimizerConfig as OptimizerConfig
from trainer.config.trained import Unfreeze
from trainer.config.tuning import TuneConfig


class ScheduleConfig(Section):
    """Learning rate as a pure function of training progress."""

    type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = Field(0, description="Steps in which the learning rate rises from 0 to its peak")
    final_ratio: Fraction = Field(0.0, description="Final learning rate / peak learning rate")


class LossSpikeConfig(Section):
    """A loss far above those before it: training goes back to the last checkpoint and leaves out suspect batches."""

    window: Annotated[int, Field(ge=8, strict=True)] = Field(64, description="Steps whose median and MAD count")
    threshold: PositiveFloat = Field(10.0, description="Robust standard deviations (1.4826 MAD) above the median")
    batches_before: NonNegativeInt = Field(
        1, description="Left out besides the batch of the spike: the update before it may have caused it"
    )


class TrainingConfig(Section):
    """The optimisation. `global_batch_size` counts sequences over all ranks and micro-batches."""

    global_batch_size: PositiveInt = Field(description="Sequences of an optimizer step, over all ranks")
    micro_batch_size: PositiveInt | Auto = Field(
        "auto", description="Sequences of a forward pass of a rank; auto: by the memory, and less after it ran out"
    )
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps in all; or `epochs`")
    epochs: PositiveFloat | None = Field(None, description="How often the training data is taken; or `max_steps`")
    optimizer: OptimizerConfig = OptimizerConfig()
    unfreeze: tuple[Unfreeze, ...] = Field((), description="What is trained later; the first rule that matches holds")
    ema_decay: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(
        None, description="Keep an exponential moving average of the weights; evaluations and exports use it"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Clip the global gradient norm; 0: off")
    seed: NonNegativeInt = Field(0, description="Initial weights and dropout")
    deterministic: Flag = Field(False, description="Deterministic GPU kernels: bit-for-bit resume, slower")

    on_nonfinite: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="A step whose loss or gradients are not finite: leave its update out, go back to the last "
        "checkpoint and leave its batch out, or end the run",
    )
    loss_spike: LossSpikeConfig | None = Field(None, description="Go back when the loss jumps; null: off")
    max_rollbacks: NonNegativeInt = Field(3, description="Of one run, over all its restarts; then it ends")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `max_steps` and `epochs`")
        return self

    @property
    def state_bytes(self) -> int:
        """Of each trained parameter besides its fp32 master: moments, and the average."""
        return self.optimizer.moment_bytes + (0 if self.ema_decay is None else 4)


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept. There is always one at the end. See docs/checkpoints.md."""

    interval_steps: PositiveInt | Auto | None = Field(
        "auto",
        description="auto: by the Young/Daly interval, unless `interval_minutes` is given; null: not by steps",
    )
    interval_minutes: PositiveFloat | None = Field(None, description="Alone, or besides a number of `interval_steps`")
    mean_time_between_failures_hours: PositiveFloat | Auto = Field(
        "auto", description="Of the whole job, for the Young/Daly interval; auto: from this run's ledger"
    )
    keep_last: PositiveInt = Field(2, description="Keep the newest so many")
    keep_best: NonNegativeInt = Field(0, description="Keep those with the best `evaluation.metric` as well")
    keep_every_steps: PositiveInt | None = Field(
        None, description="Keep the first checkpoint at or after each multiple for ever"
    )
    fast_dir: str | None = Field(
        None,
        pattern="^/",
        description="Folder on storage of each node (an absolute path): checkpoints are written there first, then "
        "copied to the run directory",
    )
    fast_interval_steps: PositiveInt | None = Field(
        None, description="Steps between checkpoints that stay in `fast_dir`, for restarts on the same nodes"
    )

    @model_validator(mode="after")
    def _fast_somewhere(self) -> CheckpointConfig:
        if self.fast_interval_steps is not None and self.fast_dir is None:
            raise ValueError("`fast_interval_steps` needs `fast_dir`, a folder on storage of each node")
        return self


class EvaluationConfig(Section):
    """When `data.evaluation` is scored, and by what a model is judged. There is always one evaluation at the end."""

    interval_steps: PositiveInt | None = Field(None, description="Steps between evaluations; null: at the end alone")
    metric: str = Field(
        "loss", description="What `checkpoint.keep_best` and early stopping go by: a name in the evaluation's scores"
    )
    larger_is_better: Flag | Auto = Field(
        "auto", description="auto: unless the metric is a loss, an error or perplexity"
    )
    patience: PositiveInt | None = Field(
        None, description="Early stopping: end after so many evaluations in a row that were no better than the best"
    )

    @property
    def maximise(self) -> bool:
        """Whether a larger `metric` is better."""
        if self.larger_is_better != "auto":
            return self.larger_is_better
        return not re.search(r"(^|[/_])(loss|perplexity|mse|mae|rmse|error|ter|wer|cer)$", self.metric)


class ExportConfig(Section):
    """The Hugging Face folder written at the end of a run."""

    enabled: Flag = Field(True, description="Off: `dsft export RUN` writes it later")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: `model.dtype`; float32 for an adapter by itself"
    )
    adapter: Literal["merge", "adapter"] = Field(
        "merge", description="merge: a whole model with the adapter in its weights; adapter: a folder for peft"
    )
    checkpoint: Literal["last", "best"] = Field(
        "last", description="best: by `evaluation.metric`; needs checkpoint.keep_best"
    )
    max_shard_size_gib: PositiveFloat = 4.0


class ProfileConfig(Section):
    """A few steps looked into: traces, memory snapshots on GPUs, and where the time goes, in RUN/profile."""

    skip_steps: PositiveInt = Field(5, description="Steps of an attempt before the first one that is profiled")
    steps: PositiveInt = 4
    ranks: tuple[NonNegativeInt, ...] = Field((0,), description="Whose steps are looked into")


class LoggingConfig(Section):
    """What is logged, and how often."""

    interval_steps: PositiveInt = Field(1, description="Steps between lines of metrics.jsonl")
    tensorboard: Flag = Field(True, description="The metrics for TensorBoard as well, in RUN/tensorboard")
    profile: ProfileConfig | None = Field(None, description="`dsft launch --profile` sets the defaults")


class ResilienceConfig(Section):
    """What happens when something fails."""

    max_restarts: NonNegativeInt = Field(
        3, description="Attempts after the first, of a launch or a job with all its requeues"
    )
    hang_timeout_seconds: Annotated[float, Field(ge=5, strict=True, allow_inf_nan=False)] | Auto | None = Field(
        "auto",
        description="No rank gets on for so long within training steps: a hang, which is ended and retried. auto: 5 "
        "times the longest of the last 100 steps, and at least 60 s; null: hangs are not looked for",
    )
    slow_phase_timeout_seconds: PositiveFloat = Field(
        1800.0,
        description="The same for all but steps (loading, checkpoint, evaluation, export) and for the first step",
    )
    stop_grace_seconds: NonNegativeFloat = Field(
        10.0, description="After a stop request: time for a last checkpoint before processes are killed"
    )
    exclude_stragglers: Flag = Field(
        False, description="Go on without a node that slows the others down, on a spare or on fewer nodes"
    )
    bad_node_hours: PositiveFloat = Field(
        24.0, description="A node that failed comes last, and stays out of requeued jobs, for so long"
    )
    notify: tuple[Notification, ...] = Field((), description="Told of failures, recoveries, bad nodes and the end")


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class LaunchConfig(Section):
    """A whole dsft config."""

    name: str = Field(
        pattern=RUN_NAME,
        description='1 to 100 letters, digits, ".", "_" or "-", beginning with a letter or digit',
    )
    output_dir: str = Field("runs", description="The run is output_dir/name; relative to the config's folder")
    task: Task
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    tune: TuneConfig | None = Field(None, description="What `dsft tune` searches; a launch passes it over")
    logging: LoggingConfig = LoggingConfig()
    cluster: Cluster = LocalCluster()
    resilience: ResilienceConfig = ResilienceConfig()

    def altered(self, **sections: dict[str, Any]) -> LaunchConfig:
        """With other values of some keys: `config.altered(training={"micro_batch_size": 2})`; they are not checked."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        )

    @property
    def zero_stages(self) -> tuple[int, ...]:
        """The stages of ZeRO to choose from, the one with the least communication first."""
        settings, adapter = self.deepspeed, self.model.adapter
        if settings.zero_stage != "auto":
            return (settings.zero_stage,)
        needs_3 = settings.offload_optimizer in ("cpu", "nvme") or settings.hpz is True
        needs_3 |= self.training.optimizer.type == "adafactor" or self.checkpoint.fast_dir is not None
        needs_3 |= adapter is not None and adapter.type == "qlora"
        return (3,) if needs_3 else (2, 3)

    @model_validator(mode="before")
    @classmethod
    def _packed_where_it_can_be(cls, value: Any) -> Any:
        task, data = (value.get(key) if isinstance(value, dict) else None for key in ("task", "data"))
        if not isinstance(task, dict) or not isinstance(data, dict) or str(task.get("type")) in PACKED_TASKS:
            return value
        return {**value, "data": {"packing": False, **data}}

    @model_validator(mode="after")
    def _task_allows(self) -> LaunchConfig:
        if self.export.adapter == "adapter":
            if self.model.adapter is None:
                raise ValueError("export.adapter: there is no `model.adapter`; leave it out to export the whole model")
            if self.model.path is None:
                raise ValueError("export.adapter: random weights (`model.config`) are in no folder; use merge")
            if getattr(self.task, "head", None) is not None:
                raise ValueError("export.adapter: an adapter's folder cannot hold the layers of task.head; use merge")
        if self.model.adapter is not None and self.model.adapter.type == "qlora" and not self.deepspeed.may_cut_weights:
            raise ValueError("model.adapter.type: qlora needs deepspeed.zero_stage 3 (on one rank as well)")
        if self.training.optimizer.type == "adafactor" and not self.deepspeed.may_cut_weights:
            raise ValueError("training.optimizer.type: adafactor needs deepspeed.zero_stage 3, or use adamw")
        if self.data.packing and self.task.type not in PACKED_TASKS:
            raise ValueError(f"data.packing: samples of {self.task.type} cannot share a sequence; leave it out")
        if self.model.fused_loss is True and self.task.type != "causal-lm":
            raise ValueError("model.fused_loss: causal-lm alone has it; leave it out")
        if self.model.sequence_parallel > 1 and (
            self.task.type != "causal-lm" or getattr(self.task, "generation", None) is not None
        ):
            raise ValueError(
                "model.sequence_parallel: only causal-lm without `generation` can share sequences; leave it out, or "
                "generate from the finished run with dsft predict"
            )
        if self.data.prepared is not None and self.task.type not in PACKED_TASKS:
            raise ValueError(f"data.prepared: {self.task.type} cannot be prepared; leave it out")
        return self

    @model_validator(mode="after")
    def _checkpoints_serve(self) -> LaunchConfig:
        if self.checkpoint.fast_dir is not None and not self.deepspeed.may_cut_weights:
            raise ValueError("checkpoint.fast_dir: needs ZeRO-3, where a rank's slices are the same after a restart")
        if self.export.checkpoint == "best" and not (self.checkpoint.keep_best and self.data.evaluation):
            raise ValueError("export.checkpoint: the best one is kept with checkpoint.keep_best=1 and data.evaluation")
        return self

    @model_validator(mode="after")
    def _array_of_jobs(self) -> LaunchConfig:
        if self.tune is not None and self.tune.array:
            if self.cluster.backend != "slurm":
                raise ValueError("tune.array: only SLURM has arrays of jobs: set cluster.backend, or leave it out")
            if self.cluster.array is not None:
                raise ValueError("cluster.array: a chain of jobs for one run; leave it out with tune.array")
        return self

    @model_validator(mode="after")
    def _data_ends(self) -> LaunchConfig:
        if self.training.max_steps is None and all(source.epochs == "repeat" for source in self.data.train):
            raise ValueError(
                "data.train: every source repeats, so that training.epochs would never end; give one of them a number "
                "of `epochs` (or none), or training.max_steps"
            )
        return self

    @field_validator("cluster", mode="before")
    @classmethod
    def _local_unless_said(cls, value: Any) -> Any:
        return {"backend": "local", **value} if isinstance(value, dict) else value
