"""`dsft status [RUN]`: state and position of one run, or of all known runs."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory or name; default: all known runs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print it; 0 whatever the state is."""
    from collections import Counter
    from pathlib import Path

    from launcher.console import print_json
    from launcher.registry import find_run, known_runs, label
    from launcher.reporting import render_status, status, statuses

    values = statuses(known_runs()) if options.run is None else [status(find_run(options.run))]
    if options.json:
        print_json(values if options.run is None else values[0])
    else:
        labels = Counter(label(Path(value["run"])) for value in values)
        shared = [value["run"] if labels[label(Path(value["run"]))] > 1 else None for value in values]
        print("\n".join(map(render_status, values, shared)) or "no runs yet: start one with `dsft launch`")
    return 0
