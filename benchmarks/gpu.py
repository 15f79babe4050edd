"""Full fine-tuning on one GPU: `python benchmarks/gpu.py`.

Limits: MFU 0.45; 1.15 times the tokens/s of HF's Trainer; peak memory within 10 % of the plan.

Random weights, bf16, sequences of 4,096 tokens of packed text, every token learned. Each variant is a torchrun job of
its own on the very same sequences in the same order: dsft's real `Trainer` and transformers' Trainer with DeepSpeed,
each with several settings, so that the best of both are compared; out of memory is an outcome. `--offload` adds
Llama-3.1-8B with its optimizer in host memory. `--small` is the same on a CPU with tiny models: it tests the script and
says nothing of speed.

MFU: tokens/s * FLOPs per token / peak, by `trainer.planning.flops` (formula and data-sheet peak, recomputation not
counted). Memory: torch.cuda.max_memory_allocated beside the plan's total without the CUDA context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PROCESS_SECONDS, RESULTS, ROOT, end_rank, environment, torchrun_command, write_data, write_result

LIMITS = {"mfu": 0.45, "tokens": 1.15, "memory": 0.1}
LEARNING_RATE = 2e-5
# As in the config.json of Qwen3-1.7B, Llama-3.2-3B and Llama-3.1-8B, vocabularies too; the tokenizer is a small one
MODELS: dict[str, dict[str, Any]] = {
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 2048},
}
# name -> (side, ZeRO stage, gradient checkpointing, offload)
Variant = tuple[str, int, Any, str]
VARIANTS: dict[str, Variant] = {
    "dsft, ZeRO-3": ("dsft", 3, "auto", "none"),
    "dsft, ZeRO-2": ("dsft", 2, "auto", "none"),
    "HF Trainer, ZeRO-3, recomputed": ("hf", 3, True, "none"),
    "HF Trainer, ZeRO-2, recomputed": ("hf", 2, True, "none"),
    "HF Trainer, ZeRO-2, kept": ("hf", 2, False, "none"),
}
OFFLOADED: dict[str, Variant] = {
    "dsft, 8B, offload": ("dsft", 3, True, "cpu"),
    "HF Trainer, 8B, offload": ("hf", 3, True, "cpu"),
}


def make_run(folder: Path, model: str, variant: Variant, options: argparse.Namespace) -> Path:
    """A run directory with config and plan; the HF side reads its DeepSpeed JSON and its micro-batch from the plan."""
    from launcher.facts import gather_facts
    from launcher.plan import make_plan
    from trainer.config.loading import load_config
    from trainer.rundir import RunDirectory, write_json

    side, stage, checkpointing, offload = variant
    length = options.sequence_length
    value = {
        "name": f"{side}-{stage}-{checkpointing}-{offload}",
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": {
            "config": {"model_type": "llama", "max_position_embeddings": length, **MODELS[model]},
            "tokenizer": str(folder / "tokenizer"),
            "gradient_checkpointing": checkpointing,
        },
        "data": {
            "train": [{"path": str(folder / "text.jsonl"), "columns": {"text": "text"}}],
            "sequence_length": length,
        },
        "training": {
            "global_batch_size": options.global_batch_size,
            "micro_batch_size": options.micro_batch_size or "auto",
            "max_steps": options.steps,
            "optimizer": {"learning_rate": LEARNING_RATE},
            "schedule": {"type": "constant"},
        },
        "deepspeed": {"zero_stage": stage, "offload_optimizer": offload},
        "checkpoint": {"interval_steps": None},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": 1},
    }
    if options.small:
        value["cluster"] = {"processes_per_node": 1, "environment": {"DS_ACCELERATOR": "cpu"}}
    path = folder / "config.json"
    path.write_text(json.dumps(value))
    config = load_config(path, options.set if side == "dsft" else [])
    run = RunDirectory(folder / "runs" / config.name)
    run.attempt_dir(1).mkdir(parents=True)
    write_json(run.config_path, config.model_dump(mode="json"))
    write_json(run.plan_path, make_plan(config, gather_facts(config)).to_json())
    return run.path


def dsft_rank(run_dir: Path) -> dict[str, Any]:
    """dsft's own trainer."""
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    trainer = Trainer(RunDirectory(run_dir), 1)
    trainer.save_last = lambda: None  # type: ignore[method-assign]  # 100 GB to disk say nothing of a step
    trainer.run_to_end()
    lines = trainer.run.step_lines()
    return {key: [line[name] for line in lines] for key, name in (("seconds", "step_seconds"), ("losses", "loss"))}


