"""Full fine-tuning on one GPU: `python benchmarks/gpu.py`.

Limits: MFU 0.45; 1.15 times the tokens/s of HF's Trainer; peak memory within 10 % of the plan.

bf16, sequences of 4,096 tokens, every token learned. Each variant (gpu_variants.py) is a torchrun job of its own that
starts from the same random weights, on the very same sequences in the same order: dsft's real `Trainer` and
transformers' Trainer with DeepSpeed and Liger's kernels, each with several settings, so that the best of both are
compared; out of memory is an outcome. `--data documents`: a sequence is the beginning of one long document. `--data
packed`: it is many short samples, which must not see one another; HF has them padded by length as well. `--data
instructions`: samples are a question after `--examples` others with their answers, and its answer alone is learned, as
in most fine-tuning; the share of the tokens that are learned is in the table. Products in 8
bits are rounded otherwise than HF's: they have a ratio of their own, and their losses are not among those compared.
`--model 8b` is Llama-3.1-8B with Adafactor: its states fit one GPU. `--overlap` has the next variant import its
packages while one trains, where a minute of a GPU is dear. `--small` is the same on a CPU with tiny models: it tests
the script and says nothing of speed.

Tokens/s are without padding. MFU: tokens/s * FLOPs per token / peak, by `trainer.planning.flops` (formula and peak of
the data sheet, recomputation not counted), with the head at learned positions alone, whatever a side computes; "causal"
counts half of the attention, the half that kernels compute.
Memory: torch.cuda.max_memory_allocated beside the plan's total without the CUDA context.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
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
from gpu_ranks import rank_program
from gpu_variants import MODELS, SMALL, Variant, config_of, variants_of

LIMITS = {"mfu": 0.45, "tokens": 1.15, "memory": 0.1}
SAID = ("step_seconds", "tokens_per_second", "mfu", "mfu_causal", "micro_batch_size", "peak", "reserved", "planned")
SAID += ("losses", "seconds", "stalls", "process_seconds", "whole_seconds")


@dataclass
class Bench:
    """What all variants share: the folder with data, tokenizer and first weights, and the options."""

    folder: Path
    options: argparse.Namespace
    model: Path | None = None  # first weights; None: each run draws its own

    def prepare(self) -> None:
        made = write_data(self.folder, self.options.records)
        records = [json.loads(line) for line in made["data"].read_text().splitlines()]
        texts = [f"{record['question']} {record['answer']}" for record in records]
        samples = [{"text": text} for text in texts]
        if self.options.data == "instructions":
            shown = self.options.examples
            samples = [
                {"prompt": "\n".join([*texts[at : at + shown], record["question"]]), "completion": record["answer"]}
                for at, record in enumerate(records[shown:])
            ]
        elif self.options.data == "documents":
            size = 4 * self.options.sequence_length  # characters a token: less than four
            texts, short = [], texts
            while short:
                document = [short.pop()]
                while short and sum(map(len, document)) < size:
                    document.append(short.pop())
                texts.append("\n".join(document))
            samples = [{"text": text} for text in texts[:-1]]  # the last one may be short
        (self.folder / "text.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        if self.options.model == "8b":
            return
        self.model = (self.options.weights or self.folder / "model").resolve()
        if not (self.model / "config.json").exists():
            command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--first-weights", str(self.model)]
            subprocess.run([*command, "--model", self.options.model], check=True, env=self.variables())

    def variables(self) -> dict[str, str]:
        variables = environment(self.folder)
        if not self.options.small:
            del variables["DS_ACCELERATOR"]
            variables["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # offloaded optimizers run there
        return variables

    def sets(self, variant: Variant) -> list[str]:
        return [*variant.sets, *(self.options.set if variant.side == "dsft" else [])]

    def make_run(self, name: str, variant: Variant) -> Path:
        """A run directory with config and plan; HF's side reads its DeepSpeed JSON and micro-batch from the plan."""
        from trainer.config.loading import load_config

        options = self.options
        name = "".join(letter if letter.isalnum() else "-" for letter in name)
        value = config_of(
            options.model,
            self.folder / "text.jsonl",
            self.folder,
            weights=self.model,
            name=name,
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
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(value))
        sets = [item.replace("FOLDER", str(self.folder)) for item in self.sets(variant)]
        config = load_config(path, sets)
        return plan_run(self.folder / "runs" / config.name, config)

    def measure(self, name: str, variant: Variant, before: Event, done: Event) -> dict[str, Any]:
        """One variant: {"plan", "tokens_per_second", "mfu", "peak", "losses", ...} or {"problem"}.

        It takes the device when the one ``before`` is through with it, and tells with ``done``.
        """
        from trainer.failures import UserError

        options = self.options
        try:
            run = self.make_run(name, variant)
            script = [str(ROOT / "benchmarks" / "gpu.py"), "--rank-program", str(run)]
            command = [*torchrun_command(1), *script, "--variant", json.dumps(asdict(variant))]
            with (
                open(run / "output.txt", "w") as output,
                subprocess.Popen(command, env=self.variables(), stdout=output, stderr=subprocess.STDOUT) as process,
            ):
                before.wait()
                (run / "go").touch()
                start = time.monotonic()
                try:
                    process.wait(options.seconds)
                except subprocess.TimeoutExpired:
                    process.terminate()  # torchrun ends its rank
                    return {"problem": f"not done in {options.seconds:.0f} s"}
        except UserError as error:
            return {"problem": str(error)}
        finally:
            before.wait()
            done.set()
        said = (run / "output.txt").read_text(errors="replace")
        if not (run / "result.json").exists():
            if options.small:
                raise SystemExit(said[-4000:])
            errors = [line for line in said.splitlines() if "Error" in line] or [said[-300:]]
            return {"problem": "out of memory" if "OutOfMemoryError" in said else errors[-1][:300], "log": said[-4000:]}
        found = json.loads((run / "result.json").read_text())
        plan = json.loads((run / "plan.json").read_text())
        steps = list(zip(found["seconds"], found["tokens"], strict=True))
        steps = steps[options.warm_up : -1 if options.profile else None]
        seconds = statistics.median(second for second, _ in steps)
        speed = statistics.median(tokens / second for second, tokens in steps)
        peak_flops, planned = plan["peak_flops"], plan["memory"]["total"] - plan["memory"]["overhead"]
        shape = MODELS[options.model]
        half_attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * options.sequence_length
        learned = sum(found["targets"]) / sum(found["tokens"])
        needed = plan["flops_per_token"] - 6 * shape["hidden_size"] * shape["vocab_size"] * (1 - learned)
        profiles = [path.read_text() for path in run.glob("profile/*/*.txt")]
        for trace in run.glob("profile/*/*.trace.json.gz"):
            options.output.mkdir(parents=True, exist_ok=True)
            shutil.copy(trace, options.output / f"{run.name}.trace.json.gz")
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
            "learned": learned,
            "mfu": speed * needed / peak_flops if peak_flops else None,
            "mfu_causal": speed * (needed - half_attention) / peak_flops if peak_flops else None,
            "planned": planned,
            "plan": plan["memory"],
            "memory_error": planned / found["peak"] - 1 if "peak" in found and variant.side == "dsft" else None,
            "apart": variant.apart,
            "sets": self.sets(variant),
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
    """The largest relative distance of any variant's loss from the mean of all, over steps; without those apart."""
    curves = [run["losses"] for run in runs.values() if "losses" in run and not run["apart"]]
    steps = list(zip(*curves, strict=False))
    return max((abs(loss / statistics.mean(step) - 1) for step in steps for loss in step), default=0.0)


