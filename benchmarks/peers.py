"""dsft beside its peers: `python benchmarks/peers.py` (limit: 1.5 times the target tokens/s of HF's Trainer, padded).

The same random Llama, the same records, ranks, ZeRO-3 settings, AdamW and bf16, one torchrun job a side, in
turn and several rounds; ratios are taken within a round:

- dsft: `Trainer.run_to_end` with everything it does, samples packed to `--sequence-length`;
- hf: transformers' Trainer with DeepSpeed, each batch padded to its longest sample, as its users run it;
- trl: TRL's SFTTrainer with `packing=True` (best-fit), loss on completions, if `trl` is installed;
- hf_fixed: the Trainer again on records of equal length, which need no padding, beside dsft on the same ones.

Target tokens/s: tokens that carry a label, over all ranks, per second of training steps after the first ones. Each side
fills a step with about as many tokens: `--micro-batch-size` sequences of full length a rank for those that pack, as
many samples as hold that many tokens with padding for those that do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    command_line,
    end_rank,
    environment,
    llama,
    math_records,
    plan_run,
    run_ranks,
    save_llama,
    write_data,
    write_result,
)

LIMIT = 1.5
LEARNING_RATE = 1e-4
SIDES = ("dsft", "hf", "trl", "dsft_fixed", "hf_fixed")
_PAIRS = (("dsft", "hf"), ("dsft", "trl"), ("dsft_fixed", "hf_fixed"))


def dsft_rank(run_dir: Path) -> None:
    """One rank of dsft's own trainer on a run directory as the launcher leaves it."""
    import torch.distributed as dist

    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    Trainer(RunDirectory(run_dir), 1).run_to_end()
    dist.barrier()
    end_rank()


def dsft_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """{"step_seconds", "target_tokens", "losses", "memory_bytes"} of dsft."""
    from trainer.rundir import RunDirectory

    run = RunDirectory(folder / "runs" / side)
    arguments = [str(ROOT / "benchmarks" / "peers.py"), "--dsft-rank", str(run.path)]
    run_ranks(options.ranks, arguments, environment(folder), folder)
    lines = run.step_lines()
    return {
        "step_seconds": [line["step_seconds"] for line in lines],
        "target_tokens": [line["target_tokens"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "memory_bytes": max((line["memory_bytes"] for line in lines), default=0),
    }


def peer_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same of transformers' Trainer or TRL's SFTTrainer."""
    job = {"side": "trl" if side == "trl" else "hf", "phase": side, "folder": str(folder), "save_at": 0}
    job |= {"data": data_file(side, folder).name, "dtype": "bfloat16", "checkpointing": options.checkpointing}
    job |= {key: getattr(options, key) for key in ("steps", "micro_batch_size", "sequence_length")}
    path = folder / f"{side}.job"
    path.write_text(json.dumps(job))
    run_ranks(options.ranks, [str(ROOT / "benchmarks" / "peer_ranks.py"), str(path)], environment(folder), folder)
    told = [json.loads((folder / f"{job['side']}-{side}-{r}.json").read_text()) for r in range(options.ranks)]
    return told[0] | {"target_tokens": [sum(of) for of in zip(*(part["target_tokens"] for part in told), strict=True)]}


def data_file(side: str, folder: Path) -> Path:
    return folder / ("fixed.jsonl" if "fixed" in side else "train.jsonl")


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Data, tokenizer, and the run directories of dsft's sides."""
    import tokenizers

    from trainer.config.schema import LaunchConfig

    made = write_data(folder, 4000, min(2000, options.vocabulary))
    if options.data:
        made["data"].write_text(options.data.read_text(encoding="utf-8"))
    model = folder / "model"
    save_llama(model, llama(options.hidden, options.layers, options.vocabulary), "bfloat16")
    shutil.copytree(made["tokenizer"], model, dirs_exist_ok=True)
    fast = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    # records of equal length: as many tokens as a sequence has, of which half are learned
    half = options.sequence_length // 2
    ids = fast.encode(" ".join(r["answer"] for r in math_records(400, seed=1))).ids
    fixed = []
    for start in range(0, len(ids) - 2 * half, half):
        question, answer = ids[start : start + half], ids[start + half : start + 2 * half - 1]
        fixed.append({"question": fast.decode(question), "answer": fast.decode(answer)})
    (folder / "fixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in fixed))
    for side in ("dsft", "dsft_fixed"):
        columns = {"prompt": "question", "completion": "answer"}
        config = LaunchConfig.model_validate(
            {
                "name": side,
                "output_dir": str(folder / "runs"),
                "task": {"type": "causal-lm"},
                "model": {"path": str(model), "gradient_checkpointing": options.checkpointing},
                "data": {
                    "train": [{"path": str(data_file(side, folder)), "columns": columns}],
                    "sequence_length": options.sequence_length,
                    "on_long": "truncate",
                },
                "training": {
                    "global_batch_size": options.micro_batch_size * options.ranks,
                    "micro_batch_size": options.micro_batch_size,
                    "max_steps": options.steps,
                    "optimizer": {"learning_rate": LEARNING_RATE},
                    "schedule": {"type": "constant"},
                },
                "checkpoint": {"interval_steps": None},
                "export": {"enabled": False},
                "cluster": {"processes_per_node": options.ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
            }
        )
        plan = json.loads((plan_run(folder / "runs" / side, config) / "plan.json").read_text())
    (folder / "deepspeed.json").write_text(json.dumps(plan["deepspeed"]))


def measure(options: argparse.Namespace, sides: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rounds of all sides."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="dsft-peers-") as name:
            folder = Path(name)
            prepare(folder, options)
            for side in sides:
                told = (dsft_side if side.startswith("dsft") else peer_side)(side, folder, options)
                warm = slice(options.warm_up, None)
                seconds, tokens = sum(told["step_seconds"][warm]), sum(told["target_tokens"][warm])
                found[side].append({**told, "target_tokens_per_second": tokens / seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsft-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--data", type=Path, help="JSONL with `question` and `answer` instead of made word problems")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.dsft_rank:
        dsft_rank(options.dsft_rank)
        return
    sides = [side for side in SIDES if side in options.sides]
    if "trl" in sides and importlib.util.find_spec("trl") is None:
        print("trl is not installed: its row is left out (pip install trl)")
        sides.remove("trl")
    found = measure(options, sides)
    rows = [["dsft against", "dsft", "peer", "ratio", "limit"]]
    ratios = {}
    names = {"hf": "HF Trainer, padded", "trl": "TRL SFTTrainer, packed", "hf_fixed": "HF Trainer, equal lengths"}
    for ours, theirs in _PAIRS:
        if ours not in sides or theirs not in sides:
            continue
        speeds = [[told["target_tokens_per_second"] for told in found[side]] for side in (ours, theirs)]
        ratios[theirs] = [a / b for a, b in zip(*speeds, strict=True)]
        cells = [f"{statistics.median(speed):,.0f}/s" for speed in speeds]
        limit = {"hf": str(LIMIT), "hf_fixed": "1.0"}.get(theirs, "-")
        rows.append([names[theirs], *cells, f"{statistics.median(ratios[theirs]):.2f}", limit])
    value = {
        "command": command_line("peers"),
        "formula": "target tokens/s over all ranks, steps after the warm-up; ratio within a round, median over rounds",
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("output", "dsft_rank")},
        "limit": LIMIT,
        "ratios": ratios,
        "rounds": found,
    }
    write_result(options.output, "peers", value, rows)


if __name__ == "__main__":
    main()
