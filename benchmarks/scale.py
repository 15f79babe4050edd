"""What grows with the number of ranks, piece by piece: `python benchmarks/scale.py`.

No cluster is needed: each piece of dsft that knows of all ranks is fed what 8, 64, 512 and 4,096 ranks would leave for
it, with the real functions and real files, and timed; the process groups are real ones, of as many processes as fit
here. The growth is the exponent of the time between the two largest sizes: 1 is proportional, 2 is quadratic.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, command_line, write_result

SIZES = (8, 64, 512, 4096)
GPUS_PER_NODE = 8


def timed(function: Callable[[], Any], repeats: int = 3) -> float:
    """The median time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def planning(ranks: int) -> dict[str, Any]:
    """The plan of a 70B model and its JSON."""
    from launcher.facts import Facts
    from launcher.plan import make_plan
    from trainer.config.schema import LaunchConfig
    from trainer.planning.model_facts import model_facts

    model = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    model |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    config = LaunchConfig.model_validate(
        {
            "name": "scale",
            "task": {"type": "causal-lm"},
            "model": {"config": model, "tokenizer": "x", "dtype": "bfloat16"},
            "data": {"train": [{"path": "x"}], "sequence_length": 4096},
            "training": {"global_batch_size": 8192, "max_steps": 1000},
            "cluster": {"backend": "slurm", "nodes": ranks // GPUS_PER_NODE, "gpus_per_node": GPUS_PER_NODE},
        }
    )
    facts = Facts("head", (), 8, 1 << 36, 1 << 36, 1 << 44, model_facts(config.model))
    plan = make_plan(config, facts)
    return {
        "plan": timed(lambda: make_plan(config, facts)),
        "plan.json": timed(lambda: json.dumps(plan.to_json())),
        "plan.json bytes": len(json.dumps(plan.to_json())),
    }


def heartbeats(folder: Path, ranks: int) -> dict[str, Any]:
    """The supervisor's look at all heartbeats, and its judgement."""
    from launcher.hangs import find_hang
    from launcher.heartbeats import HeartbeatWatch
    from launcher.stragglers import StragglerWatch
    from trainer import heartbeat
    from trainer.config.schema import ResilienceConfig

    folder.mkdir()
    for rank in range(ranks):
        beat = heartbeat.Heartbeat(rank, f"n{rank // GPUS_PER_NODE}", 9, "step", 5, 50, 0.1, (7, 7, 7), 1.0, 0.1, 1.0)
        heartbeat._write(folder / f"rank{rank}", beat)
    watch = HeartbeatWatch(folder, ranks, ResilienceConfig())
    watched = watch.look(0.0)
    beats = [item.beat for item in watched]
    slow = StragglerWatch()
    clock = iter(range(0, 10**9, 100))
    return {
        "heartbeats read": timed(lambda: watch.look(1.0)),
        "hang judged": timed(lambda: find_hang(watched, ranks, watch.resilience)),
        "stragglers judged": timed(lambda: slow.update(beats, float(next(clock)))),
        "heartbeats a second, all ranks": ranks / heartbeat.interval_seconds(ranks),
    }


def checkpoints(folder: Path, ranks: int) -> dict[str, Any]:
    """Rank 0 collecting all reports into the manifest; a rank checking its share of the files before it loads."""
    from trainer import checkpoint
    from trainer.checkpoint_files import checksum, damage, rank_file
    from trainer.rundir import write_json
    from trainer.slices import Slices

    folder.mkdir()
    files = {}
    for rank in range(ranks):
        path = folder / rank_file(rank, ranks)
        path.write_bytes(rank.to_bytes(8, "little"))
        files[path.name] = {"bytes": 8, "xxh3_128": checksum(path)}
        (folder / f"report-{rank:05d}.json").write_text(json.dumps({"files": {path.name: files[path.name]}}))

    class Collector:
        class _engine:
            world_size = ranks

    def collect() -> None:
        checkpoint.Saver._collect(Collector(), folder)  # type: ignore[arg-type]

    write_json(folder / "manifest.json", {"files": files})
    # which rank files a rank opens to load a checkpoint of as many ranks on 3/4 of them, for a matrix of 8192 x 8192
    slices = Slices(folder, {"world_size": ranks, "zero_stage": 3})
    fewer, numel = max(ranks * 3 // 4, 1), 8192 * 8192
    piece = -(-numel // fewer)
    opened = max(len(list(slices._candidates(numel, r * piece, min((r + 1) * piece, numel)))) for r in range(fewer - 1))
    return {
        "reports collected": timed(collect),
        "manifest bytes": (folder / "manifest.json").stat().st_size,
        "a rank's share checked": timed(lambda: damage(folder, lambda index: index % ranks == 0)),
        "whole checkpoint listed": timed(lambda: json.loads((folder / "manifest.json").read_text())),
        "files opened to load at 3/4 of the ranks": opened,
    }


def failures(ranks: int) -> dict[str, Any]:
    """The verdict where every rank has left a record, as after a broken network."""
    from launcher.verdict import Snapshot, classify

    nodes = [f"n{index}" for index in range(ranks // GPUS_PER_NODE)]
    records = [
        {"class": "communication", "rank": r, "node": nodes[r // GPUS_PER_NODE], "message": "m", "time": float(r)}
        for r in range(ranks)
    ]
    reports = [
        {
            "node": node,
            "time": 1.0,
            "message": "m",
            "exit_codes": {str(r): 1 for r in range(i * GPUS_PER_NODE, (i + 1) * GPUS_PER_NODE)},
        }
        for i, node in enumerate(nodes)
    ]
    snapshot = Snapshot(agents=dict.fromkeys(nodes, 1), reports=reports, records=records)
    return {"verdict": timed(lambda: classify(snapshot))}


def packing(ranks: int) -> dict[str, Any]:
    """What every rank does with the gathered lengths of a window of 4,096 documents: packs all of them."""
    import numpy as np

    from trainer.data.packing import pack

    lengths = np.random.default_rng(0).integers(50, 2000, 4096)
    return {"window packed": timed(lambda: pack(lengths, 4096))}


def open_sockets() -> int:
    """Of this process."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(name.startswith("socket:") for name in names)


def groups(count: int, lazy: bool) -> dict[str, Any]:
    """Process groups as a run makes them (three of gloo), in `count` real processes; the slowest rank's figures."""
    import torch
    import torch.distributed as dist

    os.environ["TORCH_GLOO_LAZY_INIT"] = "1" if lazy else "0"
    from trainer import collectives

    with tempfile.TemporaryDirectory(prefix="dsft-groups-") as name:
        folder = Path(name)
        children = []
        for rank in range(count):
            child = os.fork()
            if child:
                children.append(child)
                continue
            try:
                torch.set_num_threads(1)
                import numpy as np

                store = dist.FileStore(str(folder / "store"), count)
                start = time.monotonic()
                dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
                made = [collectives.new_group(300.0) for _ in range(3)]
                gather = collectives.make_gather(made[1])
                collectives.sum_step(made[0], 1.0, 1, 1)
                gather(np.zeros((4096 // count, 4), dtype=np.int64))
                seconds = time.monotonic() - start
                start = time.monotonic()
                for _ in range(5):
                    collectives.sum_step(made[0], 1.0, 1, 1)
                step = (time.monotonic() - start) / 5
                start = time.monotonic()
                gather(np.zeros((4096 // count, 4), dtype=np.int64))
                gathering = time.monotonic() - start
                told = {"setup": seconds, "sum_step": step, "gather": gathering, "sockets": open_sockets()}
                (folder / f"{rank}.json").write_text(json.dumps(told))
                dist.barrier(made[0])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return {key: max(item[key] for item in told) for key in told[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--processes", type=int, nargs="*", default=[4, 8, 16, 32], help="of the real process groups")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[int, dict[str, Any]] = {}
    for ranks in options.sizes:
        with tempfile.TemporaryDirectory(prefix="dsft-scale-") as name:
            folder = Path(name)
            found[ranks] = {
                **planning(ranks),
                **heartbeats(folder / "heartbeats", ranks),
                **checkpoints(folder / "checkpoint", ranks),
                **failures(ranks),
                **packing(ranks),
            }
    real = {
        mode: {count: groups(count, mode == "as needed") for count in options.processes}
        for mode in ("full mesh", "as needed")
    }
    rows = [["piece", *(f"{size:,}" for size in options.sizes), "growth"]]
    for key in found[options.sizes[0]]:
        values = [found[size][key] for size in options.sizes]
        growth = math.log(max(values[-1], 1e-9) / max(values[-2], 1e-9)) / math.log(
            options.sizes[-1] / options.sizes[-2]
        )
        counted = isinstance(values[0], int) or "a second" in key
        cells = [f"{value:,.0f}" if counted else f"{1000 * value:,.2f} ms" for value in values]
        rows.append([key, *cells, f"{growth:.1f}"])
    for mode, by_count in real.items():
        for key in next(iter(by_count.values()), {}):
            shown = ", ".join(
                f"{count}: {told[key]:.0f}" if key == "sockets" else f"{count}: {1000 * told[key]:.0f} ms"
                for count, told in by_count.items()
            )
            rows.append([f"gloo, {mode}: {key} ({shown})", *[""] * len(options.sizes), ""])
    value = {
        "command": command_line("scale"),
        "formula": "median of 3 calls; growth = log(t2 / t1) / log(n2 / n1) of the two largest sizes",
        "pieces": found,
        "groups": real,
    }
    write_result(options.output, "scale", value, rows)


if __name__ == "__main__":
    main()
