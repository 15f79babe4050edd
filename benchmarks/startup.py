"""How soon dsft answers and trains: `python benchmarks/startup.py`.

1. `dsft --help` against `python -c "import torch"`: CPU and wall time (limit 0.15).
2. `dsft plan`: seconds (limit 1).
3. `dsft launch` up to its first optimizer step against benchmarks/bare_start.py under torchrun (limit 1.2): the same
   ranks, model, tokenizer, data and DeepSpeed JSON; dsft with its checks, records and logs, the script with none.

Pairs run alternately (A B A B ...) after one of each to warm the disk's cache; the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    command_line,
    dsft_command,
    environment,
    llama,
    median_ratio,
    quick_dtype,
    run_ranks,
    timed,
    write_data,
    write_result,
)

from trainer.rundir import RunDirectory

LIMITS = {"help": 0.15, "plan": 1.0, "first_step": 1.2}
RECORDS = 2000


def make_config(folder: Path, ranks: int, hidden: int, layers: int, vocabulary: int) -> Path:
    """A config of the defaults that ends after one step."""
    made = write_data(folder, RECORDS)
    config = {
        "name": "startup",
        "output_dir": str(folder / "runs"),
        "task": {"type": "causal-lm"},
        "model": {
            "config": llama(hidden, layers, vocabulary),
            "tokenizer": str(made["tokenizer"]),
            "dtype": quick_dtype(),
        },
        "data": {
            "train": [{"path": str(made["data"]), "columns": {"prompt": "question", "completion": "answer"}}],
            "sequence_length": 512,
        },
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 1,
            "optimizer": {"learning_rate": 1e-4},
        },
        "cluster": {"processes_per_node": ranks},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=1))
    return path


def measure_help(folder: Path, repeats: int, warm_up: int) -> dict[str, Any]:
    """{"dsft": [{"wall", "cpu"}], "torch": [...], "wall_ratio", "cpu_ratio"}."""
    variables = environment(folder)
    commands = {"dsft": [*dsft_command(), "--help"], "torch": [sys.executable, "-c", "import torch"]}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(repeats + warm_up):
        for name, command in commands.items():
            found = timed(command, variables, folder)
            if turn >= warm_up:
                times[name].append(found)
    ratios = {
        f"{clock}_ratio": median_ratio([t[clock] for t in times["dsft"]], [t[clock] for t in times["torch"]])
        for clock in ("wall", "cpu")
    }
    return {**times, **ratios}


def measure_plan(folder: Path, config: Path, repeats: int) -> dict[str, Any]:
    """{"times": [{"wall", "cpu"}], "wall": median, "cpu": median}."""
    command = [*dsft_command(), "plan", str(config)]
    times = [timed(command, environment(folder), folder) for _ in range(repeats + 1)][1:]
    return {"times": times, **{clock: statistics.median(t[clock] for t in times) for clock in ("wall", "cpu")}}


def bare_job(folder: Path, config: Path) -> Path:
    """JOB.json of bare_start.py, with the very DeepSpeed JSON that dsft plans."""
    printed = subprocess.run(
        [*dsft_command(), "plan", str(config), "--json"],
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(printed.stdout)
    values = json.loads(config.read_text())
    job = {
        "data": values["data"]["train"][0]["path"],
        "tokenizer": values["model"]["tokenizer"],
        "model": values["model"]["config"],
        "dtype": values["model"]["dtype"],
        "sequence_length": values["data"]["sequence_length"],
        "micro_batch_size": plan["batch"]["micro_batch_size"],
        "micro_batches_per_rank": plan["batch"]["micro_batches_per_rank"],
        "deepspeed": plan["deepspeed"],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def first_step_of_dsft(folder: Path, config: Path, turn: int) -> tuple[float, dict[str, float]]:
    """(seconds from the start of the command to its first step, seconds to each event on the way)."""
    scratch = folder / f"dsft{turn}"
    scratch.mkdir()
    start = time.time()
    command = [*dsft_command(), "launch", str(config), "--set", f"name=run{turn}"]
    timed(command, environment(scratch), scratch)
    events = RunDirectory(folder / "runs" / f"run{turn}").merged_events()
    seconds = {event["event"]: event["time"] - start for event in events}
    return seconds["first_step"], seconds


def first_step_of_bare(folder: Path, job: Path, ranks: int, turn: int) -> float:
    """Seconds from the start of torchrun to the script's first step."""
    scratch = folder / f"bare{turn}"
    scratch.mkdir()
    start = time.time()
    script = str(ROOT / "benchmarks" / "bare_start.py")
    output = run_ranks(ranks, [script, str(job)], environment(scratch), scratch)
    told = json.loads(next(line for line in output.splitlines() if line.startswith('{"first_step"')))
    if told["steps"] != 1:
        raise SystemExit(f"the bare script has made {told['steps']} steps, not 1")
    return float(told["first_step"]) - start


def measure_first_step(folder: Path, config: Path, ranks: int, repeats: int, warm_up: int) -> dict[str, Any]:
    """{"dsft": [seconds], "bare": [seconds], "events": [...], "ratio"}."""
    job = bare_job(folder, config)
    dsft, bare, events = [], [], []
    for turn in range(repeats + warm_up):
        seconds, told = first_step_of_dsft(folder, config, turn)
        other = first_step_of_bare(folder, job, ranks, turn)
        print(f"pair {turn}: dsft {seconds:.2f} s, bare {other:.2f} s, {seconds / other:.3f}", flush=True)
        if turn >= warm_up:
            dsft.append(seconds)
            bare.append(other)
            events.append(told)
    return {"dsft": dsft, "bare": bare, "events": events, "ratio": median_ratio(dsft, bare)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11, help="pairs of --help and import torch, and plans")
    parser.add_argument("--launches", type=int, default=5, help="pairs of launches")
    parser.add_argument("--warm-up", type=int, default=1, help="pairs that do not count, of each")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsft-startup-") as name:
        folder = Path(name)
        config = make_config(folder, options.ranks, options.hidden, options.layers, options.vocabulary)
        found = {
            "help": measure_help(folder, options.repeats, options.warm_up),
            "plan": measure_plan(folder, config, options.repeats),
            "first_step": measure_first_step(folder, config, options.ranks, options.launches, options.warm_up),
        }
    helps, plan, first = found["help"], found["plan"], found["first_step"]

    def middle(times: list[dict[str, float]], clock: str) -> str:
        return f"{statistics.median(t[clock] for t in times):.3f} s"

    rows = [["what", "dsft", "peer", "ratio", "limit"]]
    for clock in ("cpu", "wall"):
        told = [middle(helps["dsft"], clock), middle(helps["torch"], clock), f"{helps[f'{clock}_ratio']:.3f}"]
        rows.append([f"`dsft --help` / `import torch`, {clock} time", *told, str(LIMITS["help"])])
    rows.append(["`dsft plan`, wall time", f"{plan['wall']:.3f} s", "-", "-", f"{LIMITS['plan']} s"])
    seconds = [f"{statistics.median(first[name]):.2f} s" for name in ("dsft", "bare")]
    label = f"`dsft launch` to the first step / bare DeepSpeed script, {options.ranks} ranks"
    rows.append([label, *seconds, f"{first['ratio']:.3f}", str(LIMITS["first_step"])])
    value = {
        "command": command_line("startup"),
        "formula": "ratio = median over alternated pairs of dsft's time / the peer's time; times are medians",
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "limits": LIMITS,
        **found,
    }
    write_result(options.output, "startup", value, rows)


if __name__ == "__main__":
    main()
