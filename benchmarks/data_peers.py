"""What others do between a file and sequences of tokens: for benchmarks/data_stream.py, each where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Peer = Callable[[Path, Any, int], int]  # (file of prompts and completions, its tokenizer, length) -> tokens kept


def peers() -> dict[str, Peer]:
    """Those that can run here; what is missing is said on stderr."""
    found: dict[str, Peer] = {}
    for name, needs, peer in (
        ("datasets_grouping", ("datasets",), datasets_grouping),
        ("trl_bfd", ("datasets", "trl"), trl_bfd),
    ):
        missing = [package for package in needs if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {missing[0]} is not installed (pip install {missing[0]})", file=sys.stderr)
        else:
            found[name] = peer
    return found


def encoded(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """The token ids of a batch's records: prompts and completions apart, as dsft has them."""
    texts = [text for pair in zip(batch["prompt"], batch["completion"], strict=True) for text in pair]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return {"input_ids": [prompt + completion for prompt, completion in zip(ids[::2], ids[1::2], strict=True)]}


def datasets_grouping(path: Path, tokenizer: Any, length: int) -> int:
    """`datasets` streaming; tokens joined and cut every ``length`` (the `group_texts` of transformers' examples)."""
    import datasets

    def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        whole = len(joined) // length * length  # the rest of each batch is dropped, as there
        return {"input_ids": [joined[start : start + length] for start in range(0, whole, length)]}

    stream = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    stream = stream.map(encoded, batched=True, fn_kwargs={"tokenizer": tokenizer}, remove_columns=stream.column_names)
    return sum(len(row["input_ids"]) for row in stream.map(group, batched=True))


def trl_bfd(path: Path, tokenizer: Any, length: int) -> int:
    """TRL's `pack_dataset` by its default, best fit decreasing: what is longer than ``length`` is cut off."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    data = datasets.Dataset.from_json(str(path), keep_in_memory=True)
    data = data.map(encoded, batched=True, fn_kwargs={"tokenizer": tokenizer}, remove_columns=data.column_names)
    packed = pack_dataset(data, length, "bfd")
    return sum(len(row["input_ids"]) for row in packed)
