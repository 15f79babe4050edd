"""`dsft tune CONFIG`: search for the best values of a config's keys."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.tuning import Study
    from trainer.rundir import Json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.options import add_config

    add_config(parser)
    parser.add_argument(
        "--watch", action="store_true", help="with tune.array: follow the jobs (Ctrl-C leaves them alone)"
    )
    parser.add_argument("--json", action="store_true", help="print the trials as JSON at the end")


def run(options: argparse.Namespace) -> int:
    """Run the study to its end, or go on with it; 0, 1 if no trial succeeded, 130 or 143 if it was stopped.

    With `tune.array`: submit what is missing of it; or, in a job of the array, see one trial through (75: that is
    to go on in the same job, requeued).
    """
    from launcher import tuning_array
    from launcher.backends.slurm import in_allocation
    from launcher.console import if_anybody_reads
    from launcher.permissions import apply_umask
    from launcher.supervisor import stop_signals
    from launcher.trials import Tuner
    from launcher.tuning import open_study, read_search
    from launcher.tuning_report import summary, write_results
    from trainer.failures import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TEMPORARY, EXIT_TERMINATED, UserError

    search = read_search(options.config, options.set)
    apply_umask(search.config.cluster)
    study = open_study(search)
    stream = sys.stderr if options.json else sys.stdout

    def say(text: str) -> None:
        with if_anybody_reads(stream):
            print(text, file=stream)

    known = summary(study)
    if known["finished"]:
        say(f"{search.folder}: this study is finished: {search.count} trials")
    else:
        say(f"study {search.folder}: {search.count} trials, {len(known['trials'])} of them begun")
        if search.settings.array and not in_allocation():
            return _submit(study, options, say)
    is_task = tuning_array.is_task(search)
    with stop_signals() as signals:
        tuner = Tuner(study, signals, say, lambda: write_results(study), is_task)
        try:
            tuner.run()
        except UserError:
            if is_task:  # the others would fail alike
                tuning_array.drop_waiting()
            raise
    value = _results(study, options)
    if is_task and (tuner.again or signals.reason == "time_limit"):
        return EXIT_TEMPORARY
    if signals.count and not value["finished"]:
        return EXIT_INTERRUPTED if signals.reason == "interrupt" else EXIT_TERMINATED
    return EXIT_DONE if value["best"] is not None else EXIT_FAILED


def _submit(study: Study, options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """See to it that the array is in the queue, follow it with --watch, and show what the study has so far."""
    from launcher import tuning_array
    from trainer.failures import EXIT_DONE, EXIT_FAILED, EXIT_TEMPORARY

    number = tuning_array.ensure_submitted(study, say)
    ended = options.watch and tuning_array.follow(study, number, say)
    value = _results(study, options, job_id=number)
    if not ended:
        return EXIT_DONE
    if not value["finished"]:
        say("jobs of the array have ended without their trials: `dsft tune` again submits what is missing")
        return EXIT_TEMPORARY
    return EXIT_DONE if value["best"] is not None else EXIT_FAILED


def _results(study: Study, options: argparse.Namespace, **more: str) -> Json:
    from launcher.console import if_anybody_reads, print_json
    from launcher.tuning_report import show, write_results

    value = write_results(study)
    with if_anybody_reads(sys.stdout):
        if options.json:
            print_json(value | more)
        else:
            show(value)
    return value
