"""The plans of a run for fewer nodes than it was launched with, and when a restart with more of them pays. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.facts import Facts
from launcher.plan import Plan, make_plan
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError

# A restart with more nodes has to save so many times the seconds that it takes
_GAIN_FACTOR = 2.0


def smaller_plans(config: LaunchConfig, facts: Facts, micro_batch_size: int, stage: int) -> dict[int, Plan]:
    """Number of nodes -> plan, of those from `cluster.min_nodes` to below `cluster.nodes` on which the run fits.

    The global batch stays, and so do the micro-batch size and the stage of ZeRO (random weights are drawn otherwise at
    another) where the memory allows: then a step differs from that of the larger world size by rounding alone. A size
    that does not fit ends the search, since smaller ones do neither.
    """
    found: dict[int, Plan] = {}
    if config.cluster.backend == "local":
        return found
    for nodes in range(config.cluster.nodes - 1, config.cluster.fewest_nodes - 1, -1):
        smaller = _plan_for(config, facts, nodes, micro_batch_size, stage)
        asked = config.training.micro_batch_size, config.deepspeed.zero_stage
        if smaller is None and "auto" in asked:
            smaller = _plan_for(config, facts, nodes, *asked)
        if smaller is not None:
            found[nodes] = smaller
    return found


def _plan_for(
    config: LaunchConfig, facts: Facts, nodes: int, micro_batch_size: int | str, stage: int | str
) -> Plan | None:
    cluster: Any = config.cluster
    changed = config.altered(
        cluster={"spare_nodes": len(cluster.hosts) - nodes} if cluster.backend == "ssh" else {"nodes": nodes},
        training={"micro_batch_size": micro_batch_size},
        deepspeed={"zero_stage": stage},
    )
    try:
        return make_plan(changed, facts)
    except UserError:
        return None


def shortfall(config: LaunchConfig, sizes: Sequence[int]) -> str | None:
    """What to tell where `cluster.min_nodes` is less than what the run fits on; sizes: the numbers that it does."""
    if config.cluster.backend == "local" or min(sizes) <= config.cluster.fewest_nodes:
        return None
    return (
        f"cluster.min_nodes is {config.cluster.fewest_nodes}, but the run does not fit the memory of fewer than "
        f"{min(sizes)} nodes: with less than that it waits for others"
    )


def worth_growing(
    plans: Mapping[int, Mapping[str, Any]], nodes: int, larger: int, seconds_left: float, restart_seconds: float
) -> bool:
    """Whether to save, end and start again on `larger` nodes instead of `nodes`.

    Steps are taken to last as long as their micro-batches are many. It pays if what is left, at the present pace, gets
    shorter by more than twice what a restart has cost this run.

    Args:
        plans: number of nodes -> plan.json.
        seconds_left: to the end of the training at the present pace, or of the allocation if that is sooner.
        restart_seconds: from the start of an attempt to its first step, and a checkpoint.
    """
    before, after = (int(plans[count]["batch"]["micro_batches_per_rank"]) for count in (nodes, larger))
    saved = max(seconds_left - restart_seconds, 0.0) * (1 - after / before)
    return saved > _GAIN_FACTOR * restart_seconds
