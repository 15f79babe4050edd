"""`dsft init TASK [PATH]`: a starter config to edit."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from launcher.resources import configs_dir, starter_config
from trainer.failures import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TASK and PATH."""
    known = ", ".join(sorted(path.stem for path in configs_dir().glob("*.json")))
    parser.add_argument("task", metavar="TASK", help=f"one of: {known}")
    parser.add_argument("path", metavar="PATH", nargs="?", type=Path, help="where to write it (default: ./TASK.json)")


def run(arguments: argparse.Namespace) -> int:
    """Write the config, whose run is called as the file; an existing file is left alone."""
    text = starter_config(arguments.task).read_text(encoding="utf-8")
    path = arguments.path or Path(f"{arguments.task}.json")
    if path.is_dir():
        path = path / f"{arguments.task}.json"
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or arguments.task
    text = text.replace(f'"name": "{arguments.task}"', f'"name": "{name[:100]}"', 1)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists, and dsft does not overwrite it: name another file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    shown = shlex.quote(str(path))
    commands = "".join(f"\n  dsft {verb} {shown}" for verb in ("data", "plan", "launch"))
    print(f"{path} is written. Set model.path and the data paths in it, then:{commands}")
    return 0
