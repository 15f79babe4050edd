"""Memory of an export: `python benchmarks/export_memory.py` (limit: 1.2 times the largest shard).

A run of two ranks leaves a checkpoint; a process of its own exports it, once into one file, which plain transformers
then loads back, and once into small shards. Peak anonymous memory above what the process held with its libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    Peak,
    command_line,
    end_rank,
    environment,
    llama,
    plan_run,
    run_ranks,
    status,
    told_by,
    write_data,
    write_result,
)

LIMIT = 1.2


def rank_program(run_dir: Path) -> None:
    """One rank of the run."""
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    Trainer(RunDirectory(run_dir), 1).run_to_end()
    end_rank()


def export_program(run_dir: Path, shard_gib: float) -> None:
    """Export; prints {"peak", "before"} in bytes of anonymous memory, and the sizes of the files."""
    import torch
    import transformers

    from trainer.config.schema import LaunchConfig
    from trainer.export import export_run
    from trainer.rundir import RunDirectory

    torch.set_num_threads(1)
    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # imported lazily
    run = RunDirectory(run_dir)
    config = LaunchConfig.model_validate_json(run.config_path.read_text())
    config = config.altered(export={"max_shard_size_gib": shard_gib})
    before = status("RssAnon")
    with Peak() as peak:
        folder = export_run(run, config)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    print(json.dumps({"before": before, "peak": peak.bytes, "files": files}))


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """A run directory as the launcher leaves it."""
    from trainer.config.schema import LaunchConfig

    made = write_data(folder, 100, min(2000, options.vocabulary))
    config = LaunchConfig.model_validate(
        {
            "name": "export_memory",
            "output_dir": str(folder),
            "task": {"type": "causal-lm"},
            "model": {
                "config": llama(options.hidden, options.layers, options.vocabulary),
                "tokenizer": str(made["tokenizer"]),
            },
            "data": {
                "train": [{"path": str(made["data"]), "columns": {"prompt": "question", "completion": "answer"}}],
                "sequence_length": 64,
            },
            "training": {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 1},
            "checkpoint": {"interval_steps": None},
            "export": {"enabled": False},
            "cluster": {"processes_per_node": 2, "environment": {"DS_ACCELERATOR": "cpu"}},
        }
    )
    return plan_run(folder / "export_memory", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--export-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard-gib", type=float, nargs="+", default=[4.0, 0.1])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program)
        return
    if options.export_program:
        export_program(options.export_program, options.shard_gib[0])
        return
    script = str(ROOT / "benchmarks" / "export_memory.py")
    runs: list[dict[str, Any]] = []
    rows = [["files", "largest", "peak above the libraries", "ratio", "limit"]]
    with tempfile.TemporaryDirectory(prefix="dsft-export-") as name:
        folder = Path(name)
        run_dir = make_run(folder, options)
        run_ranks(2, [script, "--rank-program", str(run_dir)], environment(folder), folder)
        for size in options.shard_gib:
            command = [sys.executable, script, "--export-program", str(run_dir), "--shard-gib", str(size)]
            told = told_by(command, environment(folder))
            told["ratio"] = (told["peak"] - told["before"]) / max(told["files"])
            runs.append({"shard_gib": size, **told})
            cells = [f"{value / 2**20:.0f} MiB" for value in (max(told["files"]), told["peak"] - told["before"])]
            rows.append([str(len(told["files"])), *cells, f"{told['ratio']:.2f}", str(LIMIT)])
    value = {
        "command": command_line("export_memory"),
        "formula": "(peak anonymous memory - that with the libraries loaded) / largest file of the export",
        "settings": {key: str(value) for key, value in vars(options).items() if key in ("hidden", "layers")},
        "limit": LIMIT,
        "runs": runs,
    }
    write_result(options.output, "export_memory", value, rows)


if __name__ == "__main__":
    main()