def table(runs: dict[str, dict[str, Any]], ratios: dict[str, float | None]) -> list[list[str]]:
    """A row for each variant."""
    head = ["variant", "micro-batch", "recomputed", "learned", "tokens/s", "MFU", "MFU, causal", "peak memory"]
    rows = [[*head, "planned / peak - 1"]]
    for name, run in runs.items():
        if "problem" in run:
            rows.append([name, *["-"] * 3, run["problem"].replace("|", "/"), *["-"] * 4])
            continue
        mfu = [f"{run[key]:.3f}" if run[key] else "-" for key in ("mfu", "mfu_causal")]
        peak = f"{run['peak'] / 2**30:.1f} GiB" if "peak" in run else "-"
        error = f"{run['memory_error']:+.0%}" if run["memory_error"] is not None else "-"
        cells = [str(run["micro_batch_size"]), "yes" if run["recompute"] else "no", f"{run['learned']:.2f}"]
        rows.append([name, *cells, f"{run['tokens_per_second']:,.0f}", *mfu, peak, error])
    for name, ratio in ratios.items():
        rows.append([f"best {name} / best HF", *["-"] * 3, f"{ratio:.2f}" if ratio else "-", *["-"] * 4])
    rows.append(["largest distance of a loss from the mean", *["-"] * 3, f"{curve_distance(runs):.1%}", *["-"] * 4])
    return rows


