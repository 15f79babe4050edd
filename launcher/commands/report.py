"""`dsft report RUN`: the account of a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html",
        nargs="?",
        const=Path(),
        type=Path,
        metavar="PATH",
        help="write one self-contained HTML file (default: report.html in the run directory)",
    )


def run(options: argparse.Namespace) -> int:
    """Print or write it; 0 whatever the state is."""
    from launcher.console import print_json
    from launcher.registry import find_run
    from launcher.report import report, show_report

    found = find_run(options.run)
    value = report(found)
    if options.html is not None:
        from launcher.html_report import write_report
        from trainer.failures import UserError

        try:
            value["html"] = str(write_report(found, None if options.html == Path() else options.html))
        except OSError as error:
            raise UserError(
                f"{error.filename or options.html}: {error.strerror}; choose another --html PATH"
            ) from error
    if options.json:
        print_json(value)
    else:
        show_report(value)
    return 0
