"""`dsft drill RUN --fault ...`: inject a fault into a running run."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.drill import FAULTS

    parser.add_argument("run", metavar="RUN", help="run directory or name")
    parser.add_argument("--fault", required=True, choices=FAULTS, help="what is to happen (stop-rank: a hang)")
    parser.add_argument("--rank", type=int, default=0, metavar="K", help="the rank, or the one whose agent; default: 0")
    parser.add_argument(
        "--after-step", type=int, metavar="N", help="wait until the current attempt has made step N; default: any step"
    )
    parser.add_argument("--yes", action="store_true", help="do it: without this, nothing happens")
    parser.add_argument("--json", action="store_true", help="print the ledger's event as JSON")


def run(options: argparse.Namespace) -> int:
    """Inject it; 0 once that is done."""
    from launcher.drill import inject
    from launcher.registry import find_run
    from trainer.failures import UserError

    found = find_run(options.run)
    if not options.yes:
        raise UserError(f"this would {options.fault.replace('-', ' the ', 1)} of {found.path}: add --yes to do it")
    event = inject(found, options.fault, options.rank, options.after_step)
    text = f"{event['fault']} at step {event['step']} (process {event['pid']} on {event['node']})"
    print(json.dumps(event) if options.json else f"{text}; `dsft report {found.path}` shows how the run takes it")
    return 0
