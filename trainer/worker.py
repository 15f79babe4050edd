"""Entry of one rank: `python -P -m trainer.worker --run-dir DIR --attempt N`, started by torchrun or `trainer.agent`.

Nothing heavy is imported before the rank's log is open and its failure record can be written, so that a broken
installation is reported like any other failure.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import trainer
from trainer import flight_recorder, heartbeat
from trainer.binding import CPUS_VARIABLE, bind
from trainer.failures import DsftError, UserError, exit_code_of, node_name, write_failure
from trainer.processes import die_with_parent
from trainer.rundir import RunDirectory, read_json

AGENT_PID_VARIABLE = "DSFT_AGENT_PID"

Train = Callable[[RunDirectory, int], None]


def main(arguments: Sequence[str] | None = None, train: Train | None = None) -> int:
    """Run one rank to its end (`train`: by default `trainer.train.train`); returns its exit code."""
    agent = os.environ.get(AGENT_PID_VARIABLE)
    die_with_parent(int(agent) if agent else None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which decides
    if cpus := os.environ.get(CPUS_VARIABLE):
        bind(cpus, int(os.environ["LOCAL_RANK"]))
    parser = argparse.ArgumentParser(prog="trainer.worker")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    options = parser.parse_args(arguments)
    run = RunDirectory(options.run_dir)
    rank = int(os.environ.get("RANK", "0"))
    try:
        write_output_to(run.log_path(options.attempt, node_name(), rank))
        with contextlib.suppress(OSError):
            heartbeat.write_stacks_on_signal(run.stack_path(options.attempt, rank))
        heartbeat.start(run.heartbeat_path(options.attempt, rank), rank, int(os.environ.get("WORLD_SIZE", "1")))
        if (read_json(run.plan_path) or {}).get("device") == "cuda":
            flight_recorder.begin(run.attempt_dir(options.attempt), int(agent or 0))
        check_packages()
        if train is None:
            from trainer.train import train as default_train

            train = default_train
        if rank == 0:
            with contextlib.suppress(OSError):  # an account of time must not end the run where the disk is full
                run.event_writer("rank0", options.attempt).write("setup")
        train(run, options.attempt)
        heartbeat.finish()
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            return 0
        return _record(run, options.attempt, rank, error)
    return 0


def write_output_to(path: Path) -> None:
    """Append everything this process and its libraries write, whatever the language, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # a line at a time, as on a terminal; no name of a file may end a rank, in whatever locale
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    faulthandler.enable()


def check_packages() -> None:
    """Raise UserError if `trainer` is not the one that lies beside `launcher`, or beside this file."""
    here = Path(__file__).resolve().parent
    found = Path(trainer.__file__ or "").resolve().parent
    if found != here:
        raise UserError(f"{found} takes the place of dsft's package {here}: rename it or take it off PYTHONPATH")
    launcher = importlib.util.find_spec("launcher")
    origin = Path(launcher.origin).resolve().parent if launcher and launcher.origin else None
    if origin != here.parent / "launcher":
        raise UserError(
            f"`launcher` is {origin or 'missing'}, but dsft's lies in {here.parent / 'launcher'}: "
            "rename the other one or take it off PYTHONPATH"
        )


def _record(run: RunDirectory, attempt: int, rank: int, error: BaseException) -> int:
    """Leave the failure record and the traceback; returns the exit code."""
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        write_failure(run.attempt_dir(attempt), rank, error, heartbeat.step_under_way())
    if isinstance(error, DsftError):
        print(f"error: {error}", file=sys.stderr)
    traceback.print_exception(error)
    return exit_code_of(error)


def end(code: int) -> None:
    """End at once: destructors of communication libraries wait for ranks that are gone, or abort under a thread that
    still reads data ahead. Whatever the run needs is on disk by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