def write_runs(options: argparse.Namespace, runs: dict[str, dict[str, Any]], whole: bool) -> None:
    """What has been measured so far."""
    best = {
        side: max((r.get("tokens_per_second", 0) for name, r in runs.items() if name.startswith(side)), default=0)
        for side in ("dsft", "fp8", "HF")
    }
    ratios = {side: best[side] / best["HF"] if best[side] and best["HF"] else None for side in ("dsft", "fp8")}
    one = next((run for run in runs.values() if "problem" not in run), {})
    peak = f"{one['peak_flops'] / 1e12:.0f} TFLOP/s" if one.get("peak_flops") else "not known"
    value = {
        "command": command_line("gpu"),
        "formula": f"MFU = tokens/s * ({one.get('flops_formula')}) / peak ({one.get('device', 'CPU')}: {peak})",
        "limits": LIMITS,
        "ratio": ratios["dsft"],
        "ratio_fp8": ratios["fp8"],
        "curve_distance": curve_distance(runs),
        "runs": runs,
    }
    name = "gpu" if options.small else f"gpu_{options.model}_{options.data}".replace(".", "_")
    write_result(options.output, name, value, table(runs, ratios), whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--first-weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), default="1.7b")
    parser.add_argument("--data", choices=("documents", "packed", "instructions"), default="documents")
    parser.add_argument("--examples", type=int, default=3, help="before the question, in instructions")
    parser.add_argument("--variants", nargs="+", default=["*"], metavar="PATTERN", help="names, as shells match them")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, help="default: as the plan chooses for each variant")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=PROCESS_SECONDS, help="a variant may take")
    parser.add_argument("--weights", type=Path, help="a folder for the first weights, which other calls can share")
    parser.add_argument("--profile", action="store_true", help="of one step of dsft's variants; traces too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in the configs of dsft's side")
    parser.add_argument("--overlap", action="store_true", help="the next variant starts while one trains")
    parser.add_argument("--small", action="store_true", help="on a CPU, in a minute; figures mean nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program, Variant(**options.variant))
        return
    if options.first_weights:
        first_weights(options.first_weights, options.model)
        return
    chosen = variants_of(options.model, options.data)
    if options.small:
        options.model, options.sequence_length, options.global_batch_size, options.records = "small", 128, 4, 900
        options.steps, options.warm_up = 6, 1
        if options.data == "documents":
            options.data = "packed"
        chosen = SMALL
    chosen = {
        name: variant
        for name, variant in chosen.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.variants)
    }
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-gpu-") as place:
        bench = Bench(Path(place), options)
        bench.prepare()
        with ThreadPoolExecutor(2 if options.overlap else 1) as pool:
            turns = [Event() for _ in range(len(chosen) + 1)]
            turns[0].set()
            started = {
                name: pool.submit(bench.measure, name, variant, *turns[place : place + 2])
                for place, (name, variant) in enumerate(chosen.items())
            }
            for name, job in started.items():
                run = runs[name] = job.result()
                said = {key: run[key] for key in SAID if key in run}
                print(f"{name}: {run.get('problem') or said}", flush=True)
                print("\n".join([*run.get("said", []), run.get("profile", "")]), flush=True)
                write_runs(options, runs, whole=len(runs) == len(chosen))


if __name__ == "__main__":
    main()