def hf_rank(run_dir: Path) -> dict[str, Any]:
    """transformers' Trainer on the sequences of dsft's stream, in their order."""
    import deepspeed.ops
    import numpy as np
    import torch
    import transformers

    from trainer.attention import inference_attention
    from trainer.config.schema import LaunchConfig
    from trainer.data.stream import build_training_stream
    from trainer.forward import collate
    from trainer.tasks import get_task, task_tokenizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = LaunchConfig.model_validate_json((run_dir / "config.json").read_text())
    plan = json.loads((run_dir / "plan.json").read_text())
    task = get_task(config, task_tokenizer(config))
    total, micro = config.training.global_batch_size, plan["batch"]["micro_batch_size"]
    stream = build_training_stream(
        config,
        task,
        rank=0,
        world_size=1,
        micro_batch_size=total,
        gather=lambda a: [a],
        limit=config.training.max_steps,
    )
    rows = [sequence for batch in stream for part in batch.micro_batches for sequence in part.sequences]

    def collated(sequences: Any) -> dict[str, Any]:
        made = collate(sequences, 0, False, torch.device("cpu"))
        labels = torch.full((made.input_ids.numel() + 1,), -100)
        real = made.labels != -100
        labels[made.positions[real] + 1] = made.labels[real]  # the model shifts them back by one
        return {
            "input_ids": made.input_ids,
            "position_ids": made.position_ids,
            "labels": labels[:-1].view_as(made.input_ids),
        }

    settings = {**plan["deepspeed"], "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    settings |= {"gradient_clipping": "auto"}
    settings.pop("managed_gradient_accumulation", None)
    cpu = plan["device"] == "cpu"
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.start)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(len(rows)))

    arguments = transformers.TrainingArguments(
        output_dir=str(run_dir / "hf"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=total // micro,
        max_steps=config.training.max_steps or 0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=cpu,
        gradient_checkpointing=bool(config.model.gradient_checkpointing),
        deepspeed=settings,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
    )
    torch.manual_seed(config.training.seed)
    sizes = dict(config.model.config or {})
    made = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    attention = inference_attention("auto", torch.device(plan["device"]))
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation=attention)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=np.arange(len(rows)),
        data_collator=lambda of: collated([rows[int(index)] for index in of]),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "losses": losses}


def rank_program(run_dir: Path, side: str) -> None:
    """The one rank; leaves result.json in the run directory."""
    import torch
    import torch.distributed as dist

    found = dsft_rank(run_dir) if side == "dsft" else hf_rank(run_dir)
    if torch.cuda.is_available():
        found |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        found["device"] = torch.cuda.get_device_name()
    (run_dir / "result.json").write_text(json.dumps(found))
    dist.barrier()
    end_rank()


