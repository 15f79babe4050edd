"""Shares of a node's CPUs: as a pure function of made-up nodes, and as the ranks of a real agent find them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.binding import BIND_VARIABLE, parse, shares, written
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
