"""`dsft predict RUN|EXPORT --input FILE... --output FILE.jsonl`: a trained model's answers, by `trainer.predict`."""

from __future__ import annotations

import argparse
import heapq
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("model", metavar="RUN|EXPORT", help="run directory or name, or a Hugging Face folder")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="records, in any format dsft reads")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines: one for each record")
    parser.add_argument("--step", type=int, metavar="N", help="of a run's checkpoint; default: the newest")
    add_ranks(parser)


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Declare how data is read, and how many ranks run."""
    from launcher.options import add_set, at_least_one

    parser.add_argument("--task", metavar="TYPE", help="of a folder that dsft has not written")
    parser.add_argument("--batch-size", type=at_least_one, metavar="N", help="samples of a forward pass of a rank")
    ranks = "ranks; default: those of the run, or one a GPU"
    parser.add_argument("--processes", type=at_least_one, metavar="N", help=ranks)
    parser.add_argument("--columns", nargs="+", default=[], metavar="TASK=FILE", help="as in text=sentence")
    parser.add_argument("--column-names", nargs="+", metavar="NAME", help="columns of a csv or tsv without a header")
    add_set(parser)


def run(options: argparse.Namespace) -> int:
    """Predict; the output appears by one rename, whole."""
    from launcher import inference
    from trainer.config.generation import GenerationConfig, WritingTask
    from trainer.config.loading import change_config
    from trainer.failures import EXIT_DONE, UserError

    output: Path = options.output.absolute()
    if not output.parent.is_dir() or output.is_dir():
        raise UserError(f"--output: {output} is a folder, or in none that there is: name a file")
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        trained = inference.find_trained(options.model, options.step, None, options.task, work)
        found = inference.sources(trained.config, options.input, options.columns, options.column_names)
        data = {**trained.config["data"], "evaluation": found}
        config = change_config({**trained.config, "data": data}, options.set, "--set")
        if isinstance(config.task, WritingTask) and config.task.generation is None:  # none at evaluations
            config = config.altered(task={"generation": GenerationConfig()})
        inference.run_ranks("trainer.predict", config, trained, options.batch_size, options.processes, work)
        records, errors = _merge(sorted(work.glob("part-*.jsonl")), work / "output")
        os.replace(work / "output", output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{records} records, {errors} without an answer: {options.output}")
    return EXIT_DONE


def _merge(parts: Iterable[Path], target: Path) -> tuple[int, int]:
    """The lines of all parts in the order of their numbers; (lines, those with an error)."""
    records = errors = 0
    with ExitStack() as stack, open(target, "wb") as output:
        files = [stack.enter_context(open(part, "rb")) for part in parts]
        for line in heapq.merge(*files, key=lambda line: int(line[len(b'{"number": ') : line.index(b",")])):
            output.write(line)
            records += 1
            errors += b', "prediction": {' not in line
        output.flush()
        os.fsync(output.fileno())
    return records, errors
