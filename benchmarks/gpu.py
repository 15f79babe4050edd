"""Full fine-tuning on one GPU: `python benchmarks/gpu.py`.

Limits: MFU 0.45; 1.15 times the tokens/s of HF's Trainer; peak memory within 10 % of the plan.

bf16, sequences of 4,096 tokens, every token learned. Each variant is a torchrun job of its own that starts from the
same random weights, on the very same sequences in the same order: dsft's real `Trainer` and transformers' Trainer with
DeepSpeed and Liger's kernels, each with several settings, so that the best of both are compared; out of memory is an
outcome. `--data documents`: a sequence is the beginning of one long document. `--data packed`: it is many short
samples, which must not see one another. Products in 8 bits are rounded otherwise than HF's: they stand by themselves,
in no ratio and no distance of losses. `--model 8b` is Llama-3.1-8B with Adafactor: its states fit one GPU. `--small` is
the same on a CPU with tiny models: it tests the script and says nothing of speed.

MFU: tokens/s * FLOPs per token / peak, by `trainer.planning.flops` (formula and data-sheet peak, recomputation not
counted); "causal" counts half of the attention, the half that kernels compute. Memory:
torch.cuda.max_memory_allocated beside the plan's total without the CUDA context.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    PROCESS_SECONDS,
    RESULTS,
    ROOT,
    command_line,
    environment,
    plan_run,
    torchrun_command,
    write_data,
    write_result,
)
from gpu_ranks import LEARNING_RATE, rank_program

LIMITS = {"mfu": 0.45, "tokens": 1.15, "memory": 0.1}
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


SAID = ("step_seconds", "tokens_per_second", "mfu", "mfu_causal", "micro_batch_size", "peak", "reserved", "planned")
SAID += ("losses", "seconds", "process_seconds", "whole_seconds")


@dataclass(frozen=True)
class Variant:
    """One way to train: ``sets`` change dsft's config (both sides are planned from it), ``hf`` TrainingArguments."""

    sets: tuple[str, ...] = ()
    hf: dict[str, Any] | None = None

    @property
    def side(self) -> str:
        return "dsft" if self.hf is None else "hf"


def _hf(stage: int, recompute: bool, **settings: Any) -> Variant:
    sets = (f"deepspeed.zero_stage={stage}", f"model.gradient_checkpointing={json.dumps(recompute)}")
    return Variant(sets, settings)


# Liger's fused head takes the head's weight outside of its module, where ZeRO-3 has not gathered it
_LIGER: dict[str, Any] = {"use_liger_kernel": True}
_LIGER_3 = _LIGER | {"liger_kernel_config": {"fused_linear_cross_entropy": False, "cross_entropy": True}}
VARIANTS: dict[str, Variant] = {
    "dsft, ZeRO-3": Variant(),
    "dsft, ZeRO-3, compiled": Variant(("model.compile=true",)),
    "dsft, ZeRO-3, compiled, fused loss": Variant(("model.compile=true", "model.fused_loss=true")),
    "fp8 rowwise: dsft, ZeRO-3, compiled": Variant(("model.compile=true", "model.fp8=rowwise")),
    "fp8 tensorwise: dsft, ZeRO-3, compiled": Variant(("model.compile=true", "model.fp8=tensorwise")),
    "dsft, ZeRO-2": Variant(("deepspeed.zero_stage=2",)),
    "HF Trainer, ZeRO-2, kept, Liger": _hf(2, False, **_LIGER),
    "HF Trainer, ZeRO-2, recomputed, Liger": _hf(2, True, **_LIGER),
    "HF Trainer, ZeRO-3, kept, Liger": _hf(3, False, **_LIGER_3),
    "HF Trainer, ZeRO-3, recomputed, Liger": _hf(3, True, **_LIGER_3),
    "HF Trainer, ZeRO-3, recomputed": _hf(3, True),
}
# its steps are relative to the size of the weights
_ADAFACTOR = ("training.optimizer.type=adafactor", "training.optimizer.learning_rate=1e-3")
LARGE: dict[str, Variant] = {
    "dsft, 8B, Adafactor": Variant(_ADAFACTOR),
    "dsft, 8B, Adafactor, compiled": Variant((*_ADAFACTOR, "model.compile=true")),
    "dsft, 8B, Adafactor, compiled, fused loss": Variant(
        (*_ADAFACTOR, "model.compile=true", "model.fused_loss=true"),
    ),
    "fp8 rowwise: dsft, 8B, Adafactor, compiled": Variant((*_ADAFACTOR, "model.compile=true", "model.fp8=rowwise")),
    "fp8 tensorwise: dsft, 8B, Adafactor, compiled": Variant(
        (*_ADAFACTOR, "model.compile=true", "model.fp8=tensorwise")
    ),
}


