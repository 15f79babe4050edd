"""`dsft plan CONFIG --nodes 1,2,4`: the same run on other numbers of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.console import count, gib, print_whole
from launcher.facts import Facts
from launcher.plan import Plan, make_plan
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError


@dataclass(frozen=True)
class Choice:
    """A number of nodes, and the plan for it or why there is none."""

    nodes: int
    plan: Plan | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """`{"nodes", "problem", "plan"}`."""
        return {"nodes": self.nodes, "problem": self.problem, "plan": self.plan.to_json() if self.plan else None}


def compare_nodes(config: LaunchConfig, facts: Facts, counts: Sequence[int]) -> list[Choice]:
    """A plan for each number of nodes. Raises UserError for a cluster whose nodes are not chosen by number."""
    if config.cluster.backend != "slurm":
        raise UserError(
            f"--nodes compares numbers of nodes of a SLURM cluster; cluster.backend is {config.cluster.backend!r}"
        )
    choices = []
    for nodes in counts:
        changed = config.altered(cluster={"nodes": nodes})
        try:
            choices.append(Choice(nodes, make_plan(changed, facts), None))
        except UserError as error:
            choices.append(Choice(nodes, None, str(error)))
    return choices


def show_nodes(choices: Sequence[Choice]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    for name in ("nodes", "ranks", "batch of a rank", "idle", "memory of a rank", "a step", "tokens/s", "node-hours"):
        table.add_column(
            name, justify="left" if name == "batch of a rank" else "right", no_wrap=True, overflow="ignore"
        )
    for choice in choices:
        if choice.plan is not None:
            table.add_row(*_row(choice.plan))
    console = Console(highlight=False, soft_wrap=True)
    print_whole(console, table)
    for choice in choices:
        if choice.problem:
            console.print(f"{choice.nodes} node(s):", end=" ", style="yellow")
            console.print(choice.problem, markup=False)


def _row(plan: Plan) -> tuple[str, ...]:
    batch, time, memory = plan.batch, plan.step_time, plan.memory
    share = f" ({memory.total / plan.device_memory:.0%})" if memory and plan.device_memory else ""
    cells = [
        str(plan.nodes),
        str(plan.world_size),
        f"{batch.micro_batches_per_rank} x {batch.micro_batch_size}",
        f"{batch.wasted_share:.0%}",
        f"{gib(memory.total)}{share}" if memory else "-",
    ]
    if time is None:
        return (*cells, "-", "-", "-")
    tokens = batch.global_batch * plan.sequence_length
    bounds = time.least, time.most
    hours = [plan.nodes * plan.max_steps * seconds / 3600 for seconds in bounds] if plan.max_steps else None
    return (
        *cells,
        f"{bounds[0]:.3g}-{bounds[1]:.3g} s",
        f"{count(tokens / bounds[1])}-{count(tokens / bounds[0])}",
        f"{hours[0]:.3g}-{hours[1]:.3g}" if hours else "-",
    )
