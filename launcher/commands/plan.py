"""`dsft plan CONFIG`: what would run, and whether it can."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.console import count, gib, print_whole
from launcher.options import add_config
from trainer.failures import EXIT_DONE, EXIT_USER
from trainer.planning.throughput import EFFICIENCY

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.plan import Plan
    from trainer.planning.throughput import StepTime

BAR = 16  # with the longest name and note, 80 characters in all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, --set, --json."""
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--nodes",
        type=_node_counts,
        metavar="N,N,...",
        help="compare numbers of nodes: batch, memory, time of a step and node-hours of each",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show the plan; exit code 2 where it could not be launched as it is."""
    from launcher.facts import gather_facts
    from launcher.place import sizes_of
    from launcher.preflight import preflight_problems
    from launcher.relief import planned
    from launcher.what_if import compare_nodes, show_nodes
    from trainer.config.loading import load_config

    config = load_config(arguments.config, arguments.set)
    facts = gather_facts(config)
    if arguments.nodes:
        choices = compare_nodes(config, facts, arguments.nodes)
        print(json.dumps([choice.to_json() for choice in choices], indent=2)) if arguments.json else show_nodes(choices)
        return EXIT_DONE if any(choice.plan for choice in choices) else EXIT_USER
    plan = planned(config, facts)
    problems = preflight_problems(config, plan, facts)
    sizes, shortfall = sizes_of(config, plan.to_json())
    if shortfall:
        plan = replace(plan, warnings=(*plan.warnings, shortfall))
    if arguments.json:
        print(json.dumps({**plan.to_json(), "sizes": sizes, "problems": problems}, indent=2))
    else:
        show(plan, problems)
    return EXIT_USER if problems else EXIT_DONE


def _node_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of node counts, such as 1,2,4")
    return counts


def show(plan: Plan, problems: list[str] | None = None) -> None:
    """Print a plan for people."""
    from rich.console import Console
    from rich.rule import Rule

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    print_whole(console, _summary(plan))
    if plan.memory is not None:
        console.print(Rule("memory of a rank", align="left", style="dim"))
        print_whole(console, _memory(plan))
    console.print(Rule("DeepSpeed", align="left", style="dim"))
    console.print(json.dumps(plan.deepspeed, indent=2), markup=False)
    console.print(Rule("commands", align="left", style="dim"))
    for node, command in enumerate(plan.commands()):
        if plan.nodes > 1:
            console.print(f"# node {node}", style="dim")
        console.print(command, markup=False)
    console.print()
    for warning in plan.warnings:
        console.print("[yellow]warning:[/yellow]", end=" ")
        console.print(warning, markup=False)
    for problem in problems or []:
        console.print("[red]error:[/red]", end=" ")
        console.print(problem, markup=False)


def _grid(columns: int) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(no_wrap=True, overflow="ignore")
    return grid


def _summary(plan: Plan) -> Table:
    batch, model = plan.batch, plan.model
    rows: list[tuple[str, str]] = [("run", f"[bold]{_escape(plan.name)}[/bold]  {_escape(plan.run_dir)}")]
    if model.parameters is None or model.trainable_parameters is None:
        rows.append(("model", f"{_escape(model.model_type)}, size unknown"))
    else:
        frozen = model.parameters - model.trainable_parameters
        text = f"{_escape(model.model_type)}, {count(model.parameters)} parameters"
        text += f", {count(frozen)} of them frozen" if frozen else ""
        packed = model.packed_parameters
        rows.append(("model", text + (f", {count(packed)} in 4 bits" if packed else "")))
    device = plan.device_name or ("CPU" if plan.device == "cpu" else "GPU")
    nodes = "1 node" if plan.nodes == 1 else f"{plan.nodes} nodes"
    rows.append(
        ("ranks", f"{plan.world_size} = {nodes} x {plan.processes_per_node} on {_escape(device)}, {plan.backend}")
    )
    shared = plan.sequence_parallel
    ranks = "rank" if plan.world_size == 1 else "ranks"
    streams = f"groups of {shared} ranks, a slice of each sequence a rank," if shared > 1 else ranks
    idle = f", {batch.idle_micro_batches} of them idle" if batch.idle_micro_batches else ""
    made = plan.world_size // shared * batch.micro_batches_per_rank * batch.micro_batch_size
    times = "x" if made == batch.global_batch else "of up to"
    rows.append(
        (
            "batch",
            f"{batch.global_batch} sequences = {plan.world_size // shared} {streams} x {batch.micro_batches_per_rank} "
            f"micro-batches {times} {batch.micro_batch_size}{idle}; {batch.wasted_share:.0%} wasted",
        )
    )
    rows.append(("", f"[dim]micro-batch size: {batch.reason}[/dim]"))
    if plan.memory_reason:
        rows.append(("", f"[dim]{plan.memory_reason}[/dim]"))
    if batch.suggestions:
        rows.append(("", f"[dim]less waste: {' or '.join(batch.suggestions)}[/dim]"))
    sizes = plan.communication
    rows.append(("buckets", f"{count(sizes.reduce_bucket)} gradients, {count(sizes.prefetch_bucket)} parameters ahead"))
    rows.append(("", f"[dim]{sizes.reason}[/dim]"))
    if plan.checkpoint_bytes is not None:
        rows.append(("checkpoint", gib(plan.checkpoint_bytes)))
    if plan.nvme:
        size = (
            f"{gib(plan.processes_per_node * plan.memory.nvme)} of each node's disk" if plan.memory else "size unknown"
        )
        rows.append(("nvme", f"{size}, in {_escape(plan.nvme['path'])}"))
    if plan.flops_per_token is not None:
        peak = f"; peak {plan.peak_flops / 1e12:.0f} TFLOP/s a GPU" if plan.peak_flops else ""
        rows.append(("compute", f"{count(plan.flops_per_token)}FLOP a token{peak}"))
    if plan.step_time is not None:
        rows.append(("step", _step(plan, plan.step_time)))
    grid = _grid(1)
    grid.add_column()
    for name, text in rows:
        grid.add_row(f"[cyan]{name}[/cyan]", text)
    return grid


def _step(plan: Plan, time: StepTime) -> str:
    tokens = plan.batch.global_batch * plan.sequence_length
    text = (
        f"{time.least:.3g} to {time.most:.3g} s ({time.compute_seconds:.3g} s compute at {EFFICIENCY:.0%} of the peak, "
        f"{time.communication_seconds:.3g} s communication, hidden or not); "
        f"{count(tokens / time.most)} to {count(tokens / time.least)} tokens/s"
    )
    if plan.max_steps:
        hours = [plan.nodes * plan.max_steps * seconds / 3600 for seconds in (time.least, time.most)]
        text += f"; the run {hours[0]:.3g} to {hours[1]:.3g} node-hours"
    return text


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    assert memory is not None
    grid = _grid(4)
    scale = max(plan.device_memory or 0, memory.total)

    def row(name: str, size: int, style: str, note: str = "") -> None:
        filled = round(BAR * size / scale)
        bar = f"[{style}]{'█' * filled}[/{style}][dim]{'·' * (BAR - filled)}[/dim]"
        grid.add_row(f"[cyan]{name}[/cyan]", f"{gib(size):>9}", bar, f"[dim]{note}[/dim]")

    notes: dict[str, Any] = {
        "step": "after backward",
        "host_offload": "in host memory",
        "host_staging": "for checkpoints, on the host",
        "nvme": "on the node's disk",
        "staging": "copies for checkpoints",
        "logits": "all tokens labelled",
    }
    for name, size in memory.components().items():
        if size:
            row(name.replace("_", " "), size, "blue", notes.get(name, ""))
    has = f"{memory.total / plan.device_memory:.0%} of {gib(plan.device_memory)}" if plan.device_memory else ""
    row("at most", memory.total, "green", has)
    return grid


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