def config_of(
    model: str,
    text: Path,
    folder: Path,
    *,
    weights: Path | None = None,
    name: str = "run",
    length: int = 4096,
    batch: int = 16,
    micro: int | str = "auto",
    steps: int = 15,
    on_long: str = "truncate",
) -> dict[str, Any]:
    """The config of a run of ``model`` (of MODELS) on ``text``; without ``weights`` it draws its own."""
    shape = {"model_type": "llama", "max_position_embeddings": length, **MODELS[model]}
    origin: dict[str, Any] = {"path": str(weights)} if weights else {"config": shape}
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": origin | {"tokenizer": str(folder / "tokenizer")},
        "data": {
            "train": [{"path": str(text), "columns": {"text": "text"}}],
            "sequence_length": length,
            "on_long": on_long,
        },
        "training": {
            "global_batch_size": batch,
            "micro_batch_size": micro,
            "max_steps": steps,
            "optimizer": {"learning_rate": LEARNING_RATE},
            "schedule": {"type": "constant"},
        },
        "checkpoint": {"interval_steps": None},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": 1},
    }


@dataclass
class Bench:
    """What all variants share: the folder with data, tokenizer and first weights, and the options."""

    folder: Path
    options: argparse.Namespace
    model: Path | None = None  # first weights; None: each run draws its own
    number: int = field(default=0)

    def prepare(self) -> None:
        made = write_data(self.folder, self.options.records)
        records = [json.loads(line) for line in made["data"].read_text().splitlines()]
        texts = [f"{record['question']} {record['answer']}" for record in records]
        if self.options.data == "documents":
            size = 4 * self.options.sequence_length  # characters a token: less than four
            texts, short = [], texts
            while short:
                document = [short.pop()]
                while short and sum(map(len, document)) < size:
                    document.append(short.pop())
                texts.append("\n".join(document))
            texts = texts[:-1]  # the last one may be short
        (self.folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if self.options.model != "8b":
            self.model = self.folder / "model"
            command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--first-weights", str(self.model)]
            subprocess.run([*command, "--model", self.options.model], check=True, env=self.variables())

    def variables(self) -> dict[str, str]:
        variables = environment(self.folder)
        if not self.options.small:
            del variables["DS_ACCELERATOR"]
            variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # offloaded optimizers run there
        return variables

    def make_run(self, variant: Variant) -> Path:
        """A run directory with config and plan; HF's side reads its DeepSpeed JSON and micro-batch from the plan."""
        from trainer.config.loading import load_config

        options = self.options
        self.number += 1
        value = config_of(
            options.model,
            self.folder / "text.jsonl",
            self.folder,
            weights=self.model,
            name=f"run{self.number}",
            length=options.sequence_length,
            batch=options.global_batch_size,
            micro=options.micro_batch_size or "auto",
            steps=options.steps,
            on_long="truncate" if options.data == "documents" else "split",
        )
        if options.profile and variant.side == "dsft":
            value["logging"]["profile"] = {"skip_steps": options.steps - 2, "steps": 1}
        if options.small:
            value["cluster"]["environment"] = {"DS_ACCELERATOR": "cpu"}
        path = self.folder / "config.json"
        path.write_text(json.dumps(value))
        config = load_config(path, [*variant.sets, *(options.set if variant.side == "dsft" else [])])
        return plan_run(self.folder / "runs" / config.name, config)

    def measure(self, name: str, variant: Variant) -> dict[str, Any]:
        """One variant: {"plan", "tokens_per_second", "mfu", "peak", "losses", ...} or {"problem"}."""
        from trainer.failures import UserError

        options = self.options
        try:
            run = self.make_run(variant)
        except UserError as error:
            return {"problem": str(error)}
        script = [str(ROOT / "benchmarks" / "gpu.py"), "--rank-program", str(run), "--hf", json.dumps(variant.hf)]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*torchrun_command(1), *script],
                env=self.variables(),
                capture_output=True,
                text=True,
                timeout=options.seconds,
            )
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            return {"problem": f"not done in {options.seconds:.0f} s"}
        if not (run / "result.json").exists():
            if options.small:
                raise SystemExit(said[-4000:])
            errors = [line for line in said.splitlines() if "Error" in line] or [said[-300:]]
            return {"problem": "out of memory" if "OutOfMemoryError" in said else errors[-1][:300], "log": said[-4000:]}
        found = json.loads((run / "result.json").read_text())
        plan = json.loads((run / "plan.json").read_text())
        seconds = statistics.median(found["seconds"][options.warm_up : -1 if options.profile else None])
        # packed sequences are full but for a few tokens in a hundred; both sides run the padding as well
        speed = options.global_batch_size * options.sequence_length / seconds
        peak_flops, planned = plan["peak_flops"], plan["memory"]["total"] - plan["memory"]["overhead"]
        shape = MODELS[options.model]
        half_attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * options.sequence_length
        profiles = [path.read_text() for path in run.glob("profile/*/*.txt")]
        return {
            "process_seconds": time.monotonic() - start,
            "said": [line for line in said.splitlines() if line.startswith(("model.", "LlamaFor"))],
            "profile": "".join(profiles),
            "variant": name,
            "micro_batch_size": plan["batch"]["micro_batch_size"],
            **found,
            "recompute": plan["recompute"],
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": speed * plan["flops_per_token"] / peak_flops if peak_flops else None,
            "mfu_causal": speed * (plan["flops_per_token"] - half_attention) / peak_flops if peak_flops else None,
            "planned": planned,
            "plan": plan["memory"],
            "memory_error": planned / found["peak"] - 1 if "peak" in found and variant.side == "dsft" else None,
            "flops_formula": plan["flops_formula"],
            "peak_flops": peak_flops,
        }


