"""`dsft stage CONFIG`: what compute nodes without a network need, fetched from where there is one."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.options import add_config

    add_config(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="on shared storage; default: NAME.staged in `output_dir`"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Copy, then check offline."""
    import json
    import os

    from launcher.gate import checked
    from launcher.options import run_module
    from launcher.permissions import apply_umask
    from trainer.config.loading import load_config
    from trainer.failures import EXIT_DONE

    config = load_config(options.config, options.set)
    apply_umask(config.cluster)
    folder = Path(options.output or Path(config.output_dir) / f"{config.name}.staged").absolute()
    code, result = run_module("trainer.stage", str(options.config), str(folder), *options.set)
    if code != EXIT_DONE:
        return code
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    checked(Path(result["config"]))
    if options.json:
        print(json.dumps(result))
        return EXIT_DONE
    for name in result["copied"]:
        print(f"copied {name}")
    print(f"{result['config']} needs no network; launch that: dsft launch {result['config']}")
    return EXIT_DONE
