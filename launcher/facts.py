"""What this machine has, gathered before planning: the plan itself is a pure function of the config and these facts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launcher.gpus import Gpu, TorchBuild, find_gpus, refuse_missing_gpus, torch_build
from trainer.config.generation import WritingTask
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.planning.model_facts import ModelFacts, model_facts


@dataclass(frozen=True)
class Facts:
    """This machine and the config's model. Bytes throughout.

    Attributes:
        host: its short name.
        gpus: those that ranks may use (CUDA_VISIBLE_DEVICES is heeded; none under DS_ACCELERATOR=cpu).
        cores: CPUs that this process may use.
        memory: host memory, or less where a cgroup limits it.
        memory_available: what of it is free now.
        disk_free: on the file system of `output_dir`.
        model: facts of the config's model.
        adapted_models: those of the same model with an adapter that takes less memory, by its type.
        multiplies_bfloat16: whether the CPU has instructions for that.
        liger: whether liger-kernel is installed.
        torch: the torch that is installed here, as far as it tells.
    """

    host: str
    gpus: tuple[Gpu, ...]
    cores: int
    memory: int
    memory_available: int
    disk_free: int
    model: ModelFacts
    adapted_models: Mapping[str, ModelFacts] = field(default_factory=dict)
    multiplies_bfloat16: bool = True
    liger: bool = False
    torch: TorchBuild | None = None


def gather_facts(config: LaunchConfig) -> Facts:
    """Look at this machine and at the model's files (headers only).

    Raises:
        UserError: the model's folder cannot be read; CUDA_VISIBLE_DEVICES names GPUs that are not here, on a machine
            that is to train.
    """
    environment = {**os.environ, **config.cluster.environment}
    memory, available = host_memory()
    gpus = find_gpus(environment)
    if not gpus and config.cluster.backend == "local" and config.cluster.gpus_per_node is None:
        refuse_missing_gpus(environment)
    return Facts(
        host=socket.gethostname().split(".")[0],
        gpus=gpus,
        cores=usable_cores(),
        memory=memory,
        memory_available=available,
        disk_free=shutil.disk_usage(existing_parent(Path(config.output_dir))).free,
        model=facts_of_model(config, config.model),
        adapted_models=adapted_facts(config),
        multiplies_bfloat16=multiplies_bfloat16(),
        liger=importlib.util.find_spec("liger_kernel") is not None,
        torch=torch_build(),
    )


def facts_of_model(config: LaunchConfig, model: ModelConfig) -> ModelFacts:
    """Facts of a model that the config trains. Raises UserError where a pattern of the config matches nothing in it."""
    training = config.training
    patterns = {f"training.optimizer.groups.{i}.match": rule.match for i, rule in enumerate(training.optimizer.groups)}
    patterns |= {f"training.unfreeze.{i}.match": later.match for i, later in enumerate(training.unfreeze)}
    head = getattr(config.task, "head", None)
    new_head = not isinstance(config.task, WritingTask)
    return model_facts(model, patterns, new_head, () if head is None else head.hidden_sizes)


def adapted_facts(config: LaunchConfig) -> dict[str, ModelFacts]:
    """Facts of the model with an adapter, the one it has or one on all its linear layers, by what it can have: LoRA if
    it has none, and QLoRA."""
    model = config.model
    kinds = [] if model.adapter or model.freeze or model.train_only or model.resize_embeddings else ["lora"]
    packable = model.path is not None and not model.compile and config.deepspeed.may_cut_weights
    if packable and (kinds or (model.adapter and model.adapter.type == "lora" and not model.adapter.use_dora)):
        kinds.append("qlora")
    found = {}
    with suppress(UserError):  # nothing in it that could have one
        for kind in kinds:
            adapter = (model.adapter or AdapterConfig()).model_copy(update={"type": kind})
            found[kind] = facts_of_model(config, model.model_copy(update={"adapter": adapter}))
    return found


def multiplies_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether torch's matrix products in bfloat16 are quick on this CPU, from /proc/cpuinfo; True if it does not tell.

    oneDNN has them for AVX-512 and for Arm's BF16; elsewhere torch falls back to plain loops (measured on AVX2: a
    hundredth of the speed of float32).
    """
    told = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    lines = (line.partition(":") for line in told.splitlines())
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), None)
    return flags is None or not {"avx512bw", "bf16"}.isdisjoint(flags)


def usable_cores() -> int:
    """CPUs of this process's affinity mask, or fewer where its cgroup has a quota."""
    cores = len(os.sched_getaffinity(0))
    for text in _cgroup_values("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def host_memory() -> tuple[int, int]:
    """(bytes this process may use, bytes of them that are free), within the limits of its cgroups."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(meminfo[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limits = [*_cgroup_values("memory.max"), *_cgroup_values("memory/memory.limit_in_bytes")]
    total = min([total, *(int(limit) for limit in limits if limit.isdigit())])
    return total, min(total, available)


def _cgroup_values(name: str) -> list[str]:
    """A control file's values in this process's cgroup and those above it (version 2, or version 1's mount)."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    root = Path("/sys/fs/cgroup")
    values = []
    folder = root / own.lstrip("/")
    for place in [folder, *folder.parents]:
        if place == root or root in place.parents:
            try:
                values.append((place / name).read_text().strip())
            except OSError:
                continue
    return values


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
