"""Fewer nodes with the same global batch where no spare is left, and more again when they are back.

The real trainer on real nodes: the losses and weights of an undisturbed run, up to rounding.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, Cluster
from safetensors.numpy import load_file
from test_slurm_training import write_inputs

from trainer.processes import processes_of_run
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DSFT = (sys.executable, "-P", "-m", "launcher")
HOSTS = ["n1", "n2", "n3"]
LOCAL = 'cluster={"backend": "local", "processes_per_node": 3, "environment": {"OMP_NUM_THREADS": "1"}}'
# In fp32, with reductions in another order; the losses of these runs are about 2
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _variables(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write_config(folder: Path, backend: str, steps: int, **resilience: Any) -> Path:
    """Three nodes, or two at least."""
    path = write_inputs(folder)
    value: dict[str, Any] = json.loads(path.read_text())
    value["model"]["dtype"] = "float32"
    value["training"] |= {"max_steps": steps}
    value["training"]["optimizer"]["learning_rate"] = 1e-3
    value["checkpoint"] = {"interval_steps": 5}
    value["resilience"] = resilience
    where: dict[str, Any] = {"nodes": 3, "time": "1:00:00"} if backend == "slurm" else {"hosts": HOSTS}
    value["cluster"] = {"backend": backend, "min_nodes": 2, "environment": {"OMP_NUM_THREADS": "1"}, **where}
    path.write_text(json.dumps(value))
    return path


class Launched:
    """A run on the cluster, whichever the backend."""

    def __init__(self, cluster: Cluster, config: Path) -> None:
        self.cluster, self.run = cluster, RunDirectory(config.parent / "runs" / "words")
        self.job: str | None = None
        self.process: subprocess.Popen[str] | None = None
        if json.loads(config.read_text())["cluster"]["backend"] == "slurm":
            said = cluster.run(*DSFT, "launch", str(config), seconds=120).stdout
            self.job = re.findall(r"submitted job (\d+)", said)[0]
        else:
            command = [str(SCRIPT), "exec", "login", *DSFT, "launch", str(config)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
        self.cluster.wait(lambda: bool(condition()), what, seconds)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.merged_events() if event["event"] == kind]

    def steps_of(self, attempt: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that were written in an attempt."""
        begins = [float(event["time"]) for event in self.events("attempt")] + [math.inf]
        return [line for line in self.run.step_lines() if begins[attempt - 1] <= line["time"] < begins[attempt]]

    def end(self) -> None:
        """Cancel it, if it still runs, and wait."""
        subprocess.run([*DSFT, "cancel", str(self.run.path)], capture_output=True, timeout=60)
        if self.process is not None:
            self.process.communicate(timeout=60)
        else:
            self.cluster.wait_for_state(str(self.job), "COMPLETED", "FAILED", "CANCELLED")


