"""`dsft doctor` on real nodes: what is wrong with one of them is named, and nothing is said of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated import SCRIPT, Cluster
from test_slurm_training import write_inputs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
DSFT = (sys.executable, "-P", "-m", "launcher")
HOSTS = ("n1", "n2", "n3")


@pytest.fixture
def config(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config for three hosts over ssh."""
    path = write_inputs(tmp_path)
    value: dict[str, Any] = json.loads(path.read_text())
    value["cluster"] = {"backend": "ssh", "hosts": list(HOSTS)}
    path.write_text(json.dumps(value))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, text in cluster.environment.items():
        monkeypatch.setenv(name, text)
    return path


def doctor(config: Path, *options: str, code: int, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `dsft doctor --json` on the login node says."""
    command = [str(SCRIPT), "exec", "login", *prefix, *DSFT, "doctor", str(config), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tc(cluster: Cluster, node: str, *arguments: str) -> None:
    """Shape what a node sends."""
    cluster("exec", node, "tc", "qdisc", *arguments)


def test_healthy_nodes_are_told_apart_from_one_behind_a_slow_link(cluster: Cluster, config: Path) -> None:
    found = doctor(config, "--on", "n1,n3", code=0)
    assert list(found["nodes"]) == ["n1", "n3"]
    assert not found["problems"]
    for fact in found["nodes"].values():
        assert fact["packages"]["torch"]
        assert fact["disk"]["write"] > 0
        assert fact["disk"]["read"] > 0
        assert abs(fact["clock_offset"]) < 1
    assert found["network"]["all_reduce_bytes_per_second"] > 0
    assert {(pair["from"], pair["to"]) for pair in found["network"]["pairs"]} == {("n1", "n3"), ("n3", "n1")}

    tc(cluster, "n2", "add", "dev", "eth0", "root", "tbf", "rate", "80mbit", "burst", "64kb", "latency", "500ms")
    try:
        found = doctor(config, code=2)
    finally:
        tc(cluster, "n2", "del", "dev", "eth0", "root")
    (problem,) = found["problems"]
    assert problem.startswith("n2 is slow: it sends ")
    slow = [pair["bytes_per_second"] for pair in found["network"]["pairs"] if pair["from"] == "n2"]
    assert all(0.5 * 10e6 < speed < 1.5 * 10e6 for speed in slow)  # 80 Mbit/s
    assert found["seconds"] < 120


def test_a_node_with_other_versions_is_named(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """n3 alone finds another transformers first."""
    shadow = tmp_path / "shadow" / "transformers-4.0.0.dist-info"
    shadow.mkdir(parents=True)
    (shadow / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    setup = f'cluster.setup=["[ $(hostname) != n3 ] || export PYTHONPATH={shadow.parent}"]'
    found = doctor(config, "--set", setup, code=2)
    (problem,) = [text for text in found["problems"] if "slow" not in text]
    assert problem.startswith("n3 has transformers 4.0.0, most nodes have ")


def test_a_node_without_the_storage_and_one_behind_a_firewall_are_named(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mounted"
    output.mkdir()
    # n2's mount is missing: the folder is there, and empty
    cluster("exec", "n2", "mount", "-t", "tmpfs", "tmpfs", str(output))
    # n3 takes connections from the login node only
    cluster("exec", "n3", "ip", "route", "add", "blackhole", "10.77.0.11/32")
    try:
        found = doctor(config, "--set", f"output_dir={output}", code=2)
    finally:
        cluster("exec", "n2", "umount", str(output))
        cluster("exec", "n3", "ip", "route", "del", "blackhole", "10.77.0.11/32")
    problems = "\n".join(found["problems"])
    assert f"n2 does not see {output}" in problems
    assert "n1 cannot open a TCP connection to n3: timed out" in problems
    assert "n3 cannot open a TCP connection to n1" in problems
    assert "n1 does not see" not in problems


def test_through_srun(cluster: Cluster, config: Path) -> None:
    """With nodes of its own, then inside an allocation."""
    section = 'cluster={"backend": "slurm", "nodes": 2, "setup": ["export A=1"], "sbatch": {"wait-all-nodes": 1}}'
    found = doctor(config, "--set", section, "--on", "n2,n3", code=0)
    assert set(found["nodes"]) == {"n2", "n3"}
    assert found["network"]["pairs"]
    inside = doctor(config, "--set", section, code=0, prefix=("salloc", "--quiet", "--nodes=2"))
    assert len(inside["nodes"]) == 2
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_on_this_machine(cluster: Cluster, config: Path) -> None:
    found = doctor(config, "--set", 'cluster={"backend": "local"}', code=0)
    assert list(found["nodes"]) == ["login"]
    assert not found["network"]


def test_nothing_is_left_of_a_doctor_that_was_killed(cluster: Cluster, config: Path) -> None:
    command = [str(SCRIPT), "exec", "login", *DSFT, "doctor", str(config)]
    ours = "pgrep -f '[d]octor_probe|[t]rainer.probe|[l]auncher doctor' || true"

    def left() -> str:
        return "".join(cluster("exec", node, "sh", "-c", ours) for node in ("login", *HOSTS))

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        probing = ("exec", "n3", "sh", "-c", "pgrep -f '[t]rainer.probe' || true")
        cluster.wait(lambda: bool(cluster(*probing)), "the bandwidth test", 60)
        cluster("exec", "login", "pkill", "-KILL", "-f", "[l]auncher doctor")
        process.wait(10)
    cluster.wait(lambda: not left(), "nothing left", 10)
