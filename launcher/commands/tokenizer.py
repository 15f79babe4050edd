"""`dsft tokenizer train`: a SentencePiece model from text, to be named as `model.tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    train = parser.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "train", help="learn a SentencePiece model", description="Learn a SentencePiece model from text."
    )
    train.add_argument("--input", nargs="+", required=True, metavar="PATH", help="as a source's `path` in a config")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, with 256 bytes and 4 marks")
    train.add_argument("--output", type=Path, required=True, metavar="FILE.model")
    train.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    train.add_argument("--format", default="auto", help="as a source's `format`; default: by the name")
    train.add_argument(
        "--column", action="append", default=[], metavar="NAME", help="learn from it alone; default: from all text"
    )
    train.add_argument(
        "--symbol", action="append", default=[], metavar="TEXT", help="a piece that is never split: marks of a chat"
    )
    train.add_argument("--records", type=int, metavar="N", help="at most, of each input, evenly spread; default: 1e6")
    train.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Train."""
    import json

    from launcher.options import run_module
    from trainer.failures import EXIT_DONE

    # `=`: a value may begin with a dash
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("vocab_size", "type", "format")]
    words += [f"--output={options.output}", *(f"--column={name}" for name in options.column)]
    words += [f"--symbol={text}" for text in options.symbol]
    words += [] if options.records is None else [f"--records={options.records}"]
    code, report = run_module("trainer.tokenizer_training", *words, "--input", *options.input)
    if code != EXIT_DONE:
        return code
    if options.json:
        print(json.dumps(report))
        return EXIT_DONE
    print(
        f"{report['path']}: {report['pieces']} pieces, learned from {report['characters']} characters; "
        f"{report['characters_per_token']} characters of this text make a token"
    )
    print(
        f'use it: "model": {{..., "tokenizer": "{report["path"]}"}}, and vocab_size {report["pieces"]} in model.config'
    )
    return EXIT_DONE
