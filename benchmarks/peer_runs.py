"""Whole runs of dsft and its peers beside one another, one command: `python benchmarks/peer_runs.py`.

Each side trains the same random Llama from the same folder on the same records with the same ZeRO-3 settings, AdamW and
dtype, saves at one step, ends, is started again and goes on from what it saved. In turn, one after the other:

- dsft: `dsft launch`, with its checks, packed; ended by an interrupt, as a user ends it;
- bare: a DeepSpeed loop by hand (`peer_ranks.py`), packed, `save_checkpoint`, records skipped on resume;
- hf: transformers' Trainer with DeepSpeed, each batch padded to its longest sample;
- trl: TRL's SFTTrainer, packing=True (best-fit), loss on completions;
- arctic: ArcticTraining's SFT trainer, packed, in an environment of its own (`--arctic PYTHON`: it pins older
  packages).

What is counted: seconds from the command to the end of the first optimizer step; the median step after the warm-up;
target tokens/s of these steps, over all ranks; how long the step loop stands still for the save; seconds from the
second command to its first step after the resume; the largest resident set of a rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    PROCESS_SECONDS,
    RESULTS,
    ROOT,
    command_line,
    dsft_command,
    environment,
    llama,
    quick_dtype,
    save_llama,
    torchrun_command,
    write_data,
    write_result,
)

SIDES = ("dsft", "bare", "hf", "trl", "arctic")
NAMES = {
    "dsft": "dsft launch",
    "bare": "bare DeepSpeed loop, packed",
    "hf": "HF Trainer + DeepSpeed, padded",
    "trl": "TRL SFTTrainer, packed",
    "arctic": "ArcticTraining SFT, packed",
}
RESUMED_STEPS = 2


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Data, tokenizer, the model, dsft's config and the DeepSpeed JSON that it plans, which all sides use."""
    import datasets

    from launcher.facts import gather_facts
    from launcher.plan import make_plan
    from trainer.config.schema import LaunchConfig

    made = write_data(folder, 4000, vocabulary=2000)
    save_llama(folder / "model", llama(options.hidden, options.layers, options.vocabulary), options.dtype)
    shutil.copytree(made["tokenizer"], folder / "model", dirs_exist_ok=True)
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    records = [json.loads(line) for line in made["data"].read_text().splitlines()]
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "arrow"))
    value = {
        "name": "dsft",
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": {"path": str(folder / "model"), "dtype": options.dtype, "gradient_checkpointing": False},
        "data": {
            "train": [{"path": str(made["data"]), "columns": {"prompt": "question", "completion": "answer"}}],
            "sequence_length": options.sequence_length,
        },
        "training": {
            "global_batch_size": options.micro_batch_size * options.ranks,
            "micro_batch_size": options.micro_batch_size,
            "max_steps": 10_000,
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"type": "constant"},
        },
        "checkpoint": {"interval_steps": options.save_at},
        "resilience": {"stop_grace_seconds": 60.0},
        "cluster": {"processes_per_node": options.ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
    }
    (folder / "config.json").write_text(json.dumps(value))
    config = LaunchConfig.model_validate(value)
    (folder / "deepspeed.json").write_text(json.dumps(make_plan(config, gather_facts(config)).deepspeed))


