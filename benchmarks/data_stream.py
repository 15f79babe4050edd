"""The data path by itself: tokens/s against the tokenizer alone, packing, resume at 1 % and 90 %, what workers spare.

    python benchmarks/data_stream.py --tokenizer tokenizer.json \
        --data gsm8k=test.jsonl:question:answer --data e2e=devset.csv:mr:ref

Without --data, word problems made from a seed take their place. Writes benchmarks/results/data_stream.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread on each side

from common import RESULTS, math_records, write_data, write_result
from data_peers import peers

from trainer.config.schema import LaunchConfig
from trainer.data.sources import open_source
from trainer.data.stream import BatchStream, build_training_stream
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer

TOKENS = 600_000  # of one measurement, at least
ROUNDS = 5
LARGE = 200 << 20  # bytes of the file that is resumed


def make_config(path: Path, tokenizer: Path, sequence_length: int, columns: dict[str, str], workers: int = 0) -> Any:
    return LaunchConfig.model_validate(
        {
            "name": "bench",
            "task": {"type": "causal-lm"},
            "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)},
            "data": {
                "train": [{"path": str(path), "columns": columns}],
                "sequence_length": sequence_length,
                "workers": workers,
            },
            "training": {"global_batch_size": 32, "epochs": 1},
        }
    )


def make_stream(config: LaunchConfig, state: dict[str, Any] | None = None) -> BatchStream:
    task = get_task(config, load_tokenizer(config.model))
    return build_training_stream(
        config, task, rank=0, world_size=1, micro_batch_size=4, gather=lambda rows: [rows], state=state
    )


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def cpu_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Of all threads: what a neighbour on the machine takes does not count."""
    begin = time.process_time()
    result = action()
    return time.process_time() - begin, result


