"""`dsft quickstart`: a small model learns to write Python on this machine, the way every run does."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

DEFAULT_FOLDER = Path("dsft-quickstart")
CPU_RANKS = 2
SAMPLE_CHARACTERS = range(80, 250)  # of a sample's prompt and completion: something to see, on one screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and overrides as in `dsft launch`."""
    from launcher.options import add_set

    parser.add_argument("--output-dir", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: %(default)s")
    add_set(parser)


def run(options: argparse.Namespace) -> int:
    """Corpus, tokenizer, launch, sample; returns the exit code of the launch if that fails."""
    from launcher.cli import main
    from trainer.config.loading import load_config
    from trainer.rundir import RunDirectory

    start = time.monotonic()
    folder: Path = options.output_dir
    config_path = folder / "quickstart.json"
    prepare(folder, config_path)

    launch = ["launch", str(config_path), *(word for value in options.set for word in ("--set", value))]
    print(f"3. training: dsft {' '.join(launch)}", flush=True)
    code = main(launch)
    if code != 0:
        return code
    config = load_config(config_path, options.set)
    target = RunDirectory(Path(config.output_dir) / config.name)

    if config.export.enabled:
        print("4. sample: a function from a module that was held out\n", flush=True)
        show_sample(folder / "data", target.export_dir)
    print(f"done in {time.monotonic() - start:.0f} s. Everything lies in {folder.resolve()}:")
    for what, where in (
        ("config, to edit", f"{config_path}   (name another run in it, then `dsft launch` it)"),
        ("results", f"dsft report {target.path}"),
        ("a line per step", str(target.metrics_path)),
        ("curves", f"tensorboard --logdir {target.tensorboard_dir}"),
        ("the model", f"{target.export_dir}   (a Hugging Face folder)"),
    ):
        print(f"  {what:16} {where}")
    print("next: dsft init causal-lm, your data and model in it, dsft plan, dsft launch")
    return 0


def prepare(folder: Path, config_path: Path) -> None:
    """Write the corpus, the tokenizer and the config, unless they are there."""
    from launcher.quickstart import build_corpus
    from launcher.resources import starter_config
    from trainer.failures import UserError

    config: dict[str, Any] = json.loads(starter_config("quickstart").read_text(encoding="utf-8"))
    vocab_size = config["model"]["config"]["vocab_size"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = build_corpus(folder / "data", vocab_size)
        if not config_path.exists():
            suit(config)
            config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}; name another --output-dir") from error
    library = f"Python {platform.python_version()}'s standard library"
    print(f"1. corpus: {train} functions with docstrings from {library}, {held_out} of other modules held out")
    print(f"2. tokenizer: SentencePiece BPE, {vocab_size} pieces, trained on the corpus")


def suit(config: dict[str, Any]) -> None:
    """What this machine decides: every GPU, else two ranks on the CPU, in float32 if it cannot multiply bfloat16."""
    from launcher.facts import multiplies_bfloat16
    from launcher.gpus import find_gpus

    if find_gpus(os.environ):
        return
    config["cluster"]["processes_per_node"] = CPU_RANKS
    if not multiplies_bfloat16():
        config["model"]["dtype"] = "float32"
        print("float32: this CPU has no instructions for bfloat16, which elsewhere the quickstart trains in")


def show_sample(data: Path, export: Path) -> None:
    """Complete a held-out prompt with random and with trained weights, in a process that may import torch."""
    from trainer.failures import DsftError
    from trainer.processes import child_environment

    records = [json.loads(line) for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    fits = (r for r in records if len(r["prompt"]) in SAMPLE_CHARACTERS and len(r["completion"]) in SAMPLE_CHARACTERS)
    record = next(fits, records[0])
    prompt_path = data / "sample_prompt.txt"
    prompt_path.write_text(record["prompt"], encoding="utf-8")
    command = [sys.executable, "-P", "-m", "trainer.sample", "--export", str(export), "--prompt-file", str(prompt_path)]
    result = subprocess.run(
        command,
        env=child_environment({"HF_HUB_OFFLINE": "1"}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode != 0:
        raise DsftError(f"the exported model in {export} could not be sampled:\n{result.stderr[-2000:]}")
    samples = json.loads(result.stdout.splitlines()[-1])
    for title, text in (
        (f"prompt ({record['module']})", record["prompt"]),
        ("before training (random weights)", samples["before"]),
        ("after training", samples["after"]),
        ("what the library has", record["completion"]),
    ):
        print(f"  -- {title} " + "-" * max(0, 70 - len(title)))
        print(textwrap.indent(text.strip("\n"), "  | ", lambda line: True))
    print(flush=True)
