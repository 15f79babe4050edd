"""What doctor concludes from what nodes told."""

from __future__ import annotations

from typing import Any

import pytest

from launcher import doctor_checks
from trainer.probe_plan import rounds, slow_links

NODES = ("n1", "n2", "n3", "n4")


def speeds(**slow: float) -> dict[tuple[str, str], float]:
    """1 GiB/s everywhere, but for `n1_n2=...`."""
    usual = {(one, other): float(1 << 30) for one in NODES for other in NODES if one != other}
    return usual | {tuple(link.split("_")): speed for link, speed in slow.items()}  # type: ignore[misc]


@pytest.mark.parametrize("size", range(2, 12))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(size: int) -> None:
    met = []
    for pairs in rounds(size):
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
        met += [tuple(sorted(pair)) for pair in pairs]
    assert sorted(met) == [(one, other) for one in range(size) for other in range(one + 1, size)]


def test_no_link_is_slow_where_all_are_alike() -> None:
    assert slow_links(speeds(n1_n2=0.5 * (1 << 30))) == []
    assert list(doctor_checks.network_problems(speeds())) == []
    assert list(doctor_checks.network_problems({})) == []


def test_a_slow_link_is_named() -> None:
    (problem,) = doctor_checks.network_problems(speeds(n1_n2=1 << 20))
    assert problem == "the link from n1 to n2 is slow: 1.0 MiB/s, others 1.0 GiB/s"


def test_a_slow_node_is_named_once_for_each_way() -> None:
    out = {f"n2_{other}": float(1 << 20) for other in ("n1", "n3", "n4")}
    (problem,) = doctor_checks.network_problems(speeds(**out))
    assert problem == "n2 is slow: it sends 1.0 MiB/s, where other nodes reach 1.0 GiB/s"
    back = {f"{other}_n2": float(1 << 20) for other in ("n1", "n3", "n4")}
    sends, receives = doctor_checks.network_problems(speeds(**out, **back))
    assert (sends.split()[0], receives.split()[0]) == ("n2", "n2")


def test_of_two_nodes_only_the_link_can_be_named() -> None:
    (problem,) = doctor_checks.network_problems({("n1", "n2"): 1e9, ("n2", "n1"): 1e6})
    assert problem.startswith("the link from n2 to n1 is slow")


def test_ports_that_are_closed() -> None:
    away = {name: {"failed": {"n3": "timed out"}} for name in ("n1", "n2")} | {"n3": {"failed": {}}}
    assert list(doctor_checks.reach_problems(away)) == [
        "no node can open a TCP connection to n3: timed out; is there a firewall?"
    ]
    one: dict[str, Any] = {"n1": {"failed": {"n3": "timed out"}}, "n2": {"failed": {}}, "n3": {"failed": {}}}
    assert list(doctor_checks.reach_problems(one)) == [
        "n1 cannot open a TCP connection to n3: timed out; is there a firewall?"
    ]


def test_clocks() -> None:
    assert list(doctor_checks.clock_problems({"n1": 0.1, "n2": 0.0, "n3": -4.0})) == ["the clock of n3 is 4.0 s behind"]
    assert list(doctor_checks.clock_problems({})) == []


def test_disks() -> None:
    good = {"free": 1 << 40, "write": 1e9, "read": 1e9}
    disks = {"n1": good, "n2": good | {"write": 1e6}, "n3": good | {"free": 1 << 20}, "n4": {"error": "EIO"}}
    problems = list(doctor_checks.disk_problems(disks))
    assert [problem.split()[0] for problem in problems] == ["n3", "n4", "n2"]


def test_gpus() -> None:
    idle = {"name": "H100", "memory": 80 << 30, "used": 4 << 20, "busy": 0}
    facts = {"n1": {"gpus": [idle, idle]}, "n2": {"gpus": [idle | {"used": 9 << 30}]}, "n3": {"gpus": None}}
    problems = list(doctor_checks.gpu_problems(facts, 2, False, idle=True))
    assert problems == [
        "n2 has 1 GPU(s), cluster.gpus_per_node is 2",
        "GPU 0 of n2 is in use: 9.0 GiB of its memory, 0 % of the time",
        "n3 has 0 GPU(s), cluster.gpus_per_node is 2",
    ]
    assert "n1 has 2 GPU(s): set cluster.gpus_per_node=2" in next(doctor_checks.gpu_problems(facts, None, False))
    assert list(doctor_checks.gpu_problems(facts, 0, False)) == []


def test_versions() -> None:
    facts = {name: {"python": "3.11.7", "packages": {"torch": "2.13.0" if name != "n3" else None}} for name in NODES}
    assert list(doctor_checks.version_problems(facts)) == ["n3 has torch -, most nodes have 2.13.0"]
