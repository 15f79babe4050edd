"""`dsft stage CONFIG`: what compute nodes without a network need, fetched from where there is one."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config file (JSON)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the config"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="on shared storage; default: NAME.staged in `output_dir`"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Copy in a process of its own, since that needs libraries which the launcher never imports; then check offline."""
    import json
    import os
    import subprocess
    import sys

    from launcher.gate import checked
    from launcher.permissions import apply_umask
    from trainer.config.loading import load_config
    from trainer.failures import EXIT_DONE
    from trainer.processes import child_environment

    config = load_config(options.config, options.set)
    apply_umask(config.cluster)
    folder = Path(options.output or Path(config.output_dir) / f"{config.name}.staged").absolute()
    command = [sys.executable, "-P", "-m", "trainer.stage", str(options.config), str(folder), *options.set]
    done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode != EXIT_DONE:
        return done.returncode
    result = json.loads(done.stdout.splitlines()[-1])
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    checked(Path(result["config"]))
    if options.json:
        print(json.dumps(result))
        return EXIT_DONE
    for name in result["copied"]:
        print(f"copied {name}")
    print(f"{result['config']} needs no network; launch that: dsft launch {result['config']}")
    return EXIT_DONE
