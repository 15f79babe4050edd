"""The `dsft` command. A verb's module is imported only when it is chosen, so that `dsft --help` costs nothing."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from launcher import __version__
from launcher.console import drop_output
from trainer.failures import EXIT_INTERRUPTED, EXIT_TEMPORARY, EXIT_USER, DsftError, in_words
from trainer.rundir import BrokenFile

# verb -> help; launcher/commands/<verb>.py has add_arguments(parser) and run(arguments) -> exit code
VERBS = {
    "quickstart": "train a small model on this machine, from corpus to export, in minutes",
    "init": "write a starter config for a task",
    "plan": "show what a config will run: ranks, batches, memory, commands",
    "doctor": "whether the nodes of a config are fit to run it: versions, storage, GPUs, network",
    "stage": "copy what a config takes from the network, for compute nodes that have none",
    "tokenizer": "learn a tokenizer from text",
    "data": "show what the model will see: samples, learned tokens, lengths, packing",
    "prepare": "tokenise the training data of a config once, ahead of its runs",
    "launch": "run a config to its end, or go on with a run that stopped",
    "status": "how a run is doing",
    "logs": "what the ranks of a run wrote",
    "report": "what became of a run: steps, evaluation, goodput, failures",
    "drill": "inject a fault into a running run, to see it recover",
    "cancel": "stop a run, after a last checkpoint",
    "resume": "go on with a stopped run from its last checkpoint",
    "checkpoint": "list, verify, compare, thin out or ask for checkpoints of a run",
    "export": "write a checkpoint as a Hugging Face model folder",
    "eval": "score a run's checkpoint or export on its evaluation data, or on other data",
    "predict": "a trained model's answers for the records of files",
    "tune": "search for the best values of a config's keys, a run for each trial",
    "schema": "print the JSON Schema of the config, for editors",
}

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dsft`; returns its exit code (see trainer.failures)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((item for item in given if not item.startswith("-")), None)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever has started this process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and samples that the terminal has no letters for
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = _parser(verb)
        options = parser.parse_args(given)
        with _tidy_end():
            code: int = importlib.import_module(f"launcher.commands.{options.verb}").run(options)
        sys.stdout.flush()
        return code if code >= 0 else 128 - code  # a child's that a signal has killed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `dsft logs | head`: nobody reads on
        drop_output(sys.stdout)
        return 128 + 13
    except (DsftError, OSError) as error:  # the latter: of a file that the command has no words of its own for
        if isinstance(error, OSError) and error.filename is None and error.errno in _UNWRITABLE:
            drop_output(sys.stdout)
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            return EXIT_TEMPORARY
        told = in_words(error)
        print(f"error: {told}", file=sys.stderr)
        return told.exit_code
    except BrokenFile as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """TERM, and HUP but under nohup, end a command as an exception does: its children and temporary folders go too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with every verb's help, and the arguments of the chosen one."""
    parser = argparse.ArgumentParser(
        prog="dsft", description="One JSON config becomes DeepSpeed ZeRO-3 fine-tuning jobs, seen through to the end."
    )
    parser.add_argument("--version", action="version", version=f"dsft {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, text in VERBS.items():
        subparser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            importlib.import_module(f"launcher.commands.{name}").add_arguments(subparser)
    return parser
