"""Bandwidth between nodes, measured with the libraries that training uses (gloo or NCCL); one rank a node.

    python -P -m trainer.probe '{"rank": 0, "world_size": 3, "address": ..., "port": ..., "device": "cpu"}' PARENT_PID

Prints {"probe": rank, "all_reduce": bus bytes/s, "pairs": [[from, to, bytes/s], ...]}.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.devices import take_gpu
from trainer.probe_plan import rounds, slow_links
from trainer.processes import die_with_parent

_TIMEOUT = timedelta(seconds=30)
_SIZES = {"cpu": (1 << 16, 1 << 20, 1 << 23), "cuda": (1 << 16, 1 << 22, 1 << 26)}  # bytes
_LONGEST_SECONDS = 1.0  # a larger message is tried only if it would take no longer
_REPEATS = 3
_TRIES = 3


def main() -> int:
    """Measure, and print what was found; errors of the network end it with a traceback."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    die_with_parent(int(sys.argv[2]))
    rank, size, device = options["rank"], options["world_size"], options["device"]
    if device == "cuda":
        take_gpu(0)
    store = dist.TCPStore(options["address"], options["port"], size, rank == 0, timeout=_TIMEOUT)  # type: ignore[attr-defined]
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    buffer = torch.zeros(_SIZES[device][-1], dtype=torch.uint8, device=device)
    found: dict[tuple[int, int], float] = {}
    for pairs in rounds(size):
        for one, other in pairs:
            if rank in (one, other):
                for source, target in ((one, other), (other, one)):
                    found |= _transfer(buffer, rank, source, target)
        dist.barrier()
    matrix = _everywhere(found)
    # Slow ones again, alone: rounds share switches, and whatever else runs on a node takes its share at times
    for _ in range(_TRIES):
        for source, target in slow_links(matrix):
            if rank in (source, target):
                again = _transfer(buffer, rank, source, target)
                found |= {link: max(speed, found[link]) for link, speed in again.items()}
            dist.barrier()
        matrix = _everywhere(found)
    reduced = _all_reduce(buffer)
    pairs_found = [[source, target, speed] for (source, target), speed in sorted(matrix.items())]
    print(json.dumps({"probe": rank, "all_reduce": reduced, "pairs": pairs_found}), flush=True)
    dist.destroy_process_group()
    return 0


def _transfer(buffer: torch.Tensor, rank: int, source: int, target: int) -> dict[tuple[int, int], float]:
    """Bytes per second from `source` to `target`, known to the source: {} at the target."""
    size = torch.zeros(1, dtype=torch.int64, device=buffer.device)
    if rank == target:
        while True:
            dist.recv(size, source)
            if not (count := int(size.item())):
                return {}
            dist.recv(buffer[:count], source)
            dist.send(size, source)
    best = 0.0
    for count in _SIZES[buffer.device.type]:
        if best and count / best > _LONGEST_SECONDS:
            break
        speeds: list[float] = []
        while len(speeds) < _REPEATS and sum(count / speed for speed in speeds) < _LONGEST_SECONDS:
            size.fill_(count)
            started = time.monotonic()
            dist.send(size, target)
            dist.send(buffer[:count], target)
            dist.recv(size, target)
            size.item()  # on a GPU: waits
            speeds.append(count / (time.monotonic() - started))
        best = max(speeds)
    dist.send(size.fill_(0), target)
    return {(source, target): best}


def _all_reduce(buffer: torch.Tensor) -> float:
    """Bus bandwidth of an all-reduce, 2 (n - 1) / n * bytes / seconds as nccl-tests define it."""
    world = dist.get_world_size()
    best = 0.0
    for count in _SIZES[buffer.device.type]:
        if best and count / best > _LONGEST_SECONDS:
            break
        values = buffer[:count].view(torch.float32)
        for _ in range(_REPEATS):
            dist.barrier()
            started = time.monotonic()
            dist.all_reduce(values)
            values[0].item()
            seconds = torch.tensor([time.monotonic() - started], device=buffer.device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # so that all ranks go on alike
            best = max(best, 2 * (world - 1) / world * count / float(seconds.item()))
    return best


def _everywhere(found: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {link: speed for part in gathered for link, speed in part.items()}


if __name__ == "__main__":
    sys.exit(main())