def speed(folder: Path, tokenizer: Path, records: list[dict[str, str]], length: int) -> dict[str, float]:
    """The stream against the tokenizers library's own encode_batch on the same texts, and against peers, in turns."""
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(tokenizer))
    texts = [text for record in records for text in record.values()]
    once = sum(len(encoding.ids) for encoding in fast.encode_batch(texts, add_special_tokens=False))
    repeats = -(-TOKENS // once)
    path = folder / "speed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) * repeats)
    config = make_config(path, tokenizer, length, {"prompt": "prompt", "completion": "completion"})
    open_source(config.data.train[0])  # its index is made once for all runs
    alone, streamed, ratios = [], [], []
    others = peers()
    theirs: dict[str, list[float]] = {name: [] for name in others}
    kept = {}
    for _ in range(ROUNDS):
        base, _ = cpu_seconds(lambda: fast.encode_batch(texts * repeats, add_special_tokens=False))
        stream = make_stream(config)
        took, tokens = cpu_seconds(lambda stream=stream: sum(batch.tokens for batch in stream))
        assert tokens >= once * repeats, "every token is kept"
        alone.append(once * repeats / base)
        streamed.append(once * repeats / took)  # the tokenizer's tokens: EOS is not counted
        ratios.append(base / took)
        for name, peer in others.items():
            took, kept[name] = cpu_seconds(lambda peer=peer: peer(path, fast, length))
            theirs[name].append(base * kept[name] / (once * repeats) / took)
    return {
        "encode_batch_tokens_per_second": round(statistics.median(alone)),
        "stream_tokens_per_second": round(statistics.median(streamed)),
        "ratio": round(statistics.median(ratios), 3),
        "sequence_length": length,
        **{f"{name}_ratio": round(statistics.median(values), 3) for name, values in theirs.items()},
        **{f"{name}_kept": round(tokens / (once * repeats), 4) for name, tokens in kept.items()},
    }


def packing(folder: Path, tokenizer: Path, records: list[dict[str, str]]) -> float:
    """Share of a batch's places that hold tokens, at 2,048; the same at any number of ranks."""
    path = folder / "packing.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    batches = list(make_stream(make_config(path, tokenizer, 2048, {"prompt": "prompt", "completion": "completion"})))
    return round(sum(b.tokens for b in batches) / (2048 * sum(b.sequences for b in batches)), 4)


def resume(folder: Path, tokenizer: Path, records: list[dict[str, str]]) -> dict[str, float]:
    """Seconds from opening the stream to its first batch."""
    path = folder / "large.jsonl"
    block = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("w") as file:
        for _ in range(LARGE // len(block)):
            file.write(block)
    config = make_config(path, tokenizer, 2048, {"prompt": "prompt", "completion": "completion"})
    first, batch = seconds(lambda: next(iter(make_stream(config))))
    source = open_source(config.data.train[0])
    windows = len(source.windows(config.data.window_documents, 8 << 20)) - 1
    took: dict[float, list[float]] = {0.01: [], 0.9: []}
    for _ in range(ROUNDS):
        for place, times in took.items():
            position = {"epoch": 0, "window": int(windows * place), "offset": 0}
            state = {**batch.state, "sources": [position]}
            times.append(seconds(lambda state=state: next(iter(make_stream(config, state))))[0])
    path.unlink()
    early, late = statistics.median(took[0.01]), statistics.median(took[0.9])
    return {
        "file_mib": LARGE >> 20,
        "windows": windows,
        "first_start_with_indexing_seconds": round(first, 3),
        "at_1_percent_seconds": round(early, 3),
        "at_90_percent_seconds": round(late, 3),
        "ratio": round(late / early, 3),
    }


def interpreter(folder: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """How much Python the loop gets done while the stream runs flat out beside it, and how fast the stream is."""

    def loop(until: Callable[[], bool]) -> float:
        rounds, begin = 0, time.perf_counter()
        while not until():
            sum(range(20_000))
            rounds += 1
        return rounds / (time.perf_counter() - begin)

    config = make_config(folder / "speed.jsonl", tokenizer, 2048, {}, workers)
    end = time.perf_counter() + 2
    free = loop(lambda: time.perf_counter() > end)
    batches = iter(make_stream(config))
    tokens, begin = next(batches).tokens, time.perf_counter()
    rounds, spent = 0.0, 0.0
    for batch in batches:
        tokens += batch.tokens
        stop = time.perf_counter() + 0.02  # a step's worth of Python
        start = time.perf_counter()
        rounds += loop(lambda stop=stop: time.perf_counter() > stop) * (time.perf_counter() - start)
        spent += time.perf_counter() - start
    took = time.perf_counter() - begin
    return {
        "python_speed_of_the_loop": round(rounds / spent / free, 3),
        "stream_tokens_per_second": round(tokens / took),
    }


def read(spec: str) -> tuple[str, list[dict[str, str]]]:
    """NAME=PATH:PROMPT:COMPLETION"""
    name, _, rest = spec.partition("=")
    path, prompt, completion = rest.rsplit(":", 2)
    config = make_config(Path(os.path.abspath(path)), Path("-"), 1, {}).data.train[0]
    source = open_source(config)
    rows = [record for record, _ in source.read(range(source.records)) if record]
    return name, [{"prompt": row[prompt], "completion": row[completion]} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: one trained on the made data")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH:PROMPT:COMPLETION")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsft-data-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.environ["HF_HOME"] = str(folder / "hub")
        made = [{"prompt": r["question"], "completion": r["answer"]} for r in math_records(5000)]
        data = dict(map(read, options.data)) or {"math": made}
        tokenizer = options.tokenizer or write_data(folder, 2000)["tokenizer"] / "tokenizer.json"
        given = [] if options.tokenizer is None else ["--tokenizer", options.tokenizer.name]
        for spec in options.data:
            key, _, rest = spec.partition("=")
            given += ["--data", f"{key}={Path(rest).name}"]
        result: dict[str, Any] = {
            "command": " ".join(["python benchmarks/data_stream.py", *given]),
            "formula": f"medians of {ROUNDS} rounds in turns; tokens per CPU second, one thread each; EOS not counted; "
            "of peers, tokens that they keep",
            "speed": {},
            "packing_efficiency": {},
        }
        for key, records in data.items():
            result["packing_efficiency"][key] = packing(folder, tokenizer, records)
            for length in (512, 2048):
                result["speed"][f"{key}-{length}"] = speed(folder, tokenizer, records, length)
            print(json.dumps({key: result["speed"]}), file=sys.stderr)
        result["workers"] = {count: interpreter(folder, tokenizer, count) for count in (0, 1)}
        result["resume"] = resume(folder, tokenizer, next(iter(data.values())))
    rows = [["measured", "figure"]]
    rows += [[f"packing efficiency, {key}, 2048", str(value)] for key, value in result["packing_efficiency"].items()]
    for key, value in result["speed"].items():
        rows += [[f"stream / encode_batch, {key}; every token kept", str(value["ratio"])]]
        for name in (name.removesuffix("_ratio") for name in value if name.endswith("_ratio")):
            kept = f"{value[f'{name}_kept']:.1%} of the tokens kept"
            rows += [[f"{name} / encode_batch, {key}; {kept}", str(value[f"{name}_ratio"])]]
    rows += [[f"{key}, {count} workers", str(v)] for count, of in result["workers"].items() for key, v in of.items()]
    rows += [["first batch at 90 % / at 1 %", str(result["resume"]["ratio"])]]
    write_result(options.output, "data_stream", result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
