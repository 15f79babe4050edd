"""`dsft report RUN`: the account of a run."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print it; 0 whatever the state is."""
    from launcher.registry import find_run
    from launcher.reporting import render_report, report

    value = report(find_run(options.run))
    print(json.dumps(value) if options.json else render_report(value))
    return 0
