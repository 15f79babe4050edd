"""Options that several verbs share, and the trainer's modules that they run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.processes import child_environment


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and --set."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config file (JSON)")
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """--set."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value: training.max_steps=100"
    )


def at_least_one(text: str) -> int:
    """The type of an option that is a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def run_module(module: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a module of the trainer in a process of its own: torch, tokenizers and datasets are no part of the launcher.

    Returns its exit code and its report, the JSON in its last line, empty without one. What it says of errors is shown.
    """
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    try:
        return done.returncode, json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return done.returncode, {}
