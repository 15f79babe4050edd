"""dsft beside its peers: `python benchmarks/peers.py` (limit: 1.5 times the target tokens/s of HF's Trainer, padded).

The same Llama from the same seed, the same records, ranks, ZeRO-3 settings, AdamW and bf16, one torchrun job a side, in
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
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    command_line,
    end_rank,
    environment,
    hf_arguments,
    llama,
    math_records,
    plan_run,
    run_ranks,
    write_data,
    write_result,
)

LIMIT = 1.5
LEARNING_RATE = 1e-4
SIDES = ("dsft", "hf", "trl", "dsft_fixed", "hf_fixed")
_PAIRS = (("dsft", "hf"), ("dsft", "trl"), ("dsft_fixed", "hf_fixed"))


def rank_program(side: str, folder: Path, options: argparse.Namespace) -> None:
    """One rank of one side; rank 0 leaves SIDE.json: {"step_seconds", "target_tokens", "losses", "memory_bytes"}."""
    found = dsft_rank(side, folder, options) if side.startswith("dsft") else trainer_rank(side, folder, options)
    import torch.distributed as dist

    if dist.get_rank() == 0:
        (folder / f"{side}.json").write_text(json.dumps(found))
    dist.barrier()
    end_rank()


def dsft_rank(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """dsft's own trainer on a run directory as the launcher leaves it."""
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    trainer = Trainer(RunDirectory(folder / "runs" / side), 1)
    trainer.run_to_end()
    lines = trainer.run.step_lines()
    return {
        "step_seconds": [line["step_seconds"] for line in lines],
        "target_tokens": [line["target_tokens"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "memory_bytes": max((line["memory_bytes"] for line in lines), default=0),
    }


def trainer_rank(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer or TRL's SFTTrainer."""
    import resource

    import datasets
    import deepspeed.ops
    import torch
    import transformers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as dsft: gloo, nothing compiled at start
    torch.manual_seed(0)
    zero = json.loads((folder / "runs" / ("dsft_fixed" if "fixed" in side else "dsft") / "plan.json").read_text())
    packed = side == "trl"
    arguments = hf_arguments(
        zero["deepspeed"],
        output_dir=str(folder / side),
        per_device_train_batch_size=options.micro_batch_size if packed else samples_a_batch(side, folder, options),
        max_steps=options.steps,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=options.checkpointing,
        seed=0,
    )
    records = [json.loads(line) for line in data_file(side, folder).read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    made = llama(options.hidden, options.layers, options.vocabulary)
    config = transformers.AutoConfig.for_model(made.pop("model_type"), **made)

    counted: list[int] = []
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - self.start)

    def counting(collate: Any) -> Any:
        def collated(samples: Any) -> Any:
            batch = collate(samples)
            counted.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        return collated

    if packed:
        import trl

        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        rows = [{"prompt": r["question"], "completion": r["answer"]} for r in records]
        sft = trl.SFTConfig(**arguments, max_length=options.sequence_length, packing=True, completion_only_loss=True)
        trainer: Any = trl.SFTTrainer(
            model=model,
            args=sft,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    else:
        training = transformers.TrainingArguments(**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

        def encode(record: dict[str, str]) -> dict[str, list[int]]:
            prompt, answer = tokenizer(record["question"])["input_ids"], tokenizer(record["answer"])["input_ids"]
            ids = [*prompt, *answer, tokenizer.eos_token_id][: options.sequence_length]
            return {"input_ids": ids, "labels": [-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]}

        trainer = transformers.Trainer(
            model=model,
            args=training,
            train_dataset=datasets.Dataset.from_list([encode(record) for record in records]),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
            callbacks=[Clock()],
        )
    trainer.data_collator = counting(trainer.data_collator)
    trainer.train()
    tokens = torch.tensor(counted[: options.steps], dtype=torch.int64)  # the loader may have collated one more ahead
    torch.distributed.all_reduce(tokens)
    return {
        "step_seconds": seconds,
        "target_tokens": tokens.tolist(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def data_file(side: str, folder: Path) -> Path:
    return folder / ("fixed.jsonl" if "fixed" in side else "train.jsonl")


def samples_a_batch(side: str, folder: Path, options: argparse.Namespace) -> int:
    """Samples whose tokens, without padding, fill the micro-batch of those that pack."""
    tokens = json.loads((folder / "mean_tokens.json").read_text())["fixed" if "fixed" in side else "train"]
    return max(round(options.micro_batch_size * options.sequence_length / tokens), 1)


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Data, tokenizer, and the run directories of dsft's sides."""
    import tokenizers

    from trainer.config.schema import LaunchConfig
    from trainer.rundir import write_json

    made = write_data(folder, 4000, min(2000, options.vocabulary))
    if options.data:
        made["data"].write_text(options.data.read_text(encoding="utf-8"))
    fast = tokenizers.Tokenizer.from_file(str(made["tokenizer"] / "tokenizer.json"))
    records = [json.loads(line) for line in made["data"].read_text().splitlines()]
    lengths = [sum(len(e.ids) for e in fast.encode_batch([r["question"], r["answer"]])) + 1 for r in records]
    # records of equal length: as many tokens as a sequence has, of which half are learned
    half = options.sequence_length // 2
    ids = fast.encode(" ".join(r["answer"] for r in math_records(400, seed=1))).ids
    fixed = []
    for start in range(0, len(ids) - 2 * half, half):
        question, answer = ids[start : start + half], ids[start + half : start + 2 * half - 1]
        fixed.append({"question": fast.decode(question), "answer": fast.decode(answer)})
    (folder / "fixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in fixed))
    write_json(
        folder / "mean_tokens.json", {"train": statistics.mean(lengths), "fixed": float(options.sequence_length)}
    )
    for side in ("dsft", "dsft_fixed"):
        columns = {"prompt": "question", "completion": "answer"}
        config = LaunchConfig.model_validate(
            {
                "name": side,
                "output_dir": str(folder / "runs"),
                "task": {"type": "causal-lm"},
                "model": {
                    "config": llama(options.hidden, options.layers, options.vocabulary),
                    "tokenizer": str(made["tokenizer"]),
                    "gradient_checkpointing": options.checkpointing,
                },
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
        plan_run(folder / "runs" / side, config)


def measure(options: argparse.Namespace, sides: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rounds of all sides."""
    script = str(ROOT / "benchmarks" / "peers.py")
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="dsft-peers-") as name:
            folder = Path(name)
            prepare(folder, options)
            for side in sides:
                arguments = [script, *sys.argv[1:], "--side", side, "--folder", str(folder)]
                run_ranks(options.ranks, arguments, environment(folder), folder)
                told = json.loads((folder / f"{side}.json").read_text())
                warm = slice(options.warm_up, None)
                seconds, tokens = sum(told["step_seconds"][warm]), sum(told["target_tokens"][warm])
                found[side].append({**told, "target_tokens_per_second": tokens / seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
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
    if options.side:
        rank_program(options.side, options.folder, options)
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
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("output", "side", "folder")},
        "limit": LIMIT,
        "ratios": ratios,
        "rounds": found,
    }
    write_result(options.output, "peers", value, rows)


if __name__ == "__main__":
    main()
