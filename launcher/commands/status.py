"""`dsft status [RUN]`: state and position of one run, or of all known runs."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="run directory or name; default: all known runs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print it; 0 whatever the state is."""
    from launcher.registry import find_run, known_runs
    from launcher.reporting import render_status, status, statuses

    if options.run is not None:
        value = status(find_run(options.run))
        print(json.dumps(value) if options.json else render_status(value))
        return 0
    values = statuses(known_runs())
    if options.json:
        print(json.dumps(values))
    else:
        print("\n".join(render_status(value) for value in values) or "no runs yet: start one with `dsft launch`")
    return 0