def measure(name: str, variant: Variant, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One variant: {"plan", "tokens_per_second", "mfu", "peak", "losses", ...} or {"problem"}."""
    from trainer.failures import UserError

    with tempfile.TemporaryDirectory(prefix="dsft-gpu-") as place:
        folder = Path(place)
        made = write_data(folder, options.records)
        records = [json.loads(line) for line in made["data"].read_text().splitlines()]
        texts = (json.dumps({"text": f"{record['question']} {record['answer']}"}) + "\n" for record in records)
        (folder / "text.jsonl").write_text("".join(texts))
        try:
            run = make_run(folder, model, variant, options)
        except UserError as error:
            return {"problem": str(error)}
        variables = environment(folder)
        if not options.small:
            del variables["DS_ACCELERATOR"]
            variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # offloaded optimizers run there
        script = [str(ROOT / "benchmarks" / "gpu.py"), "--rank-program", str(run), "--side", variant[0]]
        done = subprocess.run(
            [*torchrun_command(1), *script], env=variables, capture_output=True, text=True, timeout=PROCESS_SECONDS
        )
        if not (run / "result.json").exists():
            said = done.stdout + done.stderr
            if options.small:
                raise SystemExit(said[-4000:])
            errors = [line for line in said.splitlines() if "Error" in line] or [said[-300:]]
            return {"problem": "out of memory" if "OutOfMemoryError" in said else errors[-1][:300], "log": said[-4000:]}
        found = json.loads((run / "result.json").read_text())
        plan = json.loads((run / "plan.json").read_text())
    seconds = statistics.median(found["seconds"][options.warm_up :])
    # sequences are full but for a few tokens in a hundred; both sides run the padding as well
    speed = options.global_batch_size * options.sequence_length / seconds
    peak_flops, planned = plan["peak_flops"], plan["memory"]["total"] - plan["memory"]["overhead"]
    return {
        **found,
        "variant": name,
        "micro_batch_size": plan["batch"]["micro_batch_size"],
        "recompute": plan["recompute"],
        "tokens_per_second": speed,
        "mfu": speed * plan["flops_per_token"] / peak_flops if peak_flops else None,
        "planned": planned,
        "memory_error": planned / found["peak"] - 1 if "peak" in found and variant[0] == "dsft" else None,
        "flops_formula": plan["flops_formula"],
        "peak_flops": peak_flops,
    }


def curve_distance(runs: dict[str, dict[str, Any]]) -> float:
    """The largest relative distance of any variant's loss from the mean of all, over steps."""
    curves = [run["losses"] for run in runs.values() if "losses" in run]
    steps = list(zip(*curves, strict=False))
    return max((abs(loss / statistics.mean(step) - 1) for step in steps for loss in step), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), default="1.7b")
    parser.add_argument("--offload", action="store_true", help="8B with the optimizer in host memory as well")
    parser.add_argument("--only-offload", action="store_true", help="nothing but that")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="default: as the plan chooses for each variant")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in the configs of dsft's side")
    parser.add_argument("--small", action="store_true", help="on a CPU, in a minute; figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program, options.side)
        return
    chosen = {} if options.only_offload else {name: (options.model, variant) for name, variant in VARIANTS.items()}
    if options.offload or options.only_offload:
        chosen |= {name: ("8b", variant) for name, variant in OFFLOADED.items()}
    if options.small:
        options.sequence_length, options.global_batch_size, options.records = 128, 4, 400
        options.steps, options.warm_up = 3, 1
        small = ("dsft, ZeRO-3", "HF Trainer, ZeRO-3, recomputed")
        chosen = {name: ("small", VARIANTS[name]) for name in small}
    runs = {name: measure(name, variant, model, options) for name, (model, variant) in chosen.items()}
    rows = [["variant", "micro-batch", "recomputed", "tokens/s", "MFU", "peak memory", "planned / peak - 1"]]
    for name, run in runs.items():
        if "problem" in run:
            rows.append([name, *["-"] * 2, run["problem"].replace("|", "/"), *["-"] * 3])
            continue
        mfu = f"{run['mfu']:.3f}" if run["mfu"] else "-"
        peak = f"{run['peak'] / 2**30:.1f} GiB" if "peak" in run else "-"
        error = f"{run['memory_error']:+.0%}" if run["memory_error"] is not None else "-"
        cells = [str(run["micro_batch_size"]), "yes" if run["recompute"] else "no", f"{run['tokens_per_second']:,.0f}"]
        rows.append([name, *cells, mfu, peak, error])
    best = {
        side: max(
            (r["tokens_per_second"] for n, r in runs.items() if n.startswith(side) and "problem" not in r), default=0
        )
        for side in ("dsft", "HF")
    }
    ratio = best["dsft"] / best["HF"] if best["HF"] else None
    same = {name: run for name, run in runs.items() if "8B" not in name}
    rows.append(["best dsft / best HF", "-", "-", f"{ratio:.2f}" if ratio else "-", "-", "-", "-"])
    rows.append(["largest distance of a loss from the mean", "-", "-", f"{curve_distance(same):.1%}", "-", "-", "-"])
    one = next((run for run in runs.values() if "problem" not in run), {})
    peak = f"{one['peak_flops'] / 1e12:.0f} TFLOP/s" if one.get("peak_flops") else "not known"
    value = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "formula": f"MFU = tokens/s * ({one.get('flops_formula')}) / peak ({one.get('device', 'CPU')}: {peak})",
        "limits": LIMITS,
        "ratio": ratio,
        "curve_distance": curve_distance(same),
        "runs": runs,
    }
    write_result(options.output, "gpu", value, rows)


if __name__ == "__main__":
    main()
