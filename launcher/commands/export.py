"""`dsft export RUN`: a checkpoint as a Hugging Face folder, written and checked by `trainer.export`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: export.dtype of the config")
    parser.add_argument(
        "--adapter",
        choices=("merge", "adapter"),
        help="a trained adapter: merged into the weights, or a folder for peft; default: export.adapter of the config",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: export/ in the run directory")


def run(options: argparse.Namespace) -> int:
    """Export in a process of its own: it needs torch, which the launcher never imports."""
    import subprocess
    import sys

    from launcher.registry import find_run
    from trainer.checkpoint_files import published
    from trainer.processes import child_environment

    found = find_run(options.run)
    published(found, options.step)  # says what there is without waiting for torch
    command = [sys.executable, "-P", "-m", "trainer.export", "--run-dir", str(found.path)]
    for name in ("step", "dtype", "output", "adapter"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    return subprocess.run(command, env=child_environment()).returncode
