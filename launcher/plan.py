"""A config and the facts of a machine, made into a plan: ranks, batches, memory, the DeepSpeed JSON, every command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.facts import Facts
from trainer.config.loading import config_hash
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.planning.batches import BatchPlan, choose_micro_batch, plan_batches
from trainer.planning.deepspeed_config import deepspeed_config
from trainer.planning.flops import FORMULA, flops_per_token, peak_flops
from trainer.planning.memory import MemoryEstimate, estimate, recomputation
from trainer.planning.model_facts import ModelFacts
from trainer.planning.throughput import Device, StepTime, step_time
from trainer.planning.throughput import device as known_device

# A larger micro-batch than this many tokens gains nothing: GPUs are busy, and CPU caches overflow sooner.
MICRO_BATCH_TOKENS = {"cuda": 32_768, "cpu": 4_096}
DEFAULT_PORT = 29_500
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What a launch will do. Bytes and sequences; ``None`` where it cannot be known here.

    Attributes:
        device_name: the GPU model, where GPUs are used and seen from here.
        device_memory: bytes that one rank may use.
        memory: estimate for one rank, or None where the model's sizes are not known.
        host_memory: bytes of host memory of a node.
        step_time: bounds of an optimizer step's time, where the GPUs are known ones.
        sequence_length: tokens.
    """

    name: str
    run_dir: str
    config_hash: str
    backend: str
    device: Literal["cpu", "cuda"]
    device_name: str | None
    nodes: int
    processes_per_node: int
    batch: BatchPlan
    model: ModelFacts
    memory: MemoryEstimate | None
    device_memory: int | None
    host_memory: int | None
    flops_per_token: float | None
    peak_flops: float | None
    step_time: StepTime | None
    threads_per_rank: int
    deepspeed: dict[str, Any]
    warnings: tuple[str, ...]
    max_steps: int | None
    sequence_length: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def checkpoint_bytes(self) -> int | None:
        """fp32 master weights and two moments: 12 bytes for each trained parameter; frozen ones in their own dtype,
        unless the model's files hold them."""
        trained, everything = self.model.trainable_parameters, self.model.parameters
        if trained is None or everything is None:
            return None
        if self.model.pinned:
            return 12 * trained
        return 12 * trained + (2 if self.deepspeed["bf16"]["enabled"] else 4) * (everything - trained)

    def commands(self, attempt: int = 1, address: str | None = None, port: int = DEFAULT_PORT) -> list[str]:
        """What a person could type on each node to run an attempt; launch does the same through `trainer.agent`."""
        address = address or ("127.0.0.1" if self.nodes == 1 else "$MASTER_ADDR")
        accelerator = ["DS_ACCELERATOR=cpu"] if self.device == "cpu" else []
        lines = []
        for node in range(self.nodes):
            words = [
                "torchrun",
                *torchrun_arguments(self.nodes, self.processes_per_node, node, address, port),
                *("-m", "trainer.worker", "--run-dir", self.run_dir, "--attempt", str(attempt)),
            ]
            line = " ".join(word if word == f"--master-addr={address}" else shlex.quote(word) for word in words)
            threads = f"OMP_NUM_THREADS={self.threads_per_rank}"
            lines.append(" ".join(["PYTHONSAFEPATH=1", threads, *accelerator, line]))
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as written to plan.json."""
        return {
            "name": self.name,
            "run_dir": self.run_dir,
            "config_hash": self.config_hash,
            "backend": self.backend,
            "device": self.device,
            "device_name": self.device_name,
            "device_memory": self.device_memory,
            "host_memory": self.host_memory,
            "world_size": self.world_size,
            "nodes": self.nodes,
            "processes_per_node": self.processes_per_node,
            "threads_per_rank": self.threads_per_rank,
            "batch": asdict(self.batch),
            "model": asdict(self.model),
            "memory": self.memory.to_json() if self.memory else None,
            "checkpoint_bytes": self.checkpoint_bytes,
            "flops_per_token": self.flops_per_token,
            "flops_formula": FORMULA,
            "peak_flops": self.peak_flops,
            "step_time": asdict(self.step_time) if self.step_time else None,
            "deepspeed": self.deepspeed,
            "commands": self.commands(),
            "warnings": list(self.warnings),
        }


def _cores_of_a_node(config: LaunchConfig) -> int:
    """What the config asks for on another machine; 1 if it does not say."""
    return config.cluster.cpus_per_task or 1 if config.cluster.backend == "slurm" else 1


def torchrun_arguments(nodes: int, processes_per_node: int, node_rank: int, address: str, port: int) -> list[str]:
    """Static rendezvous, and no restarts of torchrun's own: those are the supervisor's."""
    return [
        f"--nnodes={nodes}",
        f"--nproc-per-node={processes_per_node}",
        f"--node-rank={node_rank}",
        f"--master-addr={address}",
        f"--master-port={port}",
        "--max-restarts=0",
    ]


def make_plan(config: LaunchConfig, facts: Facts) -> Plan:
    """The plan of a config on the machine that `facts` describe. Pure: reads and starts nothing.

    Raises:
        UserError: it cannot work: more ranks than sequences or GPUs, a model that does not fit, a DeepSpeed key
            that contradicts the plan.
    """
    warnings: list[str] = []
    device, per_node = _device_and_processes(config, facts)
    local = config.cluster.backend == "local"
    world_size = config.cluster.nodes * per_node
    gpu = facts.gpus[0] if local and device == "cuda" else None
    gpu_name = gpu.name if gpu else _gpu_model(config) if device == "cuda" else None
    figures = known_device(gpu_name)
    host_memory = facts.memory if local else None
    if device == "cuda":
        known = figures.memory if figures else None
        device_memory = min(item.memory for item in facts.gpus[:per_node]) if gpu else known
    else:
        device_memory = host_memory // per_node if host_memory else None

    def sections(micro_batch_size: int, per_rank: int, offload: str | None = None) -> dict[str, Any]:
        section = config.deepspeed
        if offload is not None:
            section = section.model_copy(update={"offload_optimizer": offload})
        return deepspeed_config(section, config.model.dtype, micro_batch_size, per_rank, config.training.max_grad_norm)

    def memory_of(micro_batch_size: int, ranks: int = world_size, offload: str | None = None) -> MemoryEstimate | None:
        return estimate(
            facts.model,
            sections(micro_batch_size, 1, offload)["zero_optimization"],
            world_size=ranks,
            micro_batch_size=micro_batch_size,
            sequence_length=config.data.sequence_length,
            dtype=config.model.dtype,
            recompute=recomputation(config.model),
            attention=config.model.attention,
            device=device,
        )

    def fits(memory: MemoryEstimate | None) -> bool:
        if memory is None:
            return True
        on_device = device_memory is None or memory.total <= device_memory
        return on_device and (host_memory is None or per_node * memory.host_offload <= host_memory)

    batch = _batch(config, device, world_size, lambda size: fits(memory_of(size)))
    memory = memory_of(batch.micro_batch_size)
    if not fits(memory):
        assert memory is not None
        ways = _ways_to_fit(config, device, batch.micro_batch_size, world_size, lambda *args: fits(memory_of(*args)))
        raise UserError(_does_not_fit(memory, device, device_memory, host_memory, per_node, ways))
    if facts.model.note:
        warnings.append(f"no memory estimate: {facts.model.note}")
    elif memory is not None and device_memory is None:
        warnings.append("the nodes cannot be seen from here: whether the model fits their memory is not checked")
    elif memory is not None and device == "cpu" and per_node * memory.total > facts.memory_available:
        free, needed = facts.memory_available / GIB, per_node * memory.total / GIB
        warnings.append(f"{free:.1f} GiB of host memory are free now, {per_node} ranks need about {needed:.1f} GiB")
    warnings += _batch_warnings(config, batch, facts.model)
    layers, hidden, parameters = facts.model.layers, facts.model.hidden_size, facts.model.parameters
    flops = None
    if layers and hidden and parameters is not None:
        multiplied = parameters - facts.model.lookup_parameters
        flops = flops_per_token(multiplied, layers, hidden, config.data.sequence_length)
    peak = peak_flops(gpu_name) if gpu_name and config.model.dtype == "bfloat16" else None
    return Plan(
        name=config.name,
        run_dir=str(Path(config.output_dir) / config.name),
        config_hash=config_hash(config),
        backend=config.cluster.backend,
        device=device,
        device_name=gpu_name,
        nodes=config.cluster.nodes,
        processes_per_node=per_node,
        batch=batch,
        model=facts.model,
        memory=memory,
        device_memory=device_memory,
        host_memory=host_memory,
        flops_per_token=flops,
        peak_flops=peak,
        step_time=_step_time(config, batch, facts.model, flops, peak, per_node, figures),
        threads_per_rank=max(1, (facts.cores if local else _cores_of_a_node(config)) // per_node),
        deepspeed=sections(batch.micro_batch_size, batch.micro_batches_per_rank),
        warnings=tuple(warnings),
        max_steps=config.training.max_steps,
        sequence_length=config.data.sequence_length,
    )


def _gpu_model(config: LaunchConfig) -> str | None:
    """The GPUs of nodes that cannot be seen from here, as the config names them."""
    return None if config.cluster.backend == "local" else config.cluster.gpu_model


def _step_time(
    config: LaunchConfig,
    batch: BatchPlan,
    model: ModelFacts,
    flops: float | None,
    peak: float | None,
    per_node: int,
    figures: Device | None,
) -> StepTime | None:
    if flops is None or peak is None or figures is None or model.parameters is None:
        return None
    gigabits = None if config.cluster.backend == "local" else config.cluster.network_gigabits
    return step_time(
        flops_per_token=flops,
        tokens_per_rank=batch.micro_batches_per_rank * batch.micro_batch_size * config.data.sequence_length,
        recompute=recomputation(config.model).share,
        peak_flops=peak,
        parameters=model.parameters,
        trainable=model.trainable_parameters or 0,
        stage=config.deepspeed.zero_stage,
        parameter_bytes=2,
        gradient_bytes=4,  # DeepSpeed JSON: communication_data_type fp32
        micro_batches=batch.micro_batches_per_rank,
        nodes=config.cluster.nodes,
        gpus_per_node=per_node,
        link=figures.link,
        network=None if gigabits is None else gigabits * 1e9 / 8,
    )


def _device_and_processes(config: LaunchConfig, facts: Facts) -> tuple[Literal["cpu", "cuda"], int]:
    """Where ranks compute, and how many there are on a node."""
    cluster = config.cluster
    if cluster.backend != "local":  # the nodes are not this machine: what the config says counts
        on_cpu = not cluster.gpus_per_node or cluster.environment.get("DS_ACCELERATOR") == "cpu"
        return ("cpu" if on_cpu else "cuda"), cluster.processes_per_node or cluster.gpus_per_node or 1
    gpus = len(facts.gpus)
    wanted = cluster.gpus_per_node
    if wanted is not None and wanted > gpus:
        raise UserError(
            f"cluster.gpus_per_node is {wanted}, but {gpus} GPU{'s are' if gpus != 1 else ' is'} usable here "
            "(nvidia-smi, CUDA_VISIBLE_DEVICES, DS_ACCELERATOR): lower it, or leave it out to use what there is"
        )
    usable = gpus if wanted is None else wanted
    if usable == 0:
        return "cpu", cluster.processes_per_node or 1
    processes = cluster.processes_per_node or usable
    if processes > usable:
        raise UserError(
            f"cluster.processes_per_node is {processes}, but a rank needs a GPU of its own, and there "
            f"{'is 1' if usable == 1 else f'are {usable}'}: set cluster.processes_per_node={usable}, "
            "or cluster.gpus_per_node=0 to train on the CPU"
        )
    return "cuda", processes


def _batch(config: LaunchConfig, device: str, world_size: int, fits: Callable[[int], bool]) -> BatchPlan:
    """The batch arithmetic, with the micro-batch size chosen where it is "auto"."""
    training, length = config.training, config.data.sequence_length
    if training.micro_batch_size != "auto":
        return plan_batches(training.global_batch_size, world_size, training.micro_batch_size)
    share = math.ceil(training.global_batch_size / world_size)
    limit = min(share, max(1, MICRO_BATCH_TOKENS[device] // length))
    largest, reason = limit, "all of a rank's share" if limit == share else f"{limit * length} tokens keep it busy"
    # the estimate grows with the micro-batch: find the last size that fits
    if not fits(limit):
        low, high = 0, limit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        largest, reason = max(low, 1), f"{max(low, 1)} is the largest that fits the memory"
    if world_size > training.global_batch_size:
        return plan_batches(training.global_batch_size, world_size, 1)  # raises
    size = choose_micro_batch(training.global_batch_size, world_size, largest)
    if size < largest:
        reason += f"; {size} wastes less"
    return plan_batches(training.global_batch_size, world_size, size, f"auto: {reason}")


def _batch_warnings(config: LaunchConfig, batch: BatchPlan, model: ModelFacts) -> list[str]:
    warnings = []
    if batch.wasted_share > 0.1:
        better = f"; better: {' or '.join(batch.suggestions)}" if batch.suggestions else ""
        warnings.append(f"ranks idle for {batch.wasted_share:.0%} of each step{better}")
    length = config.data.sequence_length
    if model.max_positions is not None and length > model.max_positions:
        warnings.append(
            f"data.sequence_length {length} exceeds the model's max_position_embeddings {model.max_positions}"
        )
    if config.evaluation.interval_steps is not None and not config.data.evaluation:
        warnings.append("evaluation.interval_steps is set, but data.evaluation names no data: nothing is evaluated")
    return warnings


def _ways_to_fit(
    config: LaunchConfig, device: str, micro: int, world_size: int, fits: Callable[..., bool]
) -> list[str]:
    """The smallest single changes after which it fits, as `--set` would take them."""
    ways = []
    smaller = next((size for size in range(micro - 1, 0, -1) if fits(size)), None)
    if smaller:
        ways.append(f"training.micro_batch_size={smaller}")
    if device == "cuda" and config.deepspeed.offload_optimizer == "none" and fits(micro, world_size, "cpu"):
        ways.append("deepspeed.offload_optimizer=cpu")
    if device == "cuda":  # on a CPU, more ranks on the same machine share the same memory
        ranks = next((n for n in (world_size * factor for factor in range(2, 65)) if fits(micro, n)), None)
        if ranks and ranks <= config.training.global_batch_size:
            ways.append(f"{ranks} ranks instead of {world_size}")
    return ways


def _does_not_fit(
    memory: MemoryEstimate,
    device: str,
    device_memory: int | None,
    host_memory: int | None,
    per_node: int,
    ways: list[str],
) -> str:
    largest = sorted(memory.components().items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in largest)
    if device_memory is not None and memory.total > device_memory:
        where = "a GPU has" if device == "cuda" else "a rank has (host memory / ranks)"
        what = f"a rank needs about {memory.total / GIB:.1f} GiB ({parts}), {where} {device_memory / GIB:.1f} GiB"
    else:
        needed, there = per_node * memory.host_offload / GIB, (host_memory or 0) / GIB
        what = f"the offloaded optimizer needs {needed:.1f} GiB of host memory on each node, which has {there:.1f} GiB"
    change = " or ".join(ways) if ways else "a smaller model, shorter sequences, or more memory"
    return f"the model does not fit the memory: {what}. It fits with {change}"
