"""`dsft resume RUN`: launch a run again with the config it has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.rundir import RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.commands.launch import add_ways
    from launcher.options import add_set

    parser.add_argument("run", metavar="RUN", help="run directory or name")
    add_set(parser)
    parser.add_argument("--step", type=int, help="go back to the checkpoint of this step; later ones are set aside")
    add_ways(parser)


def run(options: argparse.Namespace) -> int:
    """`dsft launch` of the run's resolved config."""
    from launcher.commands import launch
    from launcher.registry import find_run

    found = find_run(options.run)
    if options.step is not None:
        _go_back(found, options.step, options.dry_run)
    options.config = Path(found.config_path)
    options.set = [*_where_it_is(found), *options.set]
    return launch.run(options)


def _where_it_is(run: RunDirectory) -> list[str]:
    """`--set` of a run that was moved or copied, which goes on where it is and not where it began."""
    import json
    import os
    import re

    from trainer.config.schema import RUN_NAME, LaunchConfig
    from trainer.failures import UserError
    from trainer.rundir import read_json

    config, path = read_json(run.config_path) or {}, run.path.absolute()
    began = Path(str(config.get("output_dir"))) / str(config.get("name"))
    if began.exists() and os.path.samefile(began, path):
        return []
    if not re.match(RUN_NAME, path.name):
        allowed = LaunchConfig.model_fields["name"].description
        raise UserError(f"{path}: a run's folder has the name of the run, which is {allowed}: rename the folder")
    return [f"output_dir={json.dumps(str(path.parent))}", f"name={json.dumps(path.name)}"]


def _go_back(run: RunDirectory, step: int, dry_run: bool) -> None:
    """Make the checkpoint of ``step`` the newest one. A finished run is then unfinished again."""
    import sys

    from launcher.state import run_state
    from trainer.checkpoint_files import abandon_after, damage, published
    from trainer.failures import UserError
    from trainer.lease import acquire

    problem = damage(published(run, step))
    if problem:
        raise UserError(f"the checkpoint of step {step} is damaged: {problem}; `dsft checkpoint verify` shows others")
    if run_state(run).state == "running":
        raise UserError(f"{run.path} is running; `dsft cancel` stops it")
    if dry_run:
        return
    with acquire(run.lock_dir, lambda _: None):
        aside = abandon_after(run, step)
        run.event_writer("supervisor").write("reopened", step=step, set_aside=aside)
    for name in aside:
        print(f"set aside: {name}", file=sys.stderr)
