"""Real runs of `dsft launch` on the test cluster, over SLURM or SSH, and what they are compared with."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from simulated import SCRIPT, Cluster
from test_slurm_training import write_inputs

from trainer.processes import processes_of_run
from trainer.rundir import RunDirectory

ROOT = Path(__file__).parents[2]
DSFT = (sys.executable, "-P", "-m", "launcher")
HOSTS = ("n1", "n2", "n3")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
OURS = "[t]rainer.agent|[t]rainer.worker|[b]ackends.node|[l]auncher launch"
# In fp32, with reductions in another order; the losses of these runs are about 2 and more
TOLERANCE = 1e-4


def set_variables(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dsft` needs here to find this checkout and the cluster."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))


def write_config(
    folder: Path, backend: str, steps: int, resilience: dict[str, Any] | None = None, **where: Any
) -> Path:
    """A run in fp32 on three nodes; `where`: further keys of its section `cluster`."""
    path = write_inputs(folder)
    value: dict[str, Any] = json.loads(path.read_text())
    value["model"]["dtype"] = "float32"
    value["training"] |= {"max_steps": steps}
    value["training"]["optimizer"]["learning_rate"] = 1e-3
    value["checkpoint"] = {"interval_steps": 5}
    value["resilience"] = resilience or {}
    nodes: dict[str, Any] = {"nodes": 3, "time": "1:00:00"} if backend == "slurm" else {"hosts": HOSTS}
    value["cluster"] = {"backend": backend, "environment": ENVIRONMENT, **nodes, **where}
    path.write_text(json.dumps(value))
    return path


def changed(config: Path, **sections: dict[str, Any]) -> Path:
    """The config with keys of its sections replaced, and those of a section within a section."""
    value = json.loads(config.read_text())
    for name, keys in sections.items():
        for key, new in keys.items():
            old = value[name].get(key)
            value[name][key] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
    config.write_text(json.dumps(value))
    return config


def longer_steps(config: Path) -> Path:
    """With steps of some tenths of a second, and a loss that sinks slowly over hundreds of them."""
    model = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "max_position_embeddings": 96}
    training = {"optimizer": {"learning_rate": 1e-4}}
    return changed(config, model={"config": model}, data={"sequence_length": 96}, training=training)


class Launched:
    """A run on the cluster, whichever the backend."""

    def __init__(self, cluster: Cluster, config: Path) -> None:
        self.cluster, self.run = cluster, RunDirectory(config.parent / "runs" / "words")
        self.job = ""
        self.process: subprocess.Popen[str] | None = None
        if json.loads(config.read_text())["cluster"]["backend"] == "slurm":
            said = cluster.run(*DSFT, "launch", str(config), seconds=120).stdout
            self.job = re.findall(r"submitted job (\d+)", said)[0]
        else:
            command = [str(SCRIPT), "exec", "login", *DSFT, "launch", str(config)]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
        self.cluster.wait(lambda: bool(condition()), what, seconds)

    def wait_for_checkpoints(self) -> None:
        self.wait(lambda: len(self.run.published_checkpoints()) > 1, "checkpoints")

    def finish(self, seconds: float = 300) -> None:
        """Wait for its end, which is a good one."""
        if self.process is not None:
            output, _ = self.process.communicate(timeout=seconds)
            assert self.process.returncode == 0, output
        else:
            self.cluster.wait_for_state(self.job, "COMPLETED", "FAILED", seconds=seconds)
            assert self.cluster.state(self.job) == "COMPLETED", (self.run.path / "job.log").read_text()
        assert self.run.verdicts()[-1]["outcome"] == "finished"

    def end(self) -> None:
        """Leave nothing of it, whatever has become of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def requeues(self) -> int:
        """How often SLURM has started the job again."""
        return int(re.findall(r"Restarts=(\d+)", self.cluster.run("scontrol", "show", "job", self.job).stdout)[0])

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.merged_events() if event["event"] == kind]

    def first_step(self, attempt: int) -> dict[str, Any] | None:
        return next((event for event in self.events("first_step") if event["attempt"] == attempt), None)

    def steps_of(self, attempt: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that were written in an attempt."""
        begins = [float(event["time"]) for event in self.events("attempt")] + [math.inf]
        return [line for line in self.run.step_lines() if begins[attempt - 1] <= line["time"] < begins[attempt]]

    def nodes_of(self, attempt: int) -> set[str]:
        return {path.name for path in (self.run.attempt_dir(attempt) / "logs").iterdir()}


def undisturbed(config: Path, ranks: int = 3) -> RunDirectory:
    """The same on this machine, from beginning to end, with so many ranks."""
    run = RunDirectory(config.parent / f"undisturbed{ranks}" / "words")
    local = {"backend": "local", "processes_per_node": ranks, "environment": ENVIRONMENT}
    sets = (f"cluster={json.dumps(local)}", f"output_dir={run.path.parent}")
    options = [part for item in sets for part in ("--set", item)]
    done = subprocess.run([*DSFT, "launch", str(config), *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return run


def compare(run: RunDirectory, other: RunDirectory) -> tuple[float, float]:
    """The largest differences of a step's loss (relative) and of a weight of the export (absolute).

    Asserts that every step has the same samples in the same order, and that the differences are roundings.
    """
    lines, expected = run.step_lines(), other.step_lines()
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    assert [line["batch_digest"] for line in lines] == [line["batch_digest"] for line in expected]
    assert [line["target_tokens"] for line in lines] == [line["target_tokens"] for line in expected]
    loss = max(abs(one["loss"] / two["loss"] - 1) for one, two in zip(lines, expected, strict=True))
    weights, others = (load_file(one.export_dir / "model.safetensors") for one in (run, other))
    assert weights.keys() == others.keys()
    worst = max(float(abs(weights[name] - others[name]).max()) for name in others)
    assert loss < TOLERANCE
    assert worst < TOLERANCE
    return loss, worst


def assert_nothing_left(cluster: Cluster, nodes: tuple[str, ...] = ("login", *HOSTS), seconds: float = 30) -> None:
    """No process of dsft's on any of the nodes."""
    for node in nodes:
        command = ("exec", node, "sh", "-c", f"pgrep -af '{OURS}' || true")
        cluster.wait(lambda command=command: not cluster(*command), f"nothing left on {node}", seconds)  # type: ignore[misc]


def ranks_of(run: RunDirectory, rank: int) -> list[int]:
    """Processes of a rank as this machine sees them, for they may be on any node of the cluster."""
    found = []
    for pid in processes_of_run(run.path):
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


@contextlib.contextmanager
def control_group(kind: str, **limits: str) -> Iterator[Path]:
    """A control group of this machine; its file of processes. Skips where none can be made.

    kind: `memory` or `cpu`; limits: version 1's names without the kind -> value.
    """
    base = Path("/sys/fs/cgroup") / kind
    group = base / "dsft-drill"
    if not base.is_dir():
        pytest.skip("no control groups of version 1 here")
    try:
        group.mkdir(exist_ok=True)
    except OSError as error:
        pytest.skip(f"no control groups here: {error}")
    try:
        for name, value in limits.items():
            (group / f"{kind}.{name}").write_text(value)
        yield group / "cgroup.procs"
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (base / "cgroup.procs").write_text(pid)
        group.rmdir()