def alone(config: Path, *overrides: str) -> RunDirectory:
    """The same on this machine, undisturbed, on as many ranks."""
    run = RunDirectory(config.parent / "alone" / "words")
    options = [part for item in (LOCAL, f"output_dir={run.path.parent}", *overrides) for part in ("--set", item)]
    done = subprocess.run([*DSFT, "launch", str(config), *options], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_losses(run: RunDirectory, other: RunDirectory) -> float:
    """One order of samples, and losses that differ by rounding; returns the largest relative difference."""
    lines, expected = run.step_lines(), other.step_lines()
    pairs = list(zip(lines, expected, strict=False))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [one["batch_digest"] for one, _ in pairs] == [two["batch_digest"] for _, two in pairs]
    worst = max(abs(one["loss"] / two["loss"] - 1) for one, two in pairs)
    assert worst < TOLERANCE
    return worst


def test_with_no_spare_left_a_job_goes_on_with_two_of_three_nodes(cluster: Cluster, tmp_path: Path) -> None:
    launched = Launched(cluster, write_config(tmp_path, "slurm", steps=60))
    run = launched.run
    launched.wait(lambda: len(run.published_checkpoints()) > 1, "checkpoints")
    cluster("kill", "n3")
    failed = time.time()
    try:
        cluster.wait_for_state(str(launched.job), "COMPLETED", "FAILED", seconds=200)
    finally:
        cluster("boot", "n3")
    log = (run.path / "job.log").read_text()
    assert cluster.state(str(launched.job)) == "COMPLETED", log
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", str(launched.job)).stdout
    first, second = run.verdicts()
    assert (first["class"], first["node"], second["outcome"]) == ("node", "n3", "finished")
    assert "2 of 3 nodes (2 ranks), the same global batch" in log
    plan = json.loads(run.plan_path.read_text())
    assert (plan["nodes"], plan["world_size"], plan["batch"]["micro_batches_per_rank"]) == (2, 2, 3)
    expected = alone(tmp_path / "config.json")
    assert len(run.step_lines()) == len(expected.step_lines()) == 60
    loss = assert_same_losses(run, expected)
    weights, others = (load_file(one.export_dir / "model.safetensors") for one in (run, expected))
    worst = max(float(abs(weights[name] - others[name]).max()) for name in others)
    assert worst < 1e-4
    began = next(e["time"] for e in launched.events("first_step") if e["attempt"] == 2)
    print(f"loss within {loss:.1e}, weights within {worst:.1e}; {began - failed:.1f} s from the loss to the next step")


@pytest.mark.matrix
@pytest.mark.parametrize("backend", ["ssh", "slurm"])
def test_a_node_that_is_back_is_taken_at_a_checkpoint(cluster: Cluster, tmp_path: Path, backend: str) -> None:
    """The cable of n3 is pulled for longer than the timeout, and put back."""
    config = write_config(tmp_path, backend, steps=4000)
    launched = Launched(cluster, config)
    run = launched.run
    try:
        launched.wait(lambda: len(run.published_checkpoints()) > 1, "checkpoints")
        cluster("linkdown", "n3")
        try:
            launched.wait(run.verdicts, "a verdict", 40)
        finally:
            cluster("linkup", "n3")
        launched.wait(lambda: len(launched.events("attempt")) == 2 and launched.steps_of(2), "two nodes")
        launched.wait(
            lambda: len(launched.events("attempt")) == 3 and len(launched.steps_of(3)) > 9, "three nodes", 240
        )
    finally:
        launched.end()
    failed, grown, stopped = run.verdicts()
    assert (failed["class"], failed["node"], failed["action"]) == ("node", "n3", "retry")
    assert (grown["outcome"], grown["action"]) == ("stopped", "retry")
    assert stopped["outcome"] == "stopped"
    assert [(e["attempt"], e["nodes"]) for e in launched.events("resized")] == [(2, 2), (3, 3)]
    # nothing was made twice for it
    assert launched.steps_of(3)[0]["step"] == launched.steps_of(2)[-1]["step"] + 1
    last = launched.run.step_lines()[-1]["step"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resilience": {}}))
    options = ["--set", f"output_dir={tmp_path / 'alone'}", "--set", LOCAL]
    reference = subprocess.Popen([*DSFT, "launch", str(config), *options], stdout=subprocess.DEVNULL)
    other = RunDirectory(tmp_path / "alone" / "words")
    launched.wait(lambda: other.step_lines() and other.step_lines()[-1]["step"] >= last, "the undisturbed run", 300)
    subprocess.run([*DSFT, "cancel", str(other.path)], check=True, capture_output=True, timeout=60)
    reference.wait(60)
    worst = assert_same_losses(run, other)
    away = next(e["time"] for e in launched.events("attempt") if e["attempt"] == 3) - failed["time"]
    print(f"{backend}: back after {away:.0f} s; {last} steps, losses within {worst:.1e}")


@pytest.mark.matrix
def test_a_slow_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    """A fifth of a processor for the rank on n3: named after three probes, a minute each, and left out for good."""
    told = tmp_path / "told"
    drain = tmp_path / "drain.sh"
    drain.write_text(f'#!/bin/sh\necho "$DSFT_EVENT $DSFT_NODE" >> {told}\n')
    drain.chmod(0o755)
    hook = {"command": [str(drain)], "events": ["bad_node"]}
    launched = Launched(cluster, write_config(tmp_path, "ssh", 40000, exclude_stragglers=True, notify=[hook]))
    run = launched.run
    group = Path("/sys/fs/cgroup/cpu/dsft-slow")
    try:
        launched.wait(run.step_lines, "a step")
        slow = [
            pid
            for pid in processes_of_run(run.path)
            if b"RANK=2" in environment(pid) and b"LINK" not in environment(pid)
        ]
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("10000")
        (group / "cpu.cfs_quota_us").write_text("2000")
        for pid in slow:
            (group / "cgroup.procs").write_text(str(pid))
        launched.wait(lambda: len(launched.events("attempt")) == 2 and launched.steps_of(2), "two nodes", 400)
    finally:
        launched.end()
        if group.exists():
            group.rmdir()
    first = run.verdicts()[0]
    assert (first["class"], first["node"], first["rank"], first["action"]) == ("node", "n3", 2, "retry")
    assert first["message"].startswith("straggler: rank 2 took ")
    assert launched.steps_of(2)[0]["step"] == launched.steps_of(1)[-1]["step"] + 1  # saved before
    (bad,) = launched.events("bad_node")
    assert (bad["node"], bad["why"], bad["hours"]) == ("n3", first["message"], 24.0)
    assert told.read_text() == "bad_node n3\n"
    pace = [sum(line["step_seconds"] for line in launched.steps_of(n)[5:15]) / 10 for n in (1, 2)]
    print(f"{first['message']}; a step took {pace[0]:.3f} s, then {pace[1]:.3f} s")


def environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
