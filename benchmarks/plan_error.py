"""The plan's estimate of a rank's memory beside what training takes: `python benchmarks/plan_error.py`.

Each case is a whole run of dsft's trainer under torchrun, with a checkpoint after each step. On CPUs the growth of a
rank's anonymous memory (RssAnon, sampled every 2 ms) over what it held after all imports is compared with the plan's
total without its overhead, which stands for the libraries; the last column is what the run itself reports: the peak
of the resident set beside the whole total. Malloc is told to give freed blocks back at once (it keeps those under 32
MB for later, as much again in places), and memory that was asked for and never touched does not count. On GPUs it is
the peak of torch's allocator (`max_memory_allocated`), and beside it what the allocator has reserved, fragments
included.
"""

from __future__ import annotations

import argparse
import gc
import json
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
    quick_dtype,
    run_ranks,
    status,
    write_data,
    write_result,
)

SMALL = {"hidden": 256, "layers": 4, "vocabulary": 8192}
WIDE = {"hidden": 768, "layers": 8, "vocabulary": 16384}
# (name, ranks, sizes, changes of the config)
CASES: tuple[tuple[str, int, dict[str, int], dict[str, Any]], ...] = (
    ("states: 64M parameters", 2, WIDE, {"training.micro_batch_size": 1}),
    ("the same in fp32", 2, WIDE, {"training.micro_batch_size": 1, "model.dtype": "float32"}),
    ("the same at ZeRO stage 2", 2, WIDE, {"training.micro_batch_size": 1, "deepspeed.zero_stage": 2}),
    ("the same on 1 rank", 1, WIDE, {"training.micro_batch_size": 1}),
    ("LoRA", 2, WIDE, {"training.micro_batch_size": 1, "model.adapter": {"type": "lora"}}),
    ("activations: 8 x 512 tokens, kept", 1, SMALL, {"model.gradient_checkpointing": False}),
    ("the same, recomputed", 1, SMALL, {}),
    ("the same in fp32, kept", 1, SMALL, {"model.gradient_checkpointing": False, "model.dtype": "float32"}),
)
GPU_CASES: tuple[tuple[str, int, dict[str, int], dict[str, Any]], ...] = (
    ("1.3B, recomputed", 1, {"hidden": 2048, "layers": 22, "vocabulary": 32768}, {"training.micro_batch_size": 4}),
    (
        "1.3B, kept",
        1,
        {"hidden": 2048, "layers": 22, "vocabulary": 32768},
        {"training.micro_batch_size": 1, "model.gradient_checkpointing": False},
    ),
    ("1.3B, LoRA", 1, {"hidden": 2048, "layers": 22, "vocabulary": 32768}, {"model.adapter": {"type": "lora"}}),
)


def rank_program(run_dir: Path) -> None:
    """One rank: trains, and writes rank<k>.json beside the run's config."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers.models.llama import modeling_llama  # noqa: F401  # its import is not the run's memory

    from trainer import engine, seq2seq  # noqa: F401
    from trainer.model import returning_freed_memory
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    _ = deepspeed.initialize
    gc.collect()
    before = status("RssAnon")
    with Peak() as peak:
        trainer = Trainer(RunDirectory(run_dir), 1)
        with returning_freed_memory():
            trainer.run_to_end()
        rank = dist.get_rank()
    told: dict[str, Any] = {"rank": rank, "peak": peak.bytes - before, "resident": status("VmHWM")}
    if trainer.device.type == "cuda":
        told |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    (run_dir / f"rank{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    end_rank()


def make_run(name: str, folder: Path, ranks: int, sizes: dict[str, int], changes: dict[str, Any], gpu: bool) -> Path:
    """A run directory as the launcher leaves it."""
    from trainer.config.schema import LaunchConfig

    length = 4096 if gpu else 512
    value: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": {
            "config": llama(**sizes) | {"max_position_embeddings": length},
            "tokenizer": str(folder / "tokenizer"),
            "gradient_checkpointing": True,
            "dtype": "bfloat16" if gpu else quick_dtype(),
        },
        "data": {
            "train": [{"path": str(folder / "train.jsonl"), "columns": {"text": "text"}}],
            "sequence_length": length,
        },
        "training": {"global_batch_size": 8 * ranks, "micro_batch_size": 8, "max_steps": 3},
        "checkpoint": {"interval_steps": 1},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": ranks},
    }
    for key, new in changes.items():
        section, name_of = key.split(".")
        value.setdefault(section, {})[name_of] = new
    if not gpu:
        value["cluster"]["environment"] = {"DS_ACCELERATOR": "cpu"}
    micro = value["training"]["micro_batch_size"]
    value["training"]["global_batch_size"] = micro * ranks
    config = LaunchConfig.model_validate(value)
    return plan_run(folder / "runs" / name, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of cases, from 0; default: all")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with models of 1.3B parameters")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program)
        return
    cases = GPU_CASES if options.gpu else CASES
    dtype = "bfloat16" if options.gpu else quick_dtype()
    runs = []
    for number in options.cases or range(len(cases)):
        name, ranks, sizes, changes = cases[number]
        if changes.get("model.dtype") == dtype:
            continue  # all are
        with tempfile.TemporaryDirectory(prefix="dsft-plan-") as place:
            folder = Path(place)
            made = write_data(folder, 1000)
            records = [json.loads(line) for line in made["data"].read_text().splitlines()]
            # every token is learned: the plan counts logits of all of them
            texts = (json.dumps({"text": f"{r['question']} {r['answer']}"}) + "\n" for r in records)
            made["data"].write_text("".join(texts))
            run = make_run(f"case{number}", folder, ranks, sizes, changes, options.gpu)
            variables = environment(folder)
            if options.gpu:
                del variables["DS_ACCELERATOR"]
            arguments = [str(ROOT / "benchmarks" / "plan_error.py"), "--rank-program", str(run)]
            run_ranks(ranks, arguments, variables, folder)
            memory = json.loads((run / "plan.json").read_text())["memory"]
            told = [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        planned = memory["total"] - memory["overhead"]
        peak = max(item["peak"] for item in told)
        runs.append({"case": name, "ranks": ranks, "planned": memory, "error": planned / peak - 1, "per_rank": told})
    rows = [["case", "ranks", "planned", "measured", "planned / measured - 1"]]
    rows[0].append("reserved" if options.gpu else "total / resident - 1")
    for run in runs:
        memory, told = run["planned"], run["per_rank"]
        planned, peak = memory["total"] - memory["overhead"], max(item["peak"] for item in told)
        if options.gpu:
            last = f"{max(item['reserved'] for item in told) / 2**20:,.0f} MiB"
        else:
            last = f"{memory['total'] / max(item['resident'] for item in told) - 1:+.0%}"
        cells = [f"{planned / 2**20:,.0f} MiB", f"{peak / 2**20:,.0f} MiB", f"{run['error']:+.0%}", last]
        rows.append([run["case"], str(run["ranks"]), *cells])
    value = {
        "command": command_line("plan_error"),
        "formula": "plan's total without overhead / fullest rank's peak - 1 (CPU: growth of anonymous memory; GPU: "
        f"torch.cuda.max_memory_allocated); {dtype} where nothing else is said",
        "runs": runs,
    }
    write_result(options.output, "plan_error", value, rows)


if __name__ == "__main__":
    main()
