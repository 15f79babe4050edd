"""The quickstart's data: docstring -> code pairs from this machine's Python standard library, and a tokenizer.

A record's prompt is a function's signature and docstring, its completion the body. Both are cut from the source
as it stands, dedented. Whole modules are held out, so that no held-out function has a sibling in training.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.failures import UserError
from trainer.tokenizer_training import train_sentencepiece

# Not of the library's own style, or not installed everywhere
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT_EVERY = 20  # every so many modules, in order of their names
MAX_CHARACTERS = 700  # of prompt and completion together: most fit a sequence of 256 tokens
MIN_PAIRS = 500


@dataclass(frozen=True)
class Pair:
    """One function: `prompt` ends after the docstring's line, `completion` is the body after it."""

    module: str
    prompt: str
    completion: str


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(prompt, completion) of every function of a module's source that has a docstring and a body after it."""
    lines = [line + "\n" for line in source.split("\n")]  # splitlines would also cut at form feeds
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring = node.body[0]
        if len(node.body) < 2 or node.end_lineno is None or docstring.end_lineno is None:
            continue
        if node.body[1].lineno <= docstring.end_lineno or docstring.lineno <= node.lineno:
            continue  # on one line with its docstring or signature
        whole = lines[node.lineno - 1 : node.end_lineno]
        indent = whole[0][: node.col_offset]
        if any(line.strip() and not line.startswith(indent) for line in whole):
            continue  # a string inside reaches further left: cutting the indentation would change it
        whole = [line.removeprefix(indent) for line in whole]
        cut = docstring.end_lineno - node.lineno + 1
        yield "".join(whole[:cut]), "".join(whole[cut:]).strip("\n") + "\n"


def standard_library_pairs(root: Path | None = None) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs from the sources below `root` (default: the running Python's library).

    The same library gives the same pairs in the same order. Raises UserError where the sources are not installed.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    train: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[str] = set()
    for index, path in enumerate(files):
        try:
            found = list(functions(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template, or a file in another encoding
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        for prompt, completion in found:
            if len(prompt) + len(completion) <= MAX_CHARACTERS and completion not in seen:
                seen.add(completion)
                (held_out if index % HELD_OUT_EVERY == 0 else train).append(Pair(module, prompt, completion))
    if len(train) < MIN_PAIRS or not held_out:
        raise UserError(
            f"the Python library in {root} holds only {len(train) + len(held_out)} functions with docstrings in source"
            f" form, at least {MIN_PAIRS} are needed; run the quickstart with a Python that has its library's .py files"
        )
    return train, held_out


def write_jsonl(pairs: list[Pair], path: Path) -> None:
    """One JSON object a line: module, prompt, completion."""
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def build_corpus(folder: Path, vocab_size: int) -> tuple[int, int]:
    """Write train.jsonl, held_out.jsonl and tokenizer.model into `folder`; the numbers of pairs of both.

    What is there already is kept: another Python's library would otherwise change the data under a run.
    """
    train_path, held_out_path, tokenizer = (folder / n for n in ("train.jsonl", "held_out.jsonl", "tokenizer.model"))
    if not tokenizer.exists():  # the last to be written
        train, held_out = standard_library_pairs()
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(train, train_path)
        write_jsonl(held_out, held_out_path)
        train_sentencepiece((pair.prompt + pair.completion for pair in train), vocab_size, tokenizer)
    return count_lines(train_path), count_lines(held_out_path)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
