"""`dsft resume RUN`: launch a run again with the config it has."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.commands.launch import add_ways

    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the config"
    )
    add_ways(parser)


def run(options: argparse.Namespace) -> int:
    """`dsft launch` of the run's resolved config."""
    from launcher.commands import launch
    from launcher.registry import find_run

    found = find_run(options.run)
    options.config = Path(found.config_path)
    return launch.run(options)
