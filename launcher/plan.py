"""A config and the facts of a machine, made into a plan: ranks, batches, memory, the DeepSpeed JSON, every command."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.console import gib
from launcher.facts import Facts
from launcher.fitting import SAFE, Room, Setup, choose, memory_of, recomputation_of, refuse, section_of, ways_to_fit
from trainer.config.loading import config_hash
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.planning.batches import BatchPlan
from trainer.planning.communication import Communication, plan_communication
from trainer.planning.deepspeed_config import deepspeed_config
from trainer.planning.memory import MemoryEstimate
from trainer.planning.model_facts import MIXES_SAMPLES, ModelFacts
from trainer.planning.throughput import FORMULA, Device, StepTime, flops_per_token, peak_flops, step_time
from trainer.planning.throughput import device as known_device

DEFAULT_PORT = 29_500


@dataclass(frozen=True)
class Plan:
    """What a launch will do. Bytes and sequences; ``None`` where it cannot be known here.

    Attributes:
        device_name: the GPU model, where GPUs are used and seen from here.
        device_memory: bytes that one rank may use.
        memory: estimate for one rank, or None where the model's sizes are not known.
        host_memory: bytes of host memory of a node.
        step_time: bounds of an optimizer step's time, where the GPUs are known ones.
        sequence_parallel: ranks that share each sequence.
        recompute: whether activations are computed again in the backward pass.
        offload: where the optimizer's states are, ``none``, ``cpu`` or ``nvme``.
        nvme: ``path`` (on each node) and what it ``holds`` (``optimizer``, ``parameters``); None: nothing is in files.
        memory_reason: why, where the config leaves it open; else empty.
        sequence_length: tokens.
        state_bytes: of each trained parameter besides its fp32 master.
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
    sequence_parallel: int
    recompute: bool
    offload: str
    nvme: dict[str, Any] | None
    memory_reason: str
    threads_per_rank: int
    deepspeed: dict[str, Any]
    communication: Communication
    warnings: tuple[str, ...]
    max_steps: int | None
    sequence_length: int
    state_bytes: int = 8

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def checkpoint_bytes(self) -> int | None:
        """fp32 master weights and `state_bytes` (12 bytes for each trained parameter with AdamW); frozen ones in their
        own dtype, unless the model's files hold them."""
        trained, everything = self.model.trainable_parameters, self.model.parameters
        if trained is None or everything is None:
            return None
        held = (4 + self.state_bytes) * trained
        if self.model.pinned:
            return held
        return held + (2 if self.deepspeed["bf16"]["enabled"] else 4) * (everything - trained)

    def commands(self) -> list[str]:
        """What a person could type on each node to run an attempt; launch does the same through `trainer.agent`."""
        address = "127.0.0.1" if self.nodes == 1 else "$MASTER_ADDR"
        accelerator = ["DS_ACCELERATOR=cpu"] if self.device == "cpu" else []
        lines = []
        for node in range(self.nodes):
            words = [
                "torchrun",
                *torchrun_arguments(self.nodes, self.processes_per_node, node, address, DEFAULT_PORT),
                *("-m", "trainer.worker", "--run-dir", self.run_dir, "--attempt", "1"),
            ]
            line = " ".join(word if word == f"--master-addr={address}" else shlex.quote(word) for word in words)
            threads = f"OMP_NUM_THREADS={self.threads_per_rank}"
            lines.append(" ".join(["PYTHONSAFEPATH=1", threads, *accelerator, line]))
        return lines

    def to_json(self) -> dict[str, Any]:
        """The plan as written to plan.json."""
        return asdict(self) | {
            "memory": self.memory.to_json() if self.memory else None,
            "world_size": self.world_size,
            "checkpoint_bytes": self.checkpoint_bytes,
            "flops_formula": FORMULA,
            "commands": self.commands(),
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
    gpu = facts.gpus[0] if local and device == "cuda" else None
    gpu_name = gpu.name if gpu else _gpu_model(config) if device == "cuda" else None
    figures = known_device(gpu_name)
    host_memory = facts.memory if local else None
    if device == "cuda":
        known = figures.memory if figures else None
        device_memory = min(item.memory for item in facts.gpus[:per_node]) if gpu else known
    else:
        device_memory = host_memory // per_node if host_memory else None

    _check_sharing(config, facts.model, config.cluster.nodes * per_node)
    communication = _communication(config, facts.model, device, per_node, figures, device_memory)
    fused = device == "cuda" and facts.liger and config.model.kernels != "none"
    room = Room(device, device_memory, host_memory, per_node, communication, fused)
    flops = _flops(config, facts.model)
    peak = peak_flops(gpu_name) if gpu_name and config.model.dtype == "bfloat16" else None

    def time_of(setup: Setup, batch: BatchPlan, hpz: bool | None = None) -> StepTime | None:
        copies = communication.hpz > 1 if hpz is None else hpz
        return _step_time(config, setup, batch, flops, peak, per_node, figures, copies)

    setup, batch, reason = choose(config, facts.model, room, lambda *option: _expected(option[0], time_of(*option)))
    if config.deepspeed.hpz == "auto":
        without, with_copies = time_of(setup, batch), time_of(setup, batch, True)
        room = _second_copies(config, setup, room, without, with_copies)
        communication = room.communication
    memory = memory_of(config, setup, room)
    if not room.holds(memory):
        assert memory is not None
        raise refuse(memory, room, ways_to_fit(config, setup, room, facts.adapted_models))
    if facts.model.note:
        warnings.append(f"no memory estimate: {facts.model.note}")
    elif memory is not None and device_memory is None:
        warnings.append("the nodes cannot be seen from here: whether the model fits their memory is not checked")
    elif memory is not None and device == "cpu" and per_node * memory.total > facts.memory_available:
        free, needed = gib(facts.memory_available), gib(per_node * memory.total)
        warnings.append(f"{free} of host memory are free now, {per_node} ranks need about {needed}")
    if local and device == "cpu" and config.model.dtype == "bfloat16" and not facts.multiplies_bfloat16:
        warnings.append(
            "this CPU has no instructions for bfloat16 (AVX-512 or Arm's BF16): steps take many times as long as with "
            "model.dtype=float32"
        )
    section = section_of(config, setup)
    warnings += _batch_warnings(config, batch, facts.model, per_node)
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
        step_time=time_of(setup, batch),
        sequence_parallel=config.model.sequence_parallel,
        recompute=setup.recompute is not False,
        offload=setup.offload,
        nvme={"path": section.nvme_path, "holds": section.on_disk} if section.on_disk else None,
        memory_reason=reason,
        threads_per_rank=max(1, (facts.cores if local else _cores_of_a_node(config)) // per_node),
        deepspeed=deepspeed_config(
            section,
            config.model.dtype,
            batch.micro_batch_size,
            batch.micro_batches_per_rank,
            config.training.max_grad_norm,
            communication,
            bool(config.model.compile),
            config.cluster.nodes * per_node,
        ),
        communication=communication,
        warnings=tuple(warnings),
        max_steps=config.training.max_steps,
        sequence_length=config.data.sequence_length,
        state_bytes=config.training.state_bytes,
    )


def _gpu_model(config: LaunchConfig) -> str | None:
    """The GPUs of nodes that cannot be seen from here, as the config names them."""
    return None if config.cluster.backend == "local" else config.cluster.gpu_model


def _network(config: LaunchConfig) -> float | None:
    """Bytes/s of a node to the others, one direction; None: not known."""
    gigabits = None if config.cluster.backend == "local" else config.cluster.network_gigabits
    return None if gigabits is None else gigabits * 1e9 / 8


def _communication(
    config: LaunchConfig,
    model: ModelFacts,
    device: str,
    per_node: int,
    figures: Device | None,
    device_memory: int | None,
) -> Communication:
    hpz = 1
    if config.deepspeed.hpz is True:
        if config.cluster.nodes == 1 or per_node == 1:
            raise UserError("deepspeed.hpz: it needs several nodes with several ranks each; leave it out")
        hpz = per_node
    if device == "cpu":
        return Communication(reason="on CPUs nothing overlaps: common sizes", hpz=hpz)
    planned = plan_communication(
        model,
        nodes=config.cluster.nodes,
        gpus_per_node=per_node,
        link=figures.link if figures else None,
        network=_network(config),
        parameter_bytes=2 if config.model.dtype == "bfloat16" else 4,
        device_memory=device_memory,
    )
    return replace(planned, hpz=hpz)


_WORTH_A_COPY = 0.95  # of the time of a step without


def _second_copies(
    config: LaunchConfig, setup: Setup, room: Room, without: StepTime | None, with_copies: StepTime | None
) -> Room:
    """With a second copy of the weights on each node, if the network holds steps up, it would less with them, and
    they fit."""
    settings = config.deepspeed
    possible = setup.nodes > 1 and room.per_node > 1 and setup.stage == 3 and settings.offload_parameters == "none"
    if not possible or without is None or with_copies is None or with_copies.least > _WORTH_A_COPY * without.least:
        return room
    why = f"hpZ: the network would hold steps up ({without.least:.3g} s, {with_copies.least:.3g} s with it)"
    why = f"{room.communication.reason}; {why}"
    copied = replace(room, communication=replace(room.communication, hpz=room.per_node, reason=why))
    return copied if copied.holds(memory_of(config, setup, copied), SAFE) else room


def _check_sharing(config: LaunchConfig, model: ModelFacts, world_size: int) -> None:
    """Raise UserError where ranks cannot share sequences as the config asks."""
    sharing = config.model.sequence_parallel
    if world_size % sharing:
        raise UserError(
            f"model.sequence_parallel is {sharing}, but {world_size} ranks are no whole number of groups of so many: "
            f"use a multiple of {sharing} ranks"
        )
    heads, others = model.heads, model.kv_heads or model.heads
    if heads and others and (heads % sharing or (others % sharing and sharing % others)):
        raise UserError(
            f"model.sequence_parallel is {sharing}, but the model's {heads} attention heads ({others} of keys and "
            "values) cannot be shared evenly by so many ranks: choose a divisor of both"
        )


def _flops(config: LaunchConfig, model: ModelFacts) -> float | None:
    if not model.layers or not model.hidden_size or model.parameters is None or model.idle_parameters is None:
        return None
    multiplied = model.parameters - model.lookup_parameters - model.idle_parameters
    return flops_per_token(multiplied, model.layers, model.hidden_size, config.data.sequence_length)


def _expected(setup: Setup, time: StepTime | None) -> float | None:
    """Seconds; stages 1 and 2 hide none of the communication (`overlap_comm` is off)."""
    if time is None:
        return None
    return time.most if setup.stage < 3 else (time.least + time.most) / 2


def _step_time(
    config: LaunchConfig,
    setup: Setup,
    batch: BatchPlan,
    flops: float | None,
    peak: float | None,
    per_node: int,
    figures: Device | None,
    hpz: bool,
) -> StepTime | None:
    model = setup.model
    if flops is None or peak is None or figures is None or model.parameters is None:
        return None
    return step_time(
        flops_per_token=flops,
        tokens_per_rank=batch.micro_batches_per_rank
        * batch.micro_batch_size
        * config.data.sequence_length
        / config.model.sequence_parallel,
        recompute=recomputation_of(config, setup).share,
        peak_flops=peak,
        parameters=model.held_elements or model.parameters,
        trainable=model.trainable_parameters or 0,
        stage=setup.stage,
        parameter_bytes=2,
        gradient_bytes=4,  # DeepSpeed JSON: communication_data_type fp32
        micro_batches=batch.micro_batches_per_rank,
        nodes=config.cluster.nodes,
        gpus_per_node=per_node,
        link=figures.link,
        network=_network(config),
        hpz=hpz,
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


def _batch_warnings(config: LaunchConfig, batch: BatchPlan, model: ModelFacts, per_node: int) -> list[str]:
    warnings = []
    if batch.wasted_share > 0.1:
        better = f"; better: {' or '.join(batch.suggestions)}" if batch.suggestions else ""
        warnings.append(f"ranks idle for {batch.wasted_share:.0%} of each step{better}")
    length = config.data.sequence_length
    if model.max_positions is not None and length > model.max_positions:
        warnings.append(
            f"data.sequence_length {length} exceeds the model's max_position_embeddings {model.max_positions}"
        )
    if config.data.packing and model.model_type in MIXES_SAMPLES:
        warnings.append(
            f"data.packing: {model.model_type} lets packed samples see one another with most attentions, which ends a "
            "run as soon as its model is loaded: set it to false"
        )
    sharing = config.model.sequence_parallel
    if per_node % sharing:
        warnings.append(
            f"model.sequence_parallel: some groups of {sharing} ranks reach over nodes, whose network is slow"
        )
    judged = {
        "evaluation.interval_steps": config.evaluation.interval_steps,
        "evaluation.patience": config.evaluation.patience,
        "checkpoint.keep_best": config.checkpoint.keep_best,
    }
    asked = [key for key, value in judged.items() if value]
    if asked and not config.data.evaluation:
        warnings.append(f"{', '.join(asked)}: set, but data.evaluation names no data: nothing is evaluated")
    elif config.evaluation.patience and config.evaluation.interval_steps is None:
        warnings.append("evaluation.patience: without evaluation.interval_steps there is one evaluation, at the end")
    return warnings
