"""What this machine has, gathered before planning: the plan itself is a pure function of the config and these facts."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.generation import WritingTask
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.planning.model_facts import ModelFacts, model_facts

NVIDIA_SMI_SECONDS = 10
_NO_GPUS = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; the last is SLURM's, where a job has none
_MIG = " MIG "  # in the names of parts of a GPU
_MIG_MEMORY = "fb_memory_usage/total"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi names it, or a MIG instance, a part of one ("NVIDIA A100-SXM4-40GB MIG 1g.5gb"); memory in
    bytes."""

    name: str
    memory: int


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
        _refuse_missing_gpus(environment)
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


def find_gpus(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi reports and the environment allows; none where there is no nvidia-smi, or no answer.

    A process sees one MIG instance at most, and no whole GPU beside it (NVIDIA's MIG user guide, "CUDA Device
    Enumeration").
    """
    if _cpu_is_meant(environment):
        return ()
    try:
        found = _listed()
    except (OSError, subprocess.SubprocessError):
        return ()
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = [key for key in found if key.isdigit()] if visible is None else visible.split(",")
    chosen = []
    for item in map(str.strip, names):  # CUDA stops at the first device that does not exist
        gpu = next((gpu for key, gpu in found.items() if key == item or (len(item) > 4 and key.startswith(item))), None)
        if gpu is None:
            break
        chosen.append(gpu)
    part = next((gpu for gpu in chosen if _MIG in gpu.name), None)
    return tuple(chosen) if part is None else (part,)


def _cpu_is_meant(environment: Mapping[str, str]) -> bool:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return environment.get("DS_ACCELERATOR") == "cpu" or (visible is not None and visible.strip() in _NO_GPUS)


def _refuse_missing_gpus(environment: Mapping[str, str]) -> None:
    """Who names GPUs does not mean to train on the CPU."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _cpu_is_meant(environment):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, but nvidia-smi shows no such GPU on this machine: `nvidia-smi -L` "
            "lists what there is; unset the variable, or set cluster.gpus_per_node=0 to train on the CPU"
        )


def _listed() -> dict[str, Gpu]:
    """The GPUs of this machine by index, and again by UUID; MIG instances by their UUIDs, the first of a GPU in its
    stead."""
    found: dict[str, Gpu] = {}
    cut: dict[str, str] = {}
    for line in nvidia_smi(
        "--query-gpu=index,uuid,name,memory.total,mig.mode.current", "--format=csv,noheader,nounits"
    ):
        index, uuid, name, mebibytes, mig = (part.strip() for part in line.split(","))
        if mig == "Enabled":
            cut[uuid] = index
        elif mebibytes.isdigit():
            found[index] = found[uuid] = Gpu(name, int(mebibytes) << 20)
    for whole, uuid, part in _instances() if cut else ():
        found[uuid] = part
        found.setdefault(cut[whole], part)
        found.setdefault(whole, part)
    return found


def _instances() -> Iterator[tuple[str, str, Gpu]]:
    """(UUID of the GPU, its own UUID, itself) of every MIG instance: one listing has the UUIDs, another the memory."""
    from xml.etree import ElementTree

    described = ElementTree.fromstring("\n".join(nvidia_smi("-q", "-x"))).iter("gpu")
    sizes = {gpu.findtext("uuid"): [of.findtext(_MIG_MEMORY, "") for of in gpu.iter("mig_device")] for gpu in described}
    name = whole = ""
    for line in nvidia_smi("-L"):
        if found := re.match(r"GPU \d+: (.*) \(UUID: (GPU-[^)]+)\)", line):
            name, whole = found.groups()
        elif found := re.match(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)", line):
            profile, number, uuid = found.groups()
            mebibytes = sizes[whole][int(number)].removesuffix(" MiB")
            if mebibytes.isdigit():
                yield whole, uuid, Gpu(f"{name}{_MIG}{profile}", int(mebibytes) << 20)


def nvidia_smi(*options: str) -> list[str]:
    """Lines that nvidia-smi prints; none where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    run = subprocess.run([program, *options], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    return run.stdout.splitlines()


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
