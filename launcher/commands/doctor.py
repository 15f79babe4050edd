"""`dsft doctor CONFIG`: are the nodes of a config fit to run it?"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.doctor import Diagnosis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.options import add_config

    add_config(parser)
    parser.add_argument("--on", metavar="NODES", default="", help="only these, separated by commas")
    parser.add_argument("--wait", type=int, default=60, metavar="SECONDS", help="for SLURM to give nodes (default: 60)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """0 if nothing is wrong, else 2."""
    from launcher.doctor import examine
    from trainer.config.loading import load_config
    from trainer.failures import EXIT_DONE, EXIT_USER

    config = load_config(options.config, options.set)
    only = [name for name in options.on.split(",") if name]
    found = examine(config, only, options.wait, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    print(json.dumps(found.to_json()) if options.json else render(found))
    return EXIT_USER if found.problems else EXIT_DONE


def render(found: Diagnosis) -> str:
    """Tables for a terminal: nodes, pairs, and what is wrong."""
    from launcher.console import gib

    head = ["node", "dsft", "python", "torch", "deepspeed", "transformers", "GPUs", "free", "write", "read", "clock"]
    rows = [head]
    for name, fact in found.nodes.items():
        if "error" in fact:
            rows.append([name, fact["error"]])
            continue
        versions = [fact["packages"][package] or "-" for package in ("torch", "deepspeed", "transformers")]
        disk = fact["disk"] or {}
        storage = [gib(disk["free"]), f"{gib(disk['write'])}/s", f"{gib(disk['read'])}/s"] if "free" in disk else "---"
        clock = "-" if fact["clock_offset"] is None else f"{1000 * fact['clock_offset']:+.0f} ms"
        gpus = str(len(fact["gpus"] or ()))
        rows.append([name, fact["dsft"], fact["python"], *versions, gpus, *storage, clock])
    lines = _table(rows)
    if pairs := found.network.get("pairs"):
        names = list(dict.fromkeys(pair["from"] for pair in pairs))
        speeds = {(pair["from"], pair["to"]): f"{gib(pair['bytes_per_second'])}/s" for pair in pairs}
        backend, reduced = found.network["backend"], gib(found.network["all_reduce_bytes_per_second"])
        lines += ["", f"network ({backend}): all-reduce over all nodes {reduced}/s; from (row) to (column):"]
        lines += _table([["", *names], *([one, *(speeds.get((one, other), "-") for other in names)] for one in names)])
    lines.append("")
    if found.problems:
        lines += [f"{len(found.problems)} problem(s), {found.seconds:.0f} s", *(f"  {text}" for text in found.problems)]
    else:
        lines.append(f"nothing is wrong with {len(found.nodes)} node(s), {found.seconds:.0f} s")
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> list[str]:
    columns = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if len(row) > max(i, 2) or i == 0) for i in range(columns)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
