"""Memory of the data path against the size of a file: `python benchmarks/data_memory.py` (limit: 1.1).

A process of its own indexes a JSONL file and takes batches from its stream, first from a small file, then from one a
hundred times as large. Peak anonymous memory: the index is mapped from a file, which the system can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Peak, command_line, environment, math_records, told_by, write_data, write_result

LIMIT = 1.1


def stream_program(data: Path, tokenizer: Path, batches: int) -> None:
    """Take batches; prints {"bytes", "records", "open_seconds", "peak_anonymous"}."""
    from trainer.config.schema import LaunchConfig
    from trainer.data.stream import build_training_stream
    from trainer.tasks import get_task
    from trainer.tokenizer import load_tokenizer

    columns = {"prompt": "question", "completion": "answer"}
    config = LaunchConfig.model_validate(
        {
            "name": "data_memory",
            "task": {"type": "causal-lm"},
            "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer)},
            "data": {"train": [{"path": str(data), "columns": columns}], "sequence_length": 512, "workers": 0},
            "training": {"global_batch_size": 32, "max_steps": batches},
        }
    )
    task = get_task(config, load_tokenizer(config.model))
    with Peak() as peak:
        start = time.monotonic()
        stream = build_training_stream(
            config, task, rank=0, world_size=1, micro_batch_size=8, gather=lambda array: [array], limit=batches
        )
        opened = time.monotonic() - start
        made = sum(1 for _ in stream)
    if made != batches:
        raise SystemExit(f"{made} batches instead of {batches}")
    told = {"bytes": data.stat().st_size, "records": stream.records, "open_seconds": opened}
    print(json.dumps({**told, "peak_anonymous": peak.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream-program", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=150)
    parser.add_argument("--megabytes", type=int, nargs=2, default=[20, 2000], help="sizes of the two files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.stream_program:
        stream_program(*options.stream_program, options.batches)
        return
    runs: list[dict[str, Any]] = []
    rows = [["file", "records", "indexed in", "peak memory"]]
    block = "".join(json.dumps(record) + "\n" for record in math_records(5000))
    with tempfile.TemporaryDirectory(prefix="dsft-data-") as name:
        folder = Path(name)
        tokenizer = write_data(folder / "small", 1000)["tokenizer"]
        for megabytes in options.megabytes:
            data = folder / f"{megabytes}.jsonl"
            with data.open("w") as file:
                while file.tell() < megabytes * 10**6:
                    file.write(block)
            command = [sys.executable, str(ROOT / "benchmarks" / "data_memory.py"), "--batches", str(options.batches)]
            command += ["--stream-program", str(data), str(tokenizer)]
            runs.append(told_by(command, environment(folder)))
            found = runs[-1]
            cells = [f"{found['bytes'] / 1e6:.0f} MB", f"{found['records']:,}", f"{found['open_seconds']:.2f} s"]
            rows.append([*cells, f"{found['peak_anonymous'] / 2**20:.0f} MiB"])
    ratio = runs[1]["peak_anonymous"] / runs[0]["peak_anonymous"]
    rows.append(["ratio", "", "", f"{ratio:.2f} (limit {LIMIT})"])
    value = {
        "command": command_line("data_memory"),
        "formula": "peak anonymous memory of the process with the larger file / with the smaller one",
        "settings": {"batches": options.batches, "megabytes": options.megabytes},
        "limit": LIMIT,
        "runs": runs,
        "ratio": ratio,
    }
    write_result(options.output, "data_memory", value, rows)


if __name__ == "__main__":
    main()