def first_weights(folder: Path, model: str) -> None:
    """Save the weights that all variants start from; drawn on the GPU where there is one."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model("llama", max_position_embeddings=4096, **MODELS[model])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        drawn = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    drawn.save_pretrained(folder)


def curve_distance(runs: dict[str, dict[str, Any]]) -> float:
    """The largest relative distance of any variant's loss from the mean of all, over steps; without those in 8 bits."""
    curves = [run["losses"] for name, run in runs.items() if "losses" in run and not name.startswith("fp8")]
    steps = list(zip(*curves, strict=False))
    return max((abs(loss / statistics.mean(step) - 1) for step in steps for loss in step), default=0.0)


def table(runs: dict[str, dict[str, Any]], ratio: float | None) -> list[list[str]]:
    """A row for each variant."""
    head = ["variant", "micro-batch", "recomputed", "tokens/s", "MFU", "MFU, causal", "peak memory"]
    rows = [[*head, "planned / peak - 1"]]
    for name, run in runs.items():
        if "problem" in run:
            rows.append([name, *["-"] * 2, run["problem"].replace("|", "/"), *["-"] * 4])
            continue
        mfu = [f"{run[key]:.3f}" if run[key] else "-" for key in ("mfu", "mfu_causal")]
        peak = f"{run['peak'] / 2**30:.1f} GiB" if "peak" in run else "-"
        error = f"{run['memory_error']:+.0%}" if run["memory_error"] is not None else "-"
        cells = [str(run["micro_batch_size"]), "yes" if run["recompute"] else "no", f"{run['tokens_per_second']:,.0f}"]
        rows.append([name, *cells, *mfu, peak, error])
    rows.append(["best dsft / best HF", "-", "-", f"{ratio:.2f}" if ratio else "-", *["-"] * 4])
    rows.append(["largest distance of a loss from the mean", "-", "-", f"{curve_distance(runs):.1%}", *["-"] * 4])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hf", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first-weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), default="1.7b")
    parser.add_argument("--data", choices=("documents", "packed"), default="documents")
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="PATTERN", help="names, as shells match them")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="default: as the plan chooses for each variant")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=PROCESS_SECONDS, help="a variant may take")
    parser.add_argument("--profile", action="store_true", help="of one step of dsft's variants")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in the configs of dsft's side")
    parser.add_argument("--small", action="store_true", help="on a CPU, in a minute; figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program, "dsft" if options.hf is None else "hf", options.hf or {})
        return
    if options.first_weights:
        first_weights(options.first_weights, options.model)
        return
    chosen = LARGE if options.model == "8b" else VARIANTS
    if options.small:
        options.model, options.sequence_length, options.global_batch_size, options.records = "small", 128, 4, 900
        options.steps, options.warm_up = 3, 1
        names = ("dsft, ZeRO-3", "fp8 rowwise: dsft, ZeRO-3, compiled", "HF Trainer, ZeRO-3, recomputed")
        chosen = {name: VARIANTS[name] for name in names}
    chosen = {
        name: variant
        for name, variant in chosen.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.variants)
    }
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-gpu-") as place:
        bench = Bench(Path(place), options)
        bench.prepare()
        for name, variant in chosen.items():
            runs[name] = bench.measure(name, variant)
            run = runs[name]
            said = {key: run[key] for key in SAID if key in run}
            print(f"{name}: {run.get('problem') or said}", flush=True)
            print("\n".join([*run.get("said", []), run.get("profile", "")]), flush=True)
    best = {
        side: max(
            (r["tokens_per_second"] for n, r in runs.items() if n.startswith(side) and "problem" not in r), default=0
        )
        for side in ("dsft", "HF")
    }
    ratio = best["dsft"] / best["HF"] if best["HF"] else None
    one = next((run for run in runs.values() if "problem" not in run), {})
    peak = f"{one['peak_flops'] / 1e12:.0f} TFLOP/s" if one.get("peak_flops") else "not known"
    value = {
        "command": command_line("gpu"),
        "formula": f"MFU = tokens/s * ({one.get('flops_formula')}) / peak ({one.get('device', 'CPU')}: {peak})",
        "limits": LIMITS,
        "ratio": ratio,
        "curve_distance": curve_distance(runs),
        "runs": runs,
    }
    name = "gpu" if options.small else f"gpu_{options.model}_{options.data}".replace(".", "_")
    write_result(options.output, name, value, table(runs, ratio))


if __name__ == "__main__":
    main()
