"""`dsft tune CONFIG`: search for the best values of a config's keys."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config file (JSON) with a `tune` section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the config"
    )
    parser.add_argument("--json", action="store_true", help="print the trials as JSON at the end")


def run(options: argparse.Namespace) -> int:
    """Run the study to its end, or go on with it; 0, 1 if no trial succeeded, 130 or 143 if it was stopped."""
    from launcher.permissions import apply_umask
    from launcher.supervisor import stop_signals
    from launcher.trials import Tuner
    from launcher.tuning import open_study, read_search
    from launcher.tuning_report import show, summary, write_results
    from trainer.failures import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED

    search = read_search(options.config, options.set)
    apply_umask(search.config.cluster)
    study = open_study(search)
    stream = sys.stderr if options.json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    known = summary(study)
    if known["finished"]:
        say(f"{search.folder}: this study is finished: {search.count} trials")
    else:
        say(f"study {search.folder}: {search.count} trials, {len(known['trials'])} of them begun")
    with stop_signals() as signals:
        Tuner(study, signals, say, lambda: write_results(study)).run()
    value = write_results(study)
    if options.json:
        print(json.dumps(value))
    else:
        show(value)
    if signals.count and not value["finished"]:
        return EXIT_INTERRUPTED if signals.reason == "interrupt" else EXIT_TERMINATED
    return EXIT_DONE if value["best"] is not None else EXIT_FAILED