def dsft_side(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both starts of `dsft launch`."""
    from trainer.rundir import RunDirectory

    run = RunDirectory(folder / "runs" / "dsft")
    starts: list[float] = []

    def firsts() -> list[float]:
        return [float(event["time"]) for event in run.merged_events() if event["event"] == "first_step"]

    for last in (options.steps, options.steps + RESUMED_STEPS):
        starts.append(time.time())
        with open(folder / "dsft.txt", "ab") as output:
            command = [*dsft_command(), "launch", str(folder / "config.json")]
            process = subprocess.Popen(command, env=environment(folder), stdout=output, stderr=output)
        while process.poll() is None:
            lines = run.step_lines() if run.metrics_path.exists() else []
            if lines and lines[-1]["step"] >= last and len(firsts()) == len(starts):
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.2)
        process.wait(PROCESS_SECONDS)
        if not run.metrics_path.exists():
            raise SystemExit((folder / "dsft.txt").read_text()[-4000:])
    events = run.merged_events()
    first, resumed = firsts()
    lines = [line for line in run.step_lines() if line["step"] <= options.steps]
    return {
        "first_step": first - starts[0],
        "resume": resumed - starts[1],
        "step_seconds": [line["step_seconds"] for line in lines],
        "target_tokens": [line["target_tokens"] for line in lines],
        "stall": next(float(e["stall_seconds"]) for e in events if e["event"] == "checkpoint_started"),
        "memory_bytes": max(int(e["peak_bytes"]) for e in events if e["event"] == "memory"),
        "losses": [line["loss"] for line in lines],
    }


def peer_side(side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both starts of a peer under torchrun; {"problem": what it said} where it does not run."""
    program = "peer_arctic.py" if side == "arctic" else "peer_ranks.py"
    python = [str(options.arctic), "-m", "torch.distributed.run"] if side == "arctic" else torchrun_command(1)[:-2]
    command = [*python, "--standalone", f"--nproc-per-node={options.ranks}", str(ROOT / "benchmarks" / program)]
    settings = {
        key: getattr(options, key) for key in ("steps", "save_at", "micro_batch_size", "sequence_length", "dtype")
    }
    starts, told = [], []
    for phase in ("first", "resume"):
        job = folder / f"{side}-{phase}.job"
        job.write_text(json.dumps({**settings, "side": side, "phase": phase, "folder": str(folder)}))
        starts.append(time.time())
        # not within a process group of dsft's: a peer's own environment must not see this checkout
        variables = {k: v for k, v in environment(folder).items() if side != "arctic" or k != "PYTHONPATH"}
        done = subprocess.run(
            [*command, str(job)], env=variables, cwd=folder, capture_output=True, text=True, timeout=PROCESS_SECONDS
        )
        parts = [folder / f"{side}-{phase}-{rank}.json" for rank in range(options.ranks)]
        if done.returncode != 0 or not all(part.exists() for part in parts):
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line] or ["no result"]
            (options.output / f"peer_{side}.log").write_text(done.stdout + done.stderr)
            if phase == "first":
                return {"problem": lines[-1][:300]}
            told.append([])
            continue
        told.append([json.loads(part.read_text()) for part in parts])
    first, resumed = told
    return {
        "first_step": first[0]["first_step"] - starts[0],
        "resume": resumed[0]["first_step"] - starts[1] if resumed and resumed[0]["first_step"] else None,
        "step_seconds": first[0]["step_seconds"],
        "target_tokens": [sum(counts) for counts in zip(*(part["target_tokens"] for part in first), strict=True)],
        "stall": max(part["stall"] for part in first),
        "memory_bytes": max(part["memory_bytes"] for part in first),
        "losses": first[0]["losses"],
    }


def figures(found: dict[str, Any], options: argparse.Namespace) -> dict[str, float | None]:
    """The columns of a side. Steps that came right after the save are left out: they may wait for it."""
    steps = [
        (seconds, tokens)
        for number, (seconds, tokens) in enumerate(zip(found["step_seconds"], found["target_tokens"], strict=False), 1)
        if number > options.warm_up and number not in (options.save_at, options.save_at + 1)
    ]
    return {
        "first step, s": found["first_step"],
        "step, s": statistics.median(seconds for seconds, _ in steps),
        "target tokens/s": sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps),
        "save stall, s": found["stall"],
        "resume, s": found["resume"],
        "memory of a rank, GiB": found["memory_bytes"] / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-at", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on CPUs slow at bfloat16")
    parser.add_argument("--arctic", type=Path, help="Python of an environment with arctic-training; without: left out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.dtype = options.dtype or quick_dtype()
    sides = [side for side in SIDES if side in options.sides]
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-runs-") as name:
        folder = Path(name)
        prepare(folder, options)
        for side in sides:
            if side == "trl" and importlib.util.find_spec("trl") is None:
                runs[side] = {"problem": "trl is not installed"}
            elif side == "arctic" and options.arctic is None:
                runs[side] = {"problem": "not asked for (--arctic)"}
            else:
                runs[side] = dsft_side(folder, options) if side == "dsft" else peer_side(side, folder, options)
    table = {side: figures(found, options) for side, found in runs.items() if "problem" not in found}
    columns = list(next(iter(table.values())))
    rows = [["side", *columns]]
    for side in sides:
        if side not in table:
            rows.append([NAMES[side], f"did not run: {runs[side]['problem']}", *[""] * (len(columns) - 1)])
            continue
        cells = ["-" if value is None else f"{value:,.{0 if value > 100 else 2}f}" for value in table[side].values()]
        rows.append([NAMES[side], *cells])
    value = {
        "command": command_line("peer_runs"),
        "formula": "see the head of benchmarks/peer_runs.py",
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("output", "arctic")},
        "table": table,
        "runs": runs,
    }
    write_result(options.output, "peer_runs", value, rows)


if __name__ == "__main__":
    main()
