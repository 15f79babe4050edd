"""Fewer nodes with the same global batch where no spare is left, more again when they are back, none that is slow.

The real trainer on a real cluster: the losses and weights of an undisturbed run, up to rounding.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from launched import (
    HOSTS,
    Launched,
    assert_nothing_left,
    changed,
    compare,
    control_group,
    longer_steps,
    ranks_of,
    set_variables,
    undisturbed,
    write_config,
)
from simulated import Cluster

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True)
def _variables(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(cluster, tmp_path, monkeypatch)


@pytest.mark.parametrize("backend", ["slurm", pytest.param("ssh", marks=pytest.mark.matrix)])
def test_with_no_spare_left_a_run_goes_on_with_two_of_three_nodes(
    cluster: Cluster, tmp_path: Path, backend: str
) -> None:
    config = write_config(tmp_path, backend, steps=60, min_nodes=2)
    launched = Launched(cluster, config)
    run = launched.run
    try:
        launched.wait_for_checkpoints()
        cluster("kill", "n3")
        failed = time.time()
        try:
            launched.finish(200)
        finally:
            cluster("boot", "n3")
    finally:
        launched.end()
    assert backend == "ssh" or launched.requeues() == 0
    first, second = run.verdicts()
    assert (first["class"], first["node"], first["action"]) == ("node", "n3", "retry")
    assert (second["outcome"], launched.nodes_of(2)) == ("finished", {"n1", "n2"})
    if backend == "slurm":
        assert "2 of 3 nodes (2 ranks), the same global batch" in (run.path / "job.log").read_text()
    plan = json.loads(run.plan_path.read_text())
    assert (plan["nodes"], plan["world_size"], plan["batch"]["micro_batches_per_rank"]) == (2, 2, 3)
    loss, weights = compare(run, undisturbed(config))
    assert_nothing_left(cluster)
    began = (launched.first_step(2) or {})["time"]
    print(f"{backend}: loss within {loss:.1e}, weights within {weights:.1e}; {began - failed:.1f} s to the next step")


@pytest.mark.matrix
@pytest.mark.parametrize("backend", ["slurm", "ssh"])
def test_a_node_that_is_back_is_taken_at_a_checkpoint(cluster: Cluster, tmp_path: Path, backend: str) -> None:
    """The cable of n3 is pulled for longer than the timeout, and put back: three nodes, two, three."""
    config = longer_steps(write_config(tmp_path, backend, steps=450, min_nodes=2))
    launched = Launched(cluster, config)
    run = launched.run
    try:
        launched.wait_for_checkpoints()
        cluster("linkdown", "n3")
        try:
            launched.wait(run.verdicts, "a verdict", 40)
        finally:
            cluster("linkup", "n3")
        launched.finish(900)
    finally:
        launched.end()
    failed, grown, finished = run.verdicts()
    assert (failed["class"], failed["node"], failed["action"]) == ("node", "n3", "retry")
    assert (grown["outcome"], grown["action"], grown["reason"]) == ("stopped", "retry", "nodes that were lost are back")
    assert finished["outcome"] == "finished"
    assert [(e["attempt"], e["nodes"]) for e in launched.events("resized")] == [(2, 2), (3, 3)]
    assert [launched.nodes_of(attempt) for attempt in (1, 2, 3)] == [{*HOSTS}, {"n1", "n2"}, {*HOSTS}]
    assert backend == "ssh" or launched.requeues() == 0
    # nothing was made twice for it
    assert launched.steps_of(3)[0]["step"] == launched.steps_of(2)[-1]["step"] + 1
    loss, weights = compare(run, undisturbed(config))
    assert_nothing_left(cluster)
    steps = [len(launched.steps_of(attempt)) for attempt in (1, 2, 3)]
    again = (launched.first_step(3) or {})["time"] - grown["time"]
    print(f"{backend}: {steps} steps on 3, 2, 3 nodes; loss within {loss:.1e}, weights within {weights:.1e}; ", end="")
    print(f"{again:.1f} s from the last step on two nodes to the first on three")


@pytest.mark.matrix
def test_a_slow_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """A fifth of a processor for the rank on n3: named after three probes, a minute each, and left out for good."""
    told = tmp_path / "told"
    drain = tmp_path / "drain.sh"
    drain.write_text(f'#!/bin/sh\necho "$DSFT_EVENT $DSFT_NODE" >> {told}\n')
    drain.chmod(0o755)
    hook = {"command": [str(drain)], "events": ["bad_node"]}
    resilience = {"exclude_stragglers": True, "notify": [hook]}
    config = longer_steps(write_config(tmp_path, "slurm", 300, resilience, min_nodes=2))
    launched = Launched(cluster, config)
    run = launched.run
    with control_group("cpu", cfs_period_us="10000", cfs_quota_us="2000") as processes:
        launched.wait(run.step_lines, "a step")
        for pid in ranks_of(run, 2):
            processes.write_text(str(pid))
        launched.wait(lambda: len(launched.events("attempt")) == 2, "another attempt", 400)
        launched.finish(600)
    first, second = run.verdicts()
    assert (first["class"], first["node"], first["rank"], first["action"]) == ("node", "n3", 2, "retry")
    assert first["message"].startswith("straggler: rank 2 took ")
    assert (second["outcome"], launched.nodes_of(2)) == ("finished", {"n1", "n2"})
    assert launched.requeues() == 0
    assert launched.steps_of(2)[0]["step"] == launched.steps_of(1)[-1]["step"] + 1  # saved before
    (bad,) = launched.events("bad_node")
    assert (bad["node"], bad["why"], bad["hours"]) == ("n3", first["message"], 24.0)
    assert told.read_text() == "bad_node n3\n"
    loss, weights = compare(run, undisturbed(changed(config, resilience={"notify": []})))
    assert_nothing_left(cluster)
    pace = [sum(line["step_seconds"] for line in launched.steps_of(n)[20:60]) / 40 for n in (1, 2)]
    print(
        f"{first['message']}; {len(launched.steps_of(1))} steps of {pace[0]:.3f} s, then {pace[1]:.3f} s without it; "
    )
    print(f"loss within {loss:.1e}, weights within {weights:.1e}")
