"""The DeepSpeed JSON of a run: a pure function of the config and the plan's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config.errors import found
from trainer.config.schema import DeepSpeedConfig
from trainer.failures import UserError
from trainer.planning.communication import USUAL, Communication

PERSISTENCE_THRESHOLD = 100_000  # elements: norms and biases, whose gathering would cost latency alone
SUB_GROUP = 1_000_000_000  # elements
# Of masters in files: two copies of a group are in memory as they are made, and what the optimizer has just read should
# still be there when the weights are copied from it.
SUB_GROUP_IN_FILES = 100_000_000

_INSTEAD = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_parameters",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "managed_gradient_accumulation": "nothing: dsft relies on it",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.hpz",
    "prescale_gradients": "nothing: dsft weights the loss exactly",
    "gradient_predivide_factor": "nothing: dsft weights the loss exactly",
    "data_efficiency": "nothing: dsft defines the order of the data",
    "curriculum_learning": "nothing: dsft defines the order of the data",
    "tensorboard": "logging.tensorboard",
}


def deepspeed_config(
    config: DeepSpeedConfig,
    dtype: str,
    micro_batch_size: int,
    micro_batches_per_rank: int,
    max_grad_norm: float,
    communication: Communication = USUAL,
    compiled: bool = False,
    ranks: int | None = None,
) -> dict[str, Any]:
    """The complete DeepSpeed JSON. It has no optimizer or scheduler: dsft builds AdamW and sets the learning rate.

    Args:
        config: the config's `deepspeed` section; its raw `config` is merged in last.
        dtype: ``bfloat16`` (with fp32 master weights, gradient accumulation and reduction) or ``float32``.
        micro_batch_size: sequences.
        micro_batches_per_rank: becomes ``gradient_accumulation_steps``.
        max_grad_norm: 0 turns clipping off.
        communication: sizes of buckets, by model and network.
        compiled: layers are, by torch.compile.
        ranks: of the run; None: several.

    Raises:
        UserError: a key of ``deepspeed.config`` contradicts the plan.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": config.zero_stage == 3,
        "reduce_scatter": True,
        "reduce_bucket_size": communication.reduce_bucket,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": communication.prefetch_bucket,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "stage3_max_live_parameters": communication.max_live,
            "stage3_max_reuse_distance": communication.max_live,
            "sub_group_size": SUB_GROUP_IN_FILES if "optimizer" in config.on_disk else SUB_GROUP,
        }
        if compiled:  # its linear function has every layer compiled anew: it looks at the number of each parameter
            zero["memory_efficient_linear"] = False
        if communication.hpz > 1:
            zero["zero_hpz_partition_size"] = communication.hpz
    else:
        zero["allgather_bucket_size"] = communication.reduce_bucket
    # what goes to files is host memory to DeepSpeed: see `trainer.file_memory`
    if config.offload_optimizer not in ("none", "auto"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload_parameters != "none":  # pages of files cannot be pinned
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.offload_parameters == "cpu"}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_rank,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves on the CPU as well
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if dtype == "bfloat16":
        # one rank alone has nothing to reduce, and would copy its gradients to fp32 and back
        reduced = "bf16" if ranks == 1 else "fp32"
        result |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": reduced}
    given = _without_auto(config.config)
    if refused := list(_refused(given, result)):
        raise UserError("\n".join(["deepspeed.config does not go with what dsft plans itself", *refused]))
    return _merged(result, given)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Without what it leaves to whoever reads it, as configs for Hugging Face's Trainer do."""
    whole = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in whole.items() if value != "auto" and (value != {} or config[key] == {})}


def _refused(given: dict[str, Any], planned: dict[str, Any], path: str = "") -> Iterator[str]:
    """What contradicts the plan, or is of another kind than what stands there."""
    for key, value in given.items():
        name, own = f"{path}{key}", planned.get(key)
        if name in _INSTEAD and value != own:
            yield f"  deepspeed.config.{name}: contradicts the plan; set {_INSTEAD[name]} instead"
        elif own is not None and _kind(value) != _kind(own):
            yield f"  deepspeed.config.{name}: found {found(value)}; expected {_kind(own)}"
        elif isinstance(value, dict):
            yield from _refused(value, own or {}, f"{name}.")


def _kind(value: Any) -> str:
    kinds = ((bool, "true or false"), (int | float, "a number"), (dict, "an object"))
    return next((name for of, name in kinds if isinstance(value, of)), "a text")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
