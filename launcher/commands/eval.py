"""`dsft eval RUN`: scores of a checkpoint or an export, on the run's evaluation data or other, by `trainer.score`."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.commands.predict import add_ranks

    parser.add_argument("run", metavar="RUN", help="run directory or name, or an exported folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    which.add_argument("--export", type=Path, metavar="DIR", help="an exported folder instead of a checkpoint")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="default: the run's evaluation data")
    add_ranks(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Score; nothing is written into the run."""
    from launcher import inference
    from launcher.console import print_json
    from trainer.config.loading import change_config
    from trainer.failures import EXIT_DONE, UserError
    from trainer.rundir import read_json

    work = Path(tempfile.mkdtemp(prefix="dsft-eval-"))
    try:
        trained = inference.find_trained(options.run, options.step, options.export, options.task, work)
        data = trained.config["data"]
        if options.data:
            found = inference.sources(trained.config, options.data, options.columns, options.column_names)
            data = {**data, "evaluation": found}
            if any(source.get("format") == "parallel" for source in found):
                raise UserError(
                    "--data: lines without targets cannot be scored; name both files: --set 'data.evaluation="
                    '[{"format": "parallel", "source_path": "...", "target_path": "..."}]\''
                )
        config = change_config({**trained.config, "data": data}, options.set, "--set")
        if not config.data.evaluation:
            raise UserError(f"{options.run} has no evaluation data: name some with --data")
        inference.run_ranks("trainer.score", config, trained, options.batch_size, options.processes, work)
        result = {"step": trained.step, **read_json(work / "scores.json")}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if options.json:
        print_json(result)
    else:
        _show(result["scores"], result["left_out"])
    return EXIT_DONE


def _show(scores: dict[str, float], left_out: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    from launcher.console import print_whole

    sets = {name.rpartition("/")[0]: "" for name in scores}
    table = Table("score", *(name or "all" for name in sets))
    for metric in dict.fromkeys(name.rpartition("/")[2] for name in scores):
        found = (scores.get(f"{name}/{metric}" if name else metric) for name in sets)
        table.add_row(metric, *("" if value is None else f"{value:.6g}" for value in found))
    print_whole(Console(), table)
    for name, count in left_out.items():
        print(f"{name}: {count} records")
