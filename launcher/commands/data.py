"""`dsft data CONFIG`: what the model will see. Exit code 2 for data that it could not be trained on."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from typing import TYPE_CHECKING, Any

from launcher.console import count, print_whole, printable
from launcher.options import add_config, run_module
from trainer.failures import EXIT_DONE, EXIT_USER, DsftError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.config.schema import LaunchConfig

BAR = 24
MOST_LABELS = 50
MOST_CHARACTERS = 500  # shown of a label
LEARNED = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"  # without colours
PIECES = 3  # shown of a record that is split
_REPEATED = re.compile(r"(<[^<>\s]+>)(\s?\1){7,}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, --set, --samples, --json."""
    add_config(parser)
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="records shown of each source (default: 2)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look at a part of each source as training would encode it."""
    from launcher.preflight import input_problems
    from trainer.config.loading import load_config

    config = load_config(arguments.config, arguments.set)
    if problems := input_problems(config):  # before a tokenizer is looked for, which can take a while
        report = {"ok": False, "class": "user", "errors": problems, "warnings": [], "statistics": []}
    else:
        report = look(config, arguments.samples)
        add_shares(report, config)
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report, config)
    return EXIT_DONE if report["ok"] else EXIT_USER


def look(config: LaunchConfig, samples: int) -> dict[str, Any]:
    """What `trainer.check` says of a config, by a process of its own: tokenizers are no part of the launcher."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(config.model_dump_json())
        file.flush()
        code, report = run_module("trainer.check", file.name, str(max(samples, 0)))
    if not report:
        raise DsftError(f"the look at the data ended with code {code}; its error is above")
    return report


def add_shares(report: dict[str, Any], config: LaunchConfig) -> None:
    """Add to each training source its share of the sequences and how often it is taken, to the report the steps."""
    from trainer.planning.mixture import expected_mixture, source_epochs, source_weights

    training = [item for item in report["statistics"] if item["source"].startswith("data.train")]
    if len(training) < len(config.data.train):
        return  # one of them could not be read: no shares
    epochs = [source_epochs(source, config.training.epochs) for source in config.data.train]
    weights = source_weights(config.data.train, [item["records"] for item in training], epochs)
    sizes = [item["sequences_per_epoch"] for item in training]
    size, steps = config.training.global_batch_size, config.training.max_steps
    mixture = expected_mixture(sizes, epochs, weights, float("inf") if steps is None else float(steps * size))
    for item, weight, taken in zip(training, weights, mixture.taken, strict=True):
        item["share"], item["epochs"] = weight / sum(weights), taken
    report["steps_per_epoch"] = sum(sizes) / size
    report["steps"] = mixture.sequences / size
    if steps is not None and report["steps"] < 0.99 * steps:
        report["warnings"].append(
            f"data.train ends after about {report['steps']:.4g} of training.max_steps={steps} steps, and the training "
            "with it: leave `epochs` of one of its sources out, which then repeats"
        )


def show(report: dict[str, Any], config: LaunchConfig) -> None:
    """Print a report for people."""
    from rich.console import Console
    from rich.rule import Rule

    console = Console(highlight=False, soft_wrap=True)
    for item in report["statistics"]:
        console.print(Rule(f"{item['source']}", align="left", style="dim"))
        _show_source(console, item, config)
    if "labels" in report:
        shown = [printable(label) for label in report["labels"]]
        more = f" and {len(shown) - MOST_LABELS} more" if len(shown) > MOST_LABELS else ""
        console.print(f"\n{len(shown)} labels: {', '.join(map(repr, shown[:MOST_LABELS]))}{more}", markup=False)
    if "steps_per_epoch" in report:
        console.print(
            f"\nAn epoch is about {report['steps_per_epoch']:.4g} steps of {config.training.global_batch_size} "
            f"sequences of {config.data.sequence_length} tokens; the training, {report['steps']:.4g}."
        )
    for kind, colour in (("warnings", "yellow"), ("errors", "red")):
        for text in report[kind]:
            console.print(f"[{colour}]{kind[:-1]}:[/{colour}]", end=" ")
            console.print(text, markup=False)


def _show_source(console: Console, item: dict[str, Any], config: LaunchConfig) -> None:
    from rich.table import Table
    from rich.text import Text

    from trainer.config.tasks import PACKED_TASKS

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    grid.add_column()
    rows: list[tuple[str, str | Text]] = [
        ("path", Text(item["path"])),
        ("records", f"{count(item['records'])}, {item['looked_at']} looked at"),
        ("tokens", f"{item['mean_tokens']:.1f} a record, the longest sample {item['longest_sample']}"),
    ]
    if config.task.type in PACKED_TASKS:
        rows += [
            ("learned", f"{item['target_tokens'] / max(item['tokens'], 1):.1%} of the tokens"),
            ("packing", f"{item['packing_efficiency']:.1%} of a sequence filled, by those looked at"),
            ("BOS, EOS", f"{item['begin_with_bos']:.0%} begin, {item['end_with_eos']:.0%} end so"),
        ]
    if "share" in item:
        rows.append(("share", f"{item['share']:.1%} of the sequences; taken {item['epochs']:.3g} times"))
    odd = [
        f"{item[name]} {name.replace('_', ' ')}"
        for name in ("bad", "skipped_long", "nothing_to_learn", "split", "truncated")
        if item[name]
    ]
    if odd:
        rows.append(("of note", f"[yellow]{', '.join(odd)}[/yellow]"))
    for name, value in rows:
        grid.add_row(name, value)
    print_whole(console, grid)
    most = max((samples for _, samples in item["length_histogram"]), default=0)
    for upper, samples in item["length_histogram"]:
        bar = "█" * -(-BAR * samples // max(most, 1))
        console.print(f"  [dim]<= {upper:>7}[/dim]  [blue]{bar}[/blue] {samples or ''}")
    marks = ("", "") if console.color_system else LEARNED
    for index, (pieces, labels) in enumerate(zip(item["samples"], item["labels"], strict=True)):
        for stretches in pieces[:PIECES]:
            console.print()
            text = Text()
            for part, learned in stretches:
                learned = learned and not labels
                part = without_repeats(part)
                text.append(part.join(marks) if learned else part, style="bold green" if learned else "dim")
            if text.plain:  # an image has no text
                console.print(text)
        if len(pieces) > PIECES:
            console.print(f"\nand {len(pieces) - PIECES} more pieces of this record", style="dim")
        for name, value in item["images"][index].items() if item["images"] else ():
            console.print(Text(f"{name}: {_value(value)}", style="dim"))
        for name, value in labels.items():
            console.print(Text(f"{name}: {_value(value)}".join(marks), style="bold green"))
    if item["samples"]:
        console.print(f"\n[dim]seen[/dim] and [bold green]{'learned'.join(marks)}[/bold green]")


def without_repeats(text: str) -> str:
    """The hundreds of tokens that stand for an image, as their number."""
    return _REPEATED.sub(lambda run: f"{run[1]} x {run[0].count(run[1])}", text)


def _value(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= MOST_CHARACTERS else shown[:MOST_CHARACTERS] + "..."
