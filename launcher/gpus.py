"""The GPUs of this machine, and whether the torch that is installed can use them; torch itself is not imported."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.failures import UserError

NVIDIA_SMI_SECONDS = 10
_NO_GPUS = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; the last is SLURM's, where a job has none
_MIG = " MIG "  # in the names of parts of a GPU
_MIG_MEMORY = "fb_memory_usage/total"
_AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_AMD_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
_AMD_OWN_MEMORY = (1, 2)  # heap types: the frame buffer's public and private part


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi names it, or a MIG instance, a part of one ("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), or one of
    AMD's; memory in bytes."""

    name: str
    memory: int


@dataclass(frozen=True)
class TorchBuild:
    """An installed torch: what its GPU code is for, "cuda", "hip" (AMD's), or None where it has none."""

    version: str
    gpus: str | None


def torch_build() -> TorchBuild | None:
    """The torch that ranks would import here, as its version.py tells; None: there is none, or it does not tell."""
    spec = importlib.util.find_spec("torch")
    try:
        return build_of((Path(spec.origin).parent / "version.py").read_text()) if spec and spec.origin else None
    except OSError:
        return None


def build_of(text: str) -> TorchBuild | None:
    """What torch's version.py tells; None: nothing of the kind."""
    lines = re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= *(.+)$", text, re.MULTILINE)
    try:
        told = {key: ast.literal_eval(value) for key, value in lines}
        return TorchBuild(told["__version__"], next((name for name in ("hip", "cuda") if told[name]), None))
    except (KeyError, ValueError, SyntaxError):
        return None


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
    if not found and (build := torch_build()) and build.gpus == "hip":
        return amd_gpus(environment)
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


def amd_gpus(environment: Mapping[str, str], nodes: Path = _AMD_NODES) -> tuple[Gpu, ...]:
    """AMD's GPUs as their driver lists them in sysfs (amdkfd: `properties` and `mem_banks` of each node), without those
    that have no memory of their own, or that a job may not use. Each variable names some of what the last one left.
    """
    found = {}
    for folder in nodes.glob("*"):
        with suppress(OSError):  # not permitted
            about = _numbers(folder / "properties")
            banks = [_numbers(path) for path in folder.glob("mem_banks/*/properties")]
            memory = sum(bank["size_in_bytes"] for bank in banks if bank["heap_type"] in _AMD_OWN_MEMORY)
            if about["simd_count"] and memory:
                found[int(folder.name)] = Gpu(f"AMD GPU, gfx target {about['gfx_target_version']}", memory)
    gpus = [found[number] for number in sorted(found)]
    for name in _AMD_VISIBLE:
        if name in environment:
            named = [item for item in environment[name].split(",") if item.strip() not in _NO_GPUS]
            gpus = gpus[: len(named)]  # all of a node are alike
    return tuple(gpus)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def _cpu_is_meant(environment: Mapping[str, str]) -> bool:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return environment.get("DS_ACCELERATOR") == "cpu" or (visible is not None and visible.strip() in _NO_GPUS)


def refuse_missing_gpus(environment: Mapping[str, str]) -> None:
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
