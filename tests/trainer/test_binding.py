"""Shares of a node's CPUs: as a pure function of made-up nodes, and as the ranks of a real agent find them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.binding import BIND_VARIABLE, near_gpus, parse, shares, written
from trainer.processes import RUN_VARIABLE
from trainer.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, sys
from trainer.worker import main
def train(run, attempt):
    text = f"{sorted(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']}"
    (run.attempt_dir(attempt) / ("cpus" + os.environ["RANK"])).write_text(text)
if __name__ == "__main__":
    sys.exit(main(train=train))
"""


def cpus(text: str) -> frozenset[int]:
    return parse(text)


# Two sockets with eight cores of two hardware threads each, numbered as Linux does: 0-7,16-23 and 8-15,24-31
CORES = [frozenset((core, core + 16)) for core in range(16)]
DOMAINS = [cpus("0-7,16-23"), cpus("8-15,24-31")]
ALL = cpus("0-31")


def test_ranks_keep_to_whole_cores_in_the_order_of_numa_nodes() -> None:
    parts = shares(ALL, 4, CORES, DOMAINS, [None] * 4)
    assert parts == [cpus("0-3,16-19"), cpus("4-7,20-23"), cpus("8-11,24-27"), cpus("12-15,28-31")]


def test_ranks_are_near_their_gpus() -> None:
    one, two = DOMAINS
    parts = shares(ALL, 4, CORES, DOMAINS, [two, one, two, one])
    assert parts == [cpus("8-11,24-27"), cpus("0-3,16-19"), cpus("12-15,28-31"), cpus("4-7,20-23")]


def test_where_a_gpu_has_no_cpu_of_the_job_near_it_all_share_alike() -> None:
    """SLURM gave four cores of the first socket; the second GPU hangs on the second one."""
    assert shares(cpus("0-3,16-19"), 2, CORES, DOMAINS, DOMAINS) == [cpus("0-1,16-17"), cpus("2-3,18-19")]
    assert shares(cpus("0-3"), 2, CORES, DOMAINS, [DOMAINS[0], None]) == [cpus("0-1"), cpus("2-3")]


def test_fewer_cores_than_ranks_are_not_divided() -> None:
    assert shares(cpus("0,16"), 2, CORES, DOMAINS, [None] * 2) is None


# A DGX A100, as its nvidia-smi and /sys have it: two sockets of 64 cores in eight NUMA nodes, GPUs near every other one
DGX_LISTING = """\
0, GPU-5a3b6b1e-7d0f-1f6e-5d4b-0d2f6f5c1a00, 00000000:07:00.0
1, GPU-5a3b6b1e-7d0f-1f6e-5d4b-0d2f6f5c1a01, 00000000:0F:00.0
2, GPU-5a3b6b1e-7d0f-1f6e-5d4b-0d2f6f5c1a02, 00000000:47:00.0
3, GPU-5a3b6b1e-7d0f-1f6e-5d4b-0d2f6f5c1a03, 00000000:4E:00.0
4, GPU-d7e0c1b4-2f0e-9a63-84c2-6b1f3f9c7b04, 00000000:87:00.0
5, GPU-e1d2c3b4-2f0e-9a63-84c2-6b1f3f9c7b05, 00000000:90:00.0
6, GPU-f1d2c3b4-2f0e-9a63-84c2-6b1f3f9c7b06, 00000000:B7:00.0
7, GPU-01d2c3b4-2f0e-9a63-84c2-6b1f3f9c7b07, 00000000:BD:00.0
"""
DGX_LOCAL = ["48-63,176-191"] * 2 + ["16-31,144-159"] * 2 + ["112-127,240-255"] * 2 + ["80-95,208-223"] * 2


@pytest.fixture
def dgx_devices(tmp_path: Path) -> Path:
    for row, local in zip(DGX_LISTING.splitlines(), DGX_LOCAL, strict=True):
        folder = tmp_path / row[-12:].lower()
        folder.mkdir()
        (folder / "local_cpulist").write_text(local + "\n")
    return tmp_path


