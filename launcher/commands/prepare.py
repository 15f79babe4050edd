"""`dsft prepare CONFIG`: tokenises the training data once, for `data.prepared`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.options import add_config

    add_config(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: data.prepared, else NAME.prepared in `output_dir`"
    )
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="default: one for each core")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Prepare."""
    import json
    import tempfile

    from launcher.options import run_module
    from launcher.permissions import apply_umask
    from trainer.config.loading import load_config
    from trainer.config.tasks import PACKED_TASKS
    from trainer.failures import EXIT_DONE, UserError

    config = load_config(options.config, options.set)
    if config.task.type not in PACKED_TASKS:
        raise UserError(f"task.type {config.task.type}: only {', '.join(sorted(PACKED_TASKS))} can be prepared")
    apply_umask(config.cluster)
    folder = options.output or config.data.prepared or Path(config.output_dir) / f"{config.name}.prepared"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(config.model_dump_json())
        file.flush()
        words = (file.name, str(Path(folder).absolute()), str(max(options.processes, 0)))
        code, report = run_module("trainer.prepare", *words)
    if code != EXIT_DONE:
        return code
    if options.json:
        print(json.dumps(report))
        return EXIT_DONE
    how = "already prepared" if report["kept"] else f"prepared in {report['seconds']:.1f} s"
    print(f"{report['path']}: {report['documents']} documents, {report['bytes']} bytes, {how}")
    print(f'use it: "data": {{..., "prepared": "{report["path"]}"}}')
    return EXIT_DONE
