"""`dsft prepare CONFIG`: tokenises the training data once, for `data.prepared`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config file (JSON)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: data.prepared, else NAME.prepared in `output_dir`"
    )
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="default: one for each core")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Prepare in a process of its own: tokenizers are no part of the launcher."""
    import json
    import subprocess
    import sys
    import tempfile

    from launcher.permissions import apply_umask
    from trainer.config.loading import load_config
    from trainer.config.tasks import PACKED_TASKS
    from trainer.failures import EXIT_DONE, UserError
    from trainer.processes import child_environment

    config = load_config(options.config, options.set)
    if config.task.type not in PACKED_TASKS:
        raise UserError(f"task.type {config.task.type}: only {', '.join(sorted(PACKED_TASKS))} can be prepared")
    apply_umask(config.cluster)
    folder = options.output or config.data.prepared or Path(config.output_dir) / f"{config.name}.prepared"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(config.model_dump_json())
        file.flush()
        command = [sys.executable, "-P", "-m", "trainer.prepare", file.name, str(Path(folder).absolute())]
        command.append(str(max(options.processes, 0)))
        done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode != EXIT_DONE:
        return done.returncode
    report = json.loads(done.stdout.splitlines()[-1])
    if options.json:
        print(json.dumps(report))
        return EXIT_DONE
    how = "already prepared" if report["kept"] else f"prepared in {report['seconds']:.1f} s"
    print(f"{report['path']}: {report['documents']} documents, {report['bytes']} bytes, {how}")
    print(f'use it: "data": {{..., "prepared": "{report["path"]}"}}')
    return EXIT_DONE