def test_a_whole_dgx_is_bound_to_where_its_gpus_are(dgx_devices: Path) -> None:
    near = near_gpus(8, None, DGX_LISTING, dgx_devices)
    assert near == [cpus(local) for local in DGX_LOCAL]
    cores = [frozenset((core, core + 128)) for core in range(128)]
    domains = [cpus(f"{16 * node}-{16 * node + 15},{16 * node + 128}-{16 * node + 143}") for node in range(8)]
    parts = shares(cpus("0-255"), 8, cores, domains, near)
    assert parts is not None
    first, second = cpus("48-55,176-183"), cpus("56-63,184-191")
    assert parts[:3] == [first, second, cpus("16-23,144-151")]


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("2,0", [2, 0]),  # in the order of the ranks
        ("GPU-e1d2c3b4-2f0e-9a63-84c2-6b1f3f9c7b05,GPU-f1d2", [5, 6]),
        ("6", [6, None]),  # one GPU for two ranks
        ("MIG-ce861fb0-a248-58ce-a9a8-f9adbc22a66a,8", [None, None]),
    ],
)
def test_the_visible_gpus_count(dgx_devices: Path, visible: str, gpus: list[int | None]) -> None:
    near = near_gpus(2, visible, DGX_LISTING, dgx_devices)
    assert near == [None if gpu is None else cpus(DGX_LOCAL[gpu]) for gpu in gpus]


@pytest.mark.parametrize("listing", ["", "NVIDIA-SMI has failed because it couldn't communicate with the driver.\n"])
def test_without_gpus_nothing_is_near(tmp_path: Path, listing: str) -> None:
    assert near_gpus(2, None, listing, tmp_path) == [None, None]


@given(st.data(), st.frozensets(st.integers(0, 31), min_size=1), st.integers(1, 9))
def test_shares_are_disjoint_allowed_and_fair(data: st.DataObject, allowed: frozenset[int], ranks: int) -> None:
    near = data.draw(st.lists(st.sampled_from([*DOMAINS, ALL, None]), min_size=ranks, max_size=ranks))
    parts = shares(allowed, ranks, CORES, DOMAINS, near)
    if parts is None:
        assert len({cpu % 16 for cpu in allowed}) < ranks
        return
    assert len(parts) == ranks
    assert all(part and part <= allowed for part in parts)
    assert sum(map(len, parts)) == len(frozenset().union(*parts))
    if set(near) == {None}:  # then nothing is left over
        assert frozenset().union(*parts) == allowed
        sizes = [len({cpu % 16 for cpu in part}) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@given(st.frozensets(st.integers(0, 300)))
def test_lists_are_read_as_they_are_written(value: frozenset[int]) -> None:
    assert parse(written(value)) == value


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_the_ranks_of_an_agent_are_bound(tmp_path: Path, mode: str) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one CPU cannot be divided")
    (tmp_path / "affinity.py").write_text(RANK)
    run = RunDirectory(tmp_path / "run")
    run.attempt_dir(1).mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", BIND_VARIABLE)}
    environment |= {"PYTHONPATH": f"{ROOT}:{tmp_path}", RUN_VARIABLE: str(run.path), BIND_VARIABLE: mode}
    command = [sys.executable, "-P", "-m", "trainer.agent", "--run-dir", str(run.path), "--attempt", "1"]
    command += ["--worker-module", "affinity", "--", "--nproc-per-node", "2"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    found = [(run.attempt_dir(1) / f"cpus{rank}").read_text().rsplit(" ", 1) for rank in range(2)]
    sets = [frozenset(map(int, text.strip("[]").split(","))) for text, _ in found]
    if mode == "off":
        assert sets == [allowed, allowed]
        return
    assert sets[0].isdisjoint(sets[1])
    assert sets[0] | sets[1] == allowed
    assert [int(threads) for _, threads in found] == [max(1, len(allowed) // 2)] * 2 or len(allowed) > 2
