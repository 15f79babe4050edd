"""Every fault that a cluster can have, under the real trainer: its class, what follows, how soon, and the same weights.

`pytest -m matrix -s tests/cluster/test_fault_matrix.py` prints a row of docs/failures.md for each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launched import (
    Launched,
    assert_nothing_left,
    compare,
    control_group,
    ranks_of,
    set_variables,
    undisturbed,
    write_config,
)
from simulated import Cluster

from launcher.backends.links import LOST_SECONDS
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 120
Inject = Callable[[Launched], AbstractContextManager[None]]
# The kernel's word for a GPU that is gone, in the format of /dev/kmsg and later than anything
XID = "4,1,9000000000000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, name=python, GPU has fallen off the bus."


@pytest.fixture(autouse=True)
def _variables(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(cluster, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def references(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], RunDirectory]:
    """Number of ranks -> the undisturbed run."""
    made: dict[int, RunDirectory] = {}
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder, "slurm", STEPS)

    def of(ranks: int) -> RunDirectory:
        if ranks not in made:
            made[ranks] = undisturbed(config, ranks)
        return made[ranks]

    return of


def signal_to(process: str, node: str = "n2", name: str = "KILL") -> Inject:
    """A signal to what a node runs of dsft."""

    @contextlib.contextmanager
    def inject(launched: Launched) -> Iterator[None]:
        launched.cluster("exec", node, "pkill", f"-{name}", "-f", process)
        yield

    return inject


def power(node: str) -> Inject:
    @contextlib.contextmanager
    def inject(launched: Launched) -> Iterator[None]:
        launched.cluster("kill", node)
        try:
            yield
        finally:
            launched.cluster("boot", node)

    return inject


def cable(node: str, seconds: float | None = None) -> Inject:
    """Pulled for so long, or until the end."""

    @contextlib.contextmanager
    def inject(launched: Launched) -> Iterator[None]:
        launched.cluster("linkdown", node)
        try:
            if seconds is None:
                yield
            else:
                time.sleep(seconds)
        finally:
            launched.cluster("linkup", node)
        if seconds is not None:
            yield

    return inject


@contextlib.contextmanager
def memory_limit(launched: Launched) -> Iterator[None]:
    """What the rank on n2 takes from now on is more than its control group has."""
    with control_group("memory", limit_in_bytes="64K") as processes:
        for pid in ranks_of(launched.run, 1):
            processes.write_text(str(pid))
        yield


@contextlib.contextmanager
def every_time(launched: Launched) -> Iterator[None]:
    """n2 fails in both attempts of the allocation."""
    with signal_to("[b]ackends.node")(launched):
        launched.wait(lambda: launched.first_step(2), "another attempt")
        with signal_to("[b]ackends.node")(launched):
            yield


@contextlib.contextmanager
def broken_gpu(launched: Launched) -> Iterator[None]:
    """A rank stands still, and the kernel of its node says why."""
    log = launched.run.path / "kmsg"
    log.write_text(XID + "\n")
    launched.cluster("exec", "n2", "mount", "--bind", str(log), "/dev/kmsg")
    try:
        with signal_to("[t]rainer.worker --run-dir", name="STOP")(launched):
            yield
    finally:
        launched.cluster("exec", "n2", "umount", "/dev/kmsg")


@dataclass(frozen=True)
class Fault:
    """`verdicts`: (class, node, action) of the attempts that fail; `nodes`: those of the last attempt."""

    name: str
    inject: Inject
    verdicts: tuple[tuple[str, str, str], ...] = ()
    nodes: str = "n1 n2 n3"
    backend: str = "slurm"
    detection: float | None = 5.0  # seconds; None: nobody is there to detect it but the scheduler
    inside: bool = True  # the allocation
    where: dict[str, Any] = field(default_factory=dict)
    resilience: dict[str, Any] = field(default_factory=dict)


PAIR: dict[str, Any] = {"nodes": 2}
SPARE: dict[str, Any] = {"nodes": 2, "spare_nodes": 1}
LOST = ("node", "n2", "retry")
FAULTS = [
    Fault("SIGKILL of a rank", signal_to("[t]rainer.worker --run-dir"), (("unknown", "n2", "retry"),)),
    Fault("SIGKILL of an agent", signal_to("[t]rainer.agent"), (LOST,)),
    Fault(
        "SIGKILL of the supervisor",
        signal_to("[l]auncher launch", "n1"),
        (("node", "", "retry"),),
        detection=None,
        inside=False,
    ),
    Fault("power of a node, a spare", power("n2"), (LOST,), "n1 n3", where=SPARE),
    Fault("power of the head node", power("n1"), (("node", "", "retry"),), "n2 n3", "slurm", None, False, PAIR),
    Fault("network cut of 2.5 s", cable("n2", LOST_SECONDS / 2)),
    Fault("network cut, a spare", cable("n2"), (LOST,), "n1 n3", where=SPARE),
    Fault(
        "SIGSTOP of a rank",
        signal_to("[t]rainer.worker --run-dir", name="STOP"),
        (("hang", "n2", "retry"),),
        detection=1.5 * 60,
    ),
    Fault(
        "SIGSTOP of a rank, Xid 79",
        broken_gpu,
        (LOST,),
        "n1 n3",
        detection=1.5 * 20,
        where=SPARE,
        resilience={"hang_timeout_seconds": 20.0},
    ),
    Fault("out of memory", memory_limit, (("out_of_memory", "n2", "retry"),)),
    Fault(
        "a node that fails every time",
        every_time,
        (LOST, ("node", "n2", "stop")),
        "n1 n3",
        inside=False,
        where=PAIR,
    ),
    Fault("SIGKILL of a rank", signal_to("[t]rainer.worker --run-dir"), (("unknown", "n2", "retry"),), backend="ssh"),
    Fault("power of a node, a spare", power("n2"), (LOST,), "n1 n3", "ssh", where={"spare_nodes": 1}),
    Fault("network cut, a spare", cable("n2"), (LOST,), "n1 n3", "ssh", where={"spare_nodes": 1}),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.backend}: {fault.name}")
def test_a_fault_is_named_and_made_good(
    cluster: Cluster, tmp_path: Path, references: Callable[[int], RunDirectory], fault: Fault
) -> None:
    config = write_config(tmp_path, fault.backend, STEPS, fault.resilience, **fault.where)
    launched = Launched(cluster, config)
    run = launched.run
    try:
        launched.wait_for_checkpoints()
        began = time.time()
        with fault.inject(launched):
            launched.finish()
    finally:
        launched.end()
    assert_nothing_left(cluster)
    *failed, finished = run.verdicts()
    assert [(v["class"], v["node"] or "", v["action"]) for v in failed] == list(fault.verdicts), failed
    nodes = set(fault.nodes.split())
    assert launched.nodes_of(finished["attempt"]) == nodes
    if fault.backend == "slurm":
        assert launched.requeues() == (0 if fault.inside else 1)
    loss, weights = compare(run, references(len(nodes)))

    cold = launched.first_step(1)["time"] - min(e["started"] for e in launched.events("launched"))  # type: ignore[index]
    times = [f"cold start {cold:.1f} s"]
    if fault.verdicts and fault.detection is not None:
        noticed = launched.events("failure")[0]["noticed"]
        found, again = noticed - began, launched.first_step(2)["time"] - noticed  # type: ignore[index]
        times = [f"found after {found:.1f} s", f"next step {again:.1f} s later", *times]
    classes = ", ".join(f"{v['class']} ({v['node']}, {v['action']})" for v in failed) or "survived"
    print(f"| {fault.backend} | {fault.name} | {classes} | {', '.join(times)} | {loss:.0e} | {weights:.0e} |")
    if fault.verdicts and fault.detection is not None:
        assert found <= fault.detection
        assert again <= 1.5 * cold
