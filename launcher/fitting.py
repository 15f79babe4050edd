"""What fits the memory: micro-batch size, recomputation, offload and the stage of ZeRO where they are "auto", and the
smallest changes after which a model fits that does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Literal

from trainer.config.model import CheckpointedLayers, DeepSpeedConfig
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.planning.batches import BatchPlan, choose_micro_batch, plan_batches
from trainer.planning.communication import USUAL, Communication
from trainer.planning.deepspeed_config import deepspeed_config
from trainer.planning.memory import MemoryEstimate, Recomputation, estimate, recomputation
from trainer.planning.model_facts import ModelFacts

# A larger micro-batch than this many tokens gains nothing: GPUs are busy, and CPU caches overflow sooner.
MICRO_BATCH_TOKENS = {"cuda": 32_768, "cpu": 4_096}
# Where the time of a step cannot be estimated: so many tokens keep a device busy already, rather these than a larger
# micro-batch at the price of a forward pass more.
ENOUGH_TOKENS = {"cuda": 8_192, "cpu": 1_024}
# Share of the memory that what dsft chooses or proposes may fill: the estimate may be so much too low, and allocators
# lose some to fragments. What a config asks for is refused only where it exceeds all of it.
SAFE = 0.9
GIB = 1 << 30
_MOST_TIMES_MORE = 64  # nodes, or GPUs of this machine, that a change may ask for


@dataclass(frozen=True)
class Setup:
    """What the memory of a rank depends on, of what may be chosen.

    Attributes:
        micro_batch_size: sequences.
        recompute: `model.gradient_checkpointing`, without "auto".
        offload: where the optimizer's states are: ``none`` (the device), ``cpu`` or ``nvme``.
        stage: of ZeRO.
        nodes: of the job.
        model: the facts of the model, with an adapter or without.
    """

    micro_batch_size: int
    recompute: bool | Literal["selective"] | CheckpointedLayers
    offload: str
    stage: int
    nodes: int
    model: ModelFacts


@dataclass(frozen=True)
class Room:
    """The memory that there is, in bytes; None: not known.

    ``per_node``: ranks of a node. ``communication``: how much they send at a time, in buffers. ``fused``: whether the
    model runs on Liger's kernels.
    """

    device: str
    device_memory: int | None
    host_memory: int | None
    per_node: int
    communication: Communication = USUAL
    fused: bool = False

    def holds(self, memory: MemoryEstimate | None, share: float = 1.0) -> bool:
        """Whether it fits into this share of it; True where nothing is known."""
        if memory is None:
            return True
        on_device = self.device_memory is None or memory.total <= share * self.device_memory
        host = self.per_node * (memory.host_offload + memory.host_staging)
        return on_device and (self.host_memory is None or host <= share * self.host_memory)


def memory_of(config: LaunchConfig, setup: Setup, room: Room) -> MemoryEstimate | None:
    """The estimate for a rank."""
    section = section_of(config, setup)
    clip = config.training.max_grad_norm
    settings = deepspeed_config(section, config.model.dtype, setup.micro_batch_size, 1, clip, room.communication)
    return estimate(
        setup.model,
        settings["zero_optimization"],
        world_size=setup.nodes * room.per_node,
        micro_batch_size=setup.micro_batch_size,
        sequence_length=config.data.sequence_length,
        dtype=config.model.dtype,
        recompute=recomputation_of(config, setup, room.fused),
        attention=config.model.attention,
        device=room.device,
        sequence_parallel=config.model.sequence_parallel,
        state_bytes=config.training.state_bytes,
        fused_loss=config.task.type == "causal-lm" and config.model.fuses_loss(setup.model.plain_logits),
        on_disk=section.on_disk,
    )


def section_of(config: LaunchConfig, setup: Setup) -> DeepSpeedConfig:
    """The config's section `deepspeed`, without "auto" for the optimizer's place and the stage of ZeRO."""
    return config.deepspeed.model_copy(update={"offload_optimizer": setup.offload, "zero_stage": setup.stage})


def recomputation_of(config: LaunchConfig, setup: Setup, fused: bool = False) -> Recomputation:
    """What layers keep."""
    return recomputation(config.model.model_copy(update={"gradient_checkpointing": setup.recompute}), fused)


def choose(
    config: LaunchConfig, model: ModelFacts, room: Room, seconds: Callable[[Setup, BatchPlan], float | None]
) -> tuple[Setup, BatchPlan, str]:
    """(micro-batch, recomputation, offload and stage of the run, its batch arithmetic, why these).

    Where "auto" leaves it open: the optimizer is offloaded (its states then cross PCIe in every step) only if it does
    not fit in either mode, and to files only if host memory does not hold it either; activations are kept where they
    fit and a step is not expected to take longer for it (recomputation is a third more computation, but larger
    micro-batches make fewer gathers of the parameters). Where the memory is not known, they are recomputed: too slow is
    better than too large.

    Args:
        seconds: expected time of a step, or None.

    Raises:
        UserError: more ranks than sequences.
    """
    recompute, offload = config.model.gradient_checkpointing, config.deepspeed.offload_optimizer
    start = Setup(
        1,
        True if recompute == "auto" else recompute,
        "none" if offload == "auto" else offload,
        config.zero_stages[-1],
        config.cluster.nodes,
        model,
    )
    known = room.device_memory is not None and memory_of(config, start, room) is not None
    places = [start.offload]
    if offload == "auto" and known:  # on a CPU, host memory is the device's
        places += ["cpu"] * (room.device == "cuda") + ["nvme"] * (config.deepspeed.nvme_path is not None)
    free = recompute == "auto" and known and not config.model.activation_offload
    modes = (False, True) if free else (start.recompute,)
    given = config.training.micro_batch_size
    alone = config.cluster.nodes * room.per_node == 1
    share = math.ceil(config.training.global_batch_size / _streams(config, start, room))
    enough = min(share, max(1, ENOUGH_TOKENS[room.device] // config.data.sequence_length))

    def candidates(place: str) -> Iterator[tuple[Setup, BatchPlan]]:
        stages = config.zero_stages if (known or alone) and place == start.offload else (start.stage,)
        for mode, stage in product(modes, stages):
            size = 1 if given == "auto" else given
            setup = replace(start, recompute=mode, offload=place, stage=stage, micro_batch_size=size)
            if room.holds(memory_of(config, setup, room), SAFE):
                batch = _batch(config, setup, room)
                setup = replace(setup, micro_batch_size=batch.micro_batch_size)
                if stage == start.stage or alone or seconds(setup, batch) is not None:
                    yield setup, batch

    for place in places:
        found = list(candidates(place))
        if found:
            setup, batch = _faster(found, seconds, enough if given == "auto" else 1)
            return setup, batch, _reason(config, setup, known, [option for option, _ in found])
    setup = replace(start, recompute=modes[-1], offload=places[-1])
    batch = _batch(config, setup, room)
    return replace(setup, micro_batch_size=batch.micro_batch_size), batch, _reason(config, setup, known, [])


def _faster(
    found: list[tuple[Setup, BatchPlan]], seconds: Callable[[Setup, BatchPlan], float | None], enough: int
) -> tuple[Setup, BatchPlan]:
    """The one with the shorter step; where that is not known, the first whose micro-batch is large enough."""
    times = [time for option in found if (time := seconds(*option)) is not None]
    if len(times) == len(found):
        return found[times.index(min(times))]
    return next((option for option in found if option[0].micro_batch_size >= enough), found[-1])


def _reason(config: LaunchConfig, setup: Setup, known: bool, fitting: list[Setup]) -> str:
    parts = []
    if config.model.gradient_checkpointing == "auto":
        if not known:
            parts.append("activations are recomputed: the memory is not known")
        elif setup.recompute:
            kept = any(not option.recompute for option in fitting)
            why = "larger micro-batches are worth it" if kept else "they would not fit"
            parts.append(f"activations are recomputed: {why}")
        else:
            parts.append("activations fit and are kept")
    if config.deepspeed.offload_optimizer == "auto":
        where = "" if setup.offload == "cpu" else f" to {config.deepspeed.nvme_path}"
        moved = f"the optimizer is offloaded{where}: it would not fit"
        parts.append(moved if setup.offload != "none" else "the optimizer stays on the device")
    if config.deepspeed.zero_stage == "auto":
        if setup.stage < 3:
            parts.append(
                "ZeRO-2: whole weights fit, so that none are gathered" if known else "ZeRO-2: one rank has all"
            )
        elif len(config.zero_stages) == 1:
            parts.append("ZeRO-3, which other settings need")
        elif any(option.stage < 3 for option in fitting):
            parts.append("ZeRO-3: a step is expected to be shorter")
        else:
            parts.append("ZeRO-3: whole weights would not fit, or cannot be told to be faster")
    return "; ".join(parts)


def _streams(config: LaunchConfig, setup: Setup, room: Room) -> int:
    """Data-parallel size: ranks, or groups of those that share sequences."""
    return setup.nodes * room.per_node // config.model.sequence_parallel


def _batch(config: LaunchConfig, setup: Setup, room: Room) -> BatchPlan:
    """The batch arithmetic, with the micro-batch size chosen where it is "auto"."""
    training, length = config.training, config.data.sequence_length
    world_size = _streams(config, setup, room)

    def fits(size: int) -> bool:
        return room.holds(memory_of(config, replace(setup, micro_batch_size=size), room), SAFE)

    if training.micro_batch_size != "auto":
        return plan_batches(training.global_batch_size, world_size, training.micro_batch_size)
    share = math.ceil(training.global_batch_size / world_size)
    tokens = MICRO_BATCH_TOKENS[room.device] * config.model.sequence_parallel
    limit = min(share, max(1, tokens // length))
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
    equal = bool(config.model.compile)
    size = choose_micro_batch(training.global_batch_size, world_size, largest, equal=equal)
    if size < largest:
        reason += f"; {size} makes equal ones, for compiled layers" if equal else f"; {size} wastes less"
    return plan_batches(training.global_batch_size, world_size, size, f"auto: {reason}")


# -- what does not fit -------------------------------------------------------------------------------------------------


def ways_to_fit(config: LaunchConfig, setup: Setup, room: Room, adapted: Mapping[str, ModelFacts]) -> list[str]:
    """The smallest changes after which it fits, as `--set` would take them: single ones if any does, else pairs.

    Args:
        adapted: facts of the same model with an adapter of a type, the smallest change first.
    """
    kinds: list[Callable[[Setup], Iterator[tuple[str, Setup]]]] = [_smaller_batches, _recompute, _cut_weights]
    kinds.append(lambda start: _offload(config, start, room))
    if room.device == "cuda":  # on a CPU, more ranks on the same machine share the same memory
        kinds.append(lambda start: _more_nodes(config, start, room))
    if adapted:
        kinds.append(
            lambda start: (
                (f"model.adapter.type={kind}", replace(start, model=model)) for kind, model in adapted.items()
            )
        )

    def first(options: Iterator[tuple[str, Setup]]) -> str | None:
        return next((text for text, changed in options if room.holds(memory_of(config, changed, room), SAFE)), None)

    ways = [way for kind in kinds if (way := first(kind(setup)))]
    if ways:
        return ways
    for one, other in combinations(kinds, 2):
        # all that the first of them can do, then as little of the second as is enough
        text, changed = [("", setup), *one(setup)][-1]
        way = first(other(changed)) if text else None
        if way:
            ways.append(f"{text} and {way}")
    return ways[:4]


def _smaller_batches(start: Setup) -> Iterator[tuple[str, Setup]]:
    for size in range(start.micro_batch_size - 1, 0, -1):
        yield f"training.micro_batch_size={size}", replace(start, micro_batch_size=size)


def _recompute(start: Setup) -> Iterator[tuple[str, Setup]]:
    if start.recompute is not True:
        yield "model.gradient_checkpointing=true", replace(start, recompute=True)


def _cut_weights(start: Setup) -> Iterator[tuple[str, Setup]]:
    if start.stage < 3:
        yield "deepspeed.zero_stage=3", replace(start, stage=3)


def _offload(config: LaunchConfig, start: Setup, room: Room) -> Iterator[tuple[str, Setup]]:
    """To host memory (a CPU has no other), then to files."""
    settings = config.deepspeed
    places = ["cpu"] * (start.offload == "none" and room.device == "cuda")
    places += ["nvme"] * (start.offload != "nvme" and start.stage == 3)
    for place in places:
        moved = replace(start, offload=place)
        memory = memory_of(config, moved, room)
        text = f"deepspeed.offload_optimizer={place}"
        if place == "nvme" and settings.nvme_path is None:
            text += " and deepspeed.nvme_path=FOLDER"
        if memory and place == "cpu":
            needed = room.per_node * (memory.host_offload + memory.host_staging)
            text += f" ({needed / GIB:.0f} GiB of each node's memory)"
        elif memory:
            text += f" ({room.per_node * memory.nvme / GIB:.0f} GiB of each node's disk)"
        yield text, moved


def _more_nodes(config: LaunchConfig, start: Setup, room: Room) -> Iterator[tuple[str, Setup]]:
    sharing = config.model.sequence_parallel
    most = min(config.training.global_batch_size * sharing // room.per_node, start.nodes * _MOST_TIMES_MORE)
    for nodes in range(start.nodes + 1, most + 1):
        if nodes * room.per_node % sharing:
            continue
        gpus = nodes * room.per_node
        text = f"cluster.nodes={nodes}" if config.cluster.backend == "slurm" else f"{gpus} GPUs"
        yield text, replace(start, nodes=nodes)


def refuse(memory: MemoryEstimate, room: Room, ways: list[str]) -> UserError:
    """The error that says what does not fit, and what would."""
    on_device = [(name, size) for name, size in memory.components().items() if not name.startswith(("host_", "nvme"))]
    largest = sorted(on_device, key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in largest)
    there = room.device_memory
    if there is not None and memory.total > there:
        where = "a GPU has" if room.device == "cuda" else "a rank has (host memory / ranks)"
        what = f"a rank needs about {memory.total / GIB:.1f} GiB ({parts}), {where} {there / GIB:.1f} GiB"
    else:
        needed, host = room.per_node * (memory.host_offload + memory.host_staging) / GIB, (room.host_memory or 0) / GIB
        offloaded = "the offloaded optimizer and the " if memory.host_offload else "the "
        what = (
            f"{offloaded}copy of its states for checkpoints need {needed:.1f} GiB of host memory on each node, which "
        )
        what += f"has {host:.1f} GiB"
    change = " or ".join(ways) if ways else "a smaller model, shorter sequences, or more memory"
    return UserError(f"the model does not fit the memory: {what}. It fits with {change}")
