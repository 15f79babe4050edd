"""Which nodes an attempt gets, what is held against them, and when a restart with more of them pays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from config_samples import runnable

import launcher.membership as membership_module
from launcher.backends.ssh import SshBackend
from launcher.facts import gather_facts
from launcher.membership import Membership
from launcher.nodes import NodePool, bad_nodes
from launcher.plan import make_plan
from launcher.sizes import shortfall, smaller_plans, worth_growing
from trainer.config.loading import load_config
from trainer.config.model import DeepSpeedConfig
from trainer.config.schema import SlurmCluster, SshCluster
from trainer.failures import UserError
from trainer.rundir import RunDirectory, append_line

FOUR = ["a", "b", "c", "d"]
DAY = 24 * 3600.0


def pool(*sizes: int, away: str = "", ruled_out: str = "") -> NodePool:
    made = NodePool(sizes)
    for node in away:
        made.lose(node)
    for node in ruled_out:
        made.lose(node, "it is slow")
    return made


@pytest.mark.parametrize(
    ("made", "there", "chosen"),
    [
        (pool(3), FOUR, "abc"),
        (pool(3, away="b"), FOUR, "acd"),  # the spare
        (pool(3, away="b"), FOUR[:3], "abc"),  # no other: one loss may have been its network's
        (pool(2, 3, away="b"), FOUR[:3], "ac"),
        (pool(2, 3, away="abb"), FOUR[:3], "ac"),  # of those that are away, the one that failed less
        (pool(2, 4), FOUR[:3], "ab"),  # three are no size of this run
        (pool(3), FOUR[:2], ""),
    ],
)
def test_nodes_of_an_attempt(made: NodePool, there: list[str], chosen: str) -> None:
    assert "".join(made.choose(there)) == chosen


def test_a_node_comes_back_once() -> None:
    made = pool(2, 3, away="b", ruled_out="c")
    assert made.news() == [("c", "it is slow")]
    assert made.returning(FOUR) == ["b"]
    made.back(["b", "c"])
    assert made.choose(FOUR) == ["a", "b", "d"]
    made.lose("b")
    assert made.news() == [("b", "")]
    assert made.returning(FOUR) == []
    assert made.choose(FOUR[:3]) == ["a", "b"]  # two of three are out: the less bad one, rather than nothing


def test_the_ledger_forgets_after_a_while_and_leaves_drills_out() -> None:
    def failure(time: float, node: str, failure_class: str = "node") -> dict[str, Any]:
        return {"event": "failure", "time": time, "node": node, "class": failure_class}

    events = [failure(0.0, "n1"), failure(5000.0, "n2"), failure(5000.0, "n3", "numeric"), {"event": "x", "time": 1.0}]
    events += [{"event": "bad_node", "time": 4000.0, "node": "n5", "why": "slow"}]
    events += [{"event": "drill", "time": 4999.0, "attempt": 7}, failure(5000.0, "n4") | {"attempt": 7}]
    assert bad_nodes(events, 6000.0, 24.0) == ["n1", "n2", "n5"]
    assert bad_nodes(events, DAY + 1000.0, 24.0) == ["n2", "n5"]
    assert bad_nodes(events, 6000.0, hours=0.5) == ["n2"]
    remembered = NodePool((2, 3))
    remembered.remember(events, 6000.0, 24.0)
    assert remembered.choose(["n1", "n2", "n5"]) == ["n1", "n2"]
    assert remembered.choose(["n1", "n2", "n5", "n6"]) == ["n1", "n2", "n6"]


def test_fewer_nodes_have_a_plan_of_their_own_with_the_same_global_batch(tmp_path: Path) -> None:
    cluster = {"backend": "slurm", "nodes": 6, "min_nodes": 2, "processes_per_node": 2}
    training = {"global_batch_size": 24, "micro_batch_size": 2, "max_steps": 10}
    config = load_config(runnable(tmp_path, cluster=cluster, training=training))
    facts = gather_facts(config)
    plans = smaller_plans(config, facts, make_plan(config, facts).batch.micro_batch_size, 3)
    assert sorted(plans) == [2, 3, 4, 5]
    assert {nodes: (p.world_size, p.batch.micro_batches_per_rank) for nodes, p in plans.items()} == {
        5: (10, 2),
        4: (8, 2),
        3: (6, 2),
        2: (4, 3),
    }
    assert {plan.batch.global_batch for plan in plans.values()} == {24}
    config = config.model_copy(update={"deepspeed": DeepSpeedConfig(zero_stage="auto")})
    kept = smaller_plans(config, facts, 2, 2)  # as the full one has it, whatever would be chosen for so few
    assert {plan.deepspeed["zero_optimization"]["stage"] for plan in kept.values()} == {2}
    assert shortfall(config, [2, 3, 6]) is None
    assert "fewer than 3 nodes" in (shortfall(config, [3, 4, 5, 6]) or "")


def test_min_nodes_are_at_most_all() -> None:
    with pytest.raises((UserError, ValueError), match="give at most 2"):
        SlurmCluster(backend="slurm", nodes=2, min_nodes=3)


def test_a_restart_with_more_nodes_has_to_gain_twice_what_it_costs() -> None:
    plans = {nodes: {"batch": {"micro_batches_per_rank": 12 // nodes}} for nodes in (2, 3, 4)}
    assert worth_growing(plans, 2, 3, seconds_left=3600.0, restart_seconds=60.0)
    # a third of the rest is saved: 120 s of 360 s are twice a restart, of which 60 s come off first
    assert not worth_growing(plans, 2, 3, seconds_left=419.0, restart_seconds=60.0)
    assert worth_growing(plans, 2, 3, seconds_left=421.0, restart_seconds=60.0)
    assert not worth_growing(plans, 2, 3, seconds_left=1e9, restart_seconds=float("inf"))
    # steps that do not get shorter are no reason
    same = {nodes: {"batch": {"micro_batches_per_rank": 2}} for nodes in (2, 3)}
    assert not worth_growing(same, 2, 3, seconds_left=1e9, restart_seconds=1.0)


@pytest.mark.parametrize(
    ("spares", "least", "ratio", "better"),
    [
        (1, 3, 1.6, True),  # the spare takes its place
        (0, 4, 9.0, False),  # fewer are not allowed
        (0, 3, 1.6, True),  # three ranks with four micro-batches each instead of four that wait for the slow one
        (0, 3, 1.3, False),
    ],
)
def test_a_slow_node_is_left_out_only_where_that_pays(
    tmp_path: Path, spares: int, least: int, ratio: float, better: bool
) -> None:
    membership = membership_of(RunDirectory(tmp_path), spares, least)
    membership.take(4 - spares)
    assert membership.does_better_without("b", ratio) is better


def membership_of(run: RunDirectory, spares: int, least: int) -> Membership:
    cluster = SshCluster(backend="ssh", hosts=FOUR, spare_nodes=spares, min_nodes=min(least, 4 - spares))
    plans = {nodes: {"nodes": nodes, "batch": {"micro_batches_per_rank": 12 // nodes}} for nodes in (3, 4)}
    plans = {nodes: plan for nodes, plan in plans.items() if cluster.fewest_nodes <= nodes <= cluster.nodes}
    backend = SshBackend(run, cluster, 1, {}, "127.0.0.1", pool=NodePool(sorted(plans)))
    return Membership(run, backend, plans)


def test_a_node_that_was_away_without_being_lost_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that an admin has drained, and gives back."""
    monkeypatch.setattr(membership_module, "_LOOK_SECONDS", 0.05)
    run = RunDirectory(tmp_path)
    membership = membership_of(run, 0, 3)
    membership.take(3)
    run.event_writer("rank0").write("first_step", attempt=1)
    membership.begin(1)
    try:
        deadline, step = time.monotonic() + 20, 0
        while not membership.wants_more and time.monotonic() < deadline:
            step += 1
            append_line(run.metrics_path, {"step": step, "loss": 1.0, "step_seconds": 1.0, "total_steps": 10**6})
            time.sleep(0.05)
        assert membership.wants_more
    finally:
        membership.end()
