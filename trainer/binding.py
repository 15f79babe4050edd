"""Which CPUs each rank of a node runs on: its share of those the node may use, near its GPU where /sys tells."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

BIND_VARIABLE = "DSFT_BIND_CPUS"  # "off": ranks run wherever the node may
CPUS_VARIABLE = "DSFT_RANK_CPUS"  # from the agent to its ranks: a CPU list for each, as in "0-3 4-7"
_SMI_SECONDS = 10
_SYSTEM = Path("/sys/devices/system")
_DEVICES = Path("/sys/bus/pci/devices")

Cpus = frozenset[int]


def shares(
    allowed: Cpus, ranks: int, cores: Sequence[Cpus], domains: Sequence[Cpus], near: Sequence[Cpus | None]
) -> list[Cpus] | None:
    """The CPUs of each of `ranks` ranks, disjoint and within `allowed`; None where there are fewer cores than ranks.

    cores: the hardware threads of each core. domains: the CPUs of each NUMA node. near: the CPUs next to each rank's
    GPU, None where unknown. Ranks that want the same CPUs divide these; if a division cannot serve them all, or what
    is near is not known, all ranks divide `allowed` in the order of its NUMA nodes.
    """
    usable = [core & allowed for core in cores if core & allowed]
    order = sorted(usable, key=lambda core: (_domain(core, domains), min(core)))
    if len(near) == ranks and all(near):
        pools = {pool & allowed for pool in near if pool}
        if sum(map(len, pools)) == len(frozenset().union(*pools)):  # they do not overlap
            result: dict[int, Cpus] = {}
            for pool in pools:
                members = [rank for rank in range(ranks) if (near[rank] or frozenset()) & allowed == pool]
                part = _divide([core & pool for core in order if core & pool], len(members))
                result |= dict(zip(members, part or (), strict=False))
            if len(result) == ranks:
                return [result[rank] for rank in range(ranks)]
    return _divide(order, ranks)


def _divide(cores: Sequence[Cpus], parts: int) -> list[Cpus] | None:
    if len(cores) < parts:
        return None
    edges = [len(cores) * part // parts for part in range(parts + 1)]
    return [frozenset().union(*cores[start:end]) for start, end in itertools.pairwise(edges)]


def _domain(core: Cpus, domains: Sequence[Cpus]) -> int:
    return next((index for index, domain in enumerate(domains) if core & domain), len(domains))


def divide_node(ranks: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the agent sets for its ranks: the CPUs of each, unless BIND_VARIABLE is "off", and OMP_NUM_THREADS.

    As many threads as a rank has cores: to compute, a core's second hardware thread gains nothing.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    parts = None
    if environment.get(BIND_VARIABLE) != "off":
        parts = shares(allowed, ranks, _cores(allowed), _numa_nodes(), _near_gpus(ranks, environment))
    if parts is None:
        return {"OMP_NUM_THREADS": str(max(1, len(_cores(allowed)) // ranks))}
    threads = min(len(_cores(part)) for part in parts)
    return {CPUS_VARIABLE: " ".join(map(written, parts)), "OMP_NUM_THREADS": str(threads)}


def bind(text: str, local_rank: int) -> None:
    """Keep this process, and the threads and processes it will start, on its share of the agent's CPUS_VARIABLE."""
    with contextlib.suppress(OSError):  # CPUs taken away meanwhile: it runs where it may
        os.sched_setaffinity(0, parse(text.split()[local_rank]))


def parse(text: str) -> Cpus:
    """The CPUs of a list such as ``0-3,8,10-11``."""
    parts = (part.partition("-") for part in text.strip().split(",") if part)
    return frozenset(cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1))


def written(cpus: Cpus) -> str:
    """A list that `parse` reads: ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# -- what /sys tells ---------------------------------------------------------------------------------------------------


def _list(path: Path) -> Cpus | None:
    with contextlib.suppress(OSError, ValueError):
        return parse(path.read_text()) or None
    return None


def _cores(cpus: Cpus) -> list[Cpus]:
    """`cpus` by the core that they belong to; a CPU of which nothing is known is a core."""
    siblings = {_list(_SYSTEM / f"cpu/cpu{cpu}/topology/thread_siblings_list") or frozenset((cpu,)) for cpu in cpus}
    return sorted({found & cpus for found in siblings}, key=min)


def _numa_nodes() -> list[Cpus]:
    folders = sorted((_SYSTEM / "node").glob("node[0-9]*"), key=lambda folder: int(folder.name[4:]))
    return [cpus for folder in folders if (cpus := _list(folder / "cpulist"))]


def _near_gpus(ranks: int, environment: Mapping[str, str]) -> list[Cpus | None]:
    """The CPUs near the GPU of each rank, which takes the visible one of its own number."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if environment.get("DS_ACCELERATOR") == "cpu" or visible == "":
        return [None] * ranks
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no NVIDIA GPUs
        return [None] * ranks
    return near_gpus(ranks, visible, answer, _DEVICES)


def near_gpus(ranks: int, visible: str | None, listing: str, devices: Path) -> list[Cpus | None]:
    """The CPUs near the GPU of each rank, None where it is not known.

    visible: CUDA_VISIBLE_DEVICES, numbers or (beginnings of) UUIDs; None: all. listing: what nvidia-smi answers to
    ``--query-gpu=index,uuid,pci.bus_id --format=csv,noheader``. devices: /sys/bus/pci/devices, or a copy of it.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 2]
    names = [name.strip() for name in visible.split(",")] if visible is not None else [row[0] for row in rows]
    found = [next((row[2] for row in rows if name == row[0] or row[1].startswith(name)), None) for name in names]
    near: list[Cpus | None] = []
    for name in (found + [None] * ranks)[:ranks]:
        # nvidia-smi writes the PCI domain with eight digits, /sys with four
        near.append(_list(devices / name[-12:].lower() / "local_cpulist") if name else None)
    return near
