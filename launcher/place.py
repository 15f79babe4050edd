"""Where the attempts of a run are made: its backend, and which nodes that may have at which size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.membership import Membership
from launcher.nodes import NodePool
from launcher.state import ledger
from launcher.supervisor import Backend
from trainer.config.schema import LaunchConfig, ResilienceConfig
from trainer.rundir import RunDirectory


@dataclass(frozen=True)
class Place:
    """A backend, the resilience settings there, and what the supervisor needs to choose among nodes."""

    backend: Backend
    resilience: ResilienceConfig
    membership: Membership | None = None
    exhausted: Callable[[], str | None] = lambda: None


def plans_of(config: LaunchConfig, plan: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Number of nodes -> plan.json, of every size that the run may have; `plan` is that of the full one."""
    plans: dict[int, Mapping[str, Any]] = {config.cluster.nodes: plan}
    if config.cluster.backend != "local" and config.cluster.fewest_nodes < config.cluster.nodes:
        from launcher.facts import gather_facts
        from launcher.sizes import smaller_plans

        kept = {key: plan[key] for key in ("config_hash", "gpus") if key in plan}
        micro, stage = plan["batch"]["micro_batch_size"], plan["deepspeed"]["zero_optimization"]["stage"]
        smaller = smaller_plans(config, gather_facts(config), int(micro), int(stage))
        plans |= {nodes: found.to_json() | kept for nodes, found in smaller.items()}
    return plans


def sizes_of(config: LaunchConfig, plan: Mapping[str, Any]) -> tuple[list[int], str | None]:
    """Numbers of nodes that the run may have, rising, and what to tell if `cluster.min_nodes` asks for fewer."""
    from launcher.sizes import shortfall

    sizes = sorted(plans_of(config, plan))
    return sizes, shortfall(config, sizes)


def open_place(config: LaunchConfig, plan: Mapping[str, Any], run: RunDirectory, environment: dict[str, str]) -> Place:
    """The backend that the config names. Raises UserError where its hosts cannot be used."""
    processes = int(plan["processes_per_node"])
    if config.cluster.backend == "local":
        from launcher.backends.local import LocalBackend

        return Place(LocalBackend(run, processes, environment), config.resilience)
    plans = plans_of(config, plan)
    pool = NodePool(sorted(plans))
    if config.cluster.backend == "slurm":
        from launcher.backends.slurm import SlurmBackend, resilience_in_job

        slurm = SlurmBackend(run, config.cluster, processes, environment, pool=pool)
        membership = Membership(run, slurm, plans)
        slurm.resize = membership.take
        return Place(slurm, resilience_in_job(config.resilience, config.cluster), membership, slurm.exhausted)
    from launcher.backends.ssh import SshBackend
    from launcher.ssh_preflight import check_hosts

    address = check_hosts(config, config.cluster, run)
    pool.remember(ledger(run), time.time(), config.resilience.bad_node_hours)
    ssh = SshBackend(run, config.cluster, processes, environment, address, pool=pool)
    membership = Membership(run, ssh, plans)
    ssh.resize = membership.take
    return Place(ssh, config.resilience, membership, ssh.exhausted)
