"""Memory and time of steps with the optimizer and the weights on the device, in host memory, or in files:
`python benchmarks/offload_memory.py --disk FOLDER --memory-limit 0 3.5` (a folder on a local disk).

Ranks on CPUs train a random Llama in fp32, with a checkpoint in the middle. "anonymous" is the peak of RssAnon from the
first step on, of the largest rank: memory that the system cannot take back. Losses have to be the same in all places.
With a limit (GiB, of all ranks together; 0: none) they run in a memory cgroup, as in a SLURM job: pages of files
count there as well. That takes rights over cgroups.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Peak, command_line, end_rank, environment, llama, torchrun_command, write_result

PLACES: dict[str, dict[str, Any]] = {
    "device": {},
    "cpu": {"offload_optimizer": "cpu"},
    "nvme": {"offload_optimizer": "nvme"},
    "nvme, weights too": {"offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


def rank_program(job: dict[str, Any]) -> None:
    """One rank: trains, and writes its figures to FOLDER/rankN.json."""
    import torch
    import torch.distributed as dist
    import transformers

    from trainer.checkpoint import Saver
    from trainer.checkpoint_files import Retention
    from trainer.config.schema import DeepSpeedConfig, ModelConfig, OptimizerConfig
    from trainer.engine import Engine, in_files, init_distributed
    from trainer.file_memory import FileMemory
    from trainer.model import build_model, build_optimizer, quiet_libraries
    from trainer.planning.communication import Communication
    from trainer.planning.deepspeed_config import deepspeed_config
    from trainer.rundir import RunDirectory

    init_distributed("cpu", 1800.0)
    quiet_libraries()
    section = DeepSpeedConfig(**job["place"], **({"nvme_path": job["disk"]} if "nvme" in str(job["place"]) else {}))
    few = Communication(10_000_000, 5_000_000, 5_000_000)  # what is gathered and reduced is not the question here
    config = deepspeed_config(section, "float32", 1, 1, 1.0, few)
    memory = FileMemory(job["disk"], "optimizer" in section.on_disk, "parameters" in section.on_disk)
    files = memory if section.on_disk else None
    with in_files(files):
        model = build_model(
            ModelConfig(config=job["model"], tokenizer="none", dtype="float32"),
            transformers.AutoModelForCausalLM,
            config,
            "sdpa",
            0,
        )
    engine = Engine(model, build_optimizer(model, OptimizerConfig()), config, memory=files)
    saver = Saver(RunDirectory(Path(job["folder"]) / "run"), engine, Retention(1), lambda *_, **__: None)
    engine.train()
    ids = torch.randint(0, 1000, (1, 128), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses, seconds, stall = [], [], 0.0
    with Peak() as peak:
        for step in range(1, job["steps"] + 1):
            start = time.monotonic()
            loss = engine.forward(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step(1e-3)
            dist.barrier()
            seconds.append(time.monotonic() - start)
            losses.append(float(loss.detach()))
            if step == job["steps"] // 2:
                stall = saver.save(step, {"data": {}})
                saver.wait()
                assert saver.error is None, saver.error
                dist.barrier()
    told = {"anonymous": peak.bytes, "files": memory.bytes, "losses": losses, "seconds": seconds[1:], "stall": stall}
    (Path(job["folder"]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    end_rank()


@contextmanager
def cgroup(gib: float) -> Iterator[Path | None]:
    """A memory cgroup below this process's own, with a limit; a file that takes its processes."""
    if not gib:
        yield None
        return
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    first = "memory" in own
    root = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup") / own["memory" if first else ""].lstrip("/")
    folder = root / "dsft-offload-memory"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(int(gib * 2**30)))
        yield folder / "cgroup.procs"
    finally:
        for _ in range(50):  # its processes may be on their way out
            time.sleep(0.2)
            try:
                folder.rmdir()
                break
            except OSError:
                continue


def measure(place: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dsft-offload-", dir=options.disk) as name, cgroup(limit) as processes:
        model = llama(options.hidden, options.layers, options.vocabulary)
        job = {"place": PLACES[place], "disk": str(options.disk), "model": model, "folder": name}
        job["steps"] = options.steps
        path = Path(name) / "job.json"
        path.write_text(json.dumps(job))
        script = str(ROOT / "benchmarks" / "offload_memory.py")
        command = [*torchrun_command(options.ranks), script, "--rank-program", str(path), "--disk", str(options.disk)]
        enter = f"echo $$ > {processes} && " if processes else ""
        shell = ["sh", "-c", f'{enter}exec "$@"', "sh", *command]
        done = subprocess.run(shell, env=environment(Path(name)), cwd=name, capture_output=True, text=True)
        killed = done.returncode == -9 or "Signal 9 (SIGKILL)" in done.stderr
        found: dict[str, Any] = {"place": place, "limit_gib": limit, "killed": killed}
        if done.returncode and not killed:
            raise SystemExit(done.stdout + done.stderr)
        if not killed:
            ranks = [json.loads((Path(name) / f"rank{rank}.json").read_text()) for rank in range(options.ranks)]
            found |= {key: max(told[key] for told in ranks) for key in ("anonymous", "files", "stall")}
            found |= {"losses": ranks[0]["losses"], "step": statistics.median(ranks[0]["seconds"])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=Path, required=True, help="folder on a local disk")
    parser.add_argument("--disk-kind", default="not said", help="for the record: which disk that is")
    parser.add_argument("--memory-limit", type=float, nargs="+", default=[0.0], help="GiB; 0: none")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(json.loads(options.rank_program.read_text()))
        return
    runs = [measure(place, limit, options) for limit in options.memory_limit for place in options.places]
    rows = [["states", "limit, all ranks", "anonymous, a rank", "files, a rank", "step", "stall of a save"]]
    expected = next(run for run in runs if not run["killed"])["losses"]
    for run in runs:
        limit = f"{run['limit_gib']:g} GiB" if run["limit_gib"] else "none"
        if run["killed"]:
            rows.append([run["place"], limit, "killed: out of memory", "", "", ""])
            continue
        assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(run["losses"], expected, strict=True)), run["losses"]
        sizes = [f"{run[key] / 2**30:.2f} GiB" for key in ("anonymous", "files")]
        rows.append([run["place"], limit, *sizes, f"{run['step']:.2f} s", f"{run['stall']:.2f} s"])
    settings = {key: getattr(options, key) for key in ("ranks", "steps", "hidden", "layers", "vocabulary", "disk_kind")}
    value = {
        "command": command_line("offload_memory"),
        "formula": "peak of RssAnon from the first step on, of the largest rank; median time of a step after the first",
        "settings": settings,
        "runs": runs,
    }
    write_result(options.output, "offload_memory", value, rows)


if __name__ == "__main__":
    main()
