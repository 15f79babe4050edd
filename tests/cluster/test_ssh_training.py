"""`dsft launch` over ssh on three hosts: one machine's losses, and nothing left behind whatever ends it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simulated import SCRIPT, Cluster
from test_slurm_training import exported, write_inputs

from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
DSFT = (sys.executable, "-P", "-m", "launcher")
HOSTS = ("n1", "n2", "n3")
HOSTILE = " a,b 'c' \"d\" $(id) `id` ${HOME} \\n \t#!\r\n;& ü漢\u200b\x1b[0m %j *"
OURS = "[t]rainer.agent|[t]rainer.worker|[b]ackends.node|[d]octor_probe"


@pytest.fixture
def config(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config for three hosts; long, unless a test sets `training.max_steps`."""
    path = write_inputs(tmp_path)
    value: dict[str, Any] = json.loads(path.read_text())
    value["training"]["max_steps"] = 4000
    value["checkpoint"] = {"interval_steps": 5}
    environment = {"OMP_NUM_THREADS": "1"}
    value["cluster"] = {"backend": "ssh", "hosts": list(HOSTS), "environment": environment}
    path.write_text(json.dumps(value))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name, text in cluster.environment.items():
        monkeypatch.setenv(name, text)
    return path


@pytest.fixture(autouse=True)
def _nothing_left(cluster: Cluster) -> Iterator[None]:
    yield
    for host in ("login", *HOSTS):
        cluster.wait(lambda host=host: not left(cluster, host), f"nothing left on {host}", 30)  # type: ignore[misc]


def left(cluster: Cluster, host: str) -> str:
    """dsft's processes on a host."""
    return cluster("exec", host, "sh", "-c", f"pgrep -af '{OURS}' || true")


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """`dsft launch` on the login node, in the background."""
    options = [part for item in overrides for part in ("--set", item)]
    command = [str(SCRIPT), "exec", "login", *DSFT, "launch", str(config), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launcher_pid(cluster: Cluster) -> str:
    """The launcher's pid inside the login node."""
    return cluster("exec", "login", "pgrep", "-f", "[l]auncher launch").split()[0]


def steps(cluster: Cluster, run: RunDirectory, count: int) -> None:
    cluster.wait(lambda: len(run.step_lines()) >= count, f"step {count}", 90)


def test_three_hosts_end_where_one_machine_does(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    over_ssh = launch(config, "training.max_steps=10", "cluster.setup=[\"export FROM_SETUP='a b'\"]")
    out, errors = over_ssh.communicate(timeout=200)
    assert over_ssh.returncode == 0, errors + out
    run, alone = RunDirectory(tmp_path / "runs" / "words"), RunDirectory(tmp_path / "alone" / "words")
    local = 'cluster={"backend": "local", "processes_per_node": 3}'
    sets = ["--set", "training.max_steps=10", "--set", f"output_dir={alone.path.parent}", "--set", local]
    # the whole section is replaced: a profile would do the same
    cluster.run(*DSFT, "launch", str(config), *sets, seconds=200, PYTHONPATH=str(ROOT))
    assert [line["loss"] for line in run.step_lines()] == [line["loss"] for line in alone.step_lines()]
    assert len(run.step_lines()) == 10
    assert exported(run) == exported(alone) != {}
    assert {report["node"] for report in run.agent_reports(1)} == set(HOSTS)


@pytest.mark.faults
def test_a_killed_rank_is_restarted(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    launched = launch(config, "training.max_steps=40")
    run = RunDirectory(tmp_path / "runs" / "words")
    cluster.wait(lambda: len(run.published_checkpoints()) > 0, "a checkpoint", 90)
    cluster("exec", "n2", "pkill", "-KILL", "-f", "[t]rainer.worker --run-dir")
    out, errors = launched.communicate(timeout=200)
    assert launched.returncode == 0, errors + out
    first, second = run.verdicts()
    assert (first["outcome"], first["rank"], first["node"], first["action"]) == ("failed", 1, "n2", "retry")
    assert "SIGKILL" in first["message"]
    assert second["outcome"] == "finished"
    assert [line["step"] for line in run.step_lines()] == list(range(1, 41))


def test_an_interrupt_saves_and_ends_everywhere(
    cluster: Cluster, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSED_TOKEN", "s3cret")
    cluster_section = json.loads(config.read_text())["cluster"]
    cluster_section |= {
        "pass_environment": ["PASSED_TOKEN"],
        "environment": {"OMP_NUM_THREADS": "1", "HOSTILE": HOSTILE},
    }
    cluster_section["setup"] = ["# a comment", 'export FROM_SETUP="it\'s" # another']
    launched = launch(config, f"cluster={json.dumps(cluster_section)}")
    run = RunDirectory(tmp_path / "runs" / "words")
    steps(cluster, run, 3)
    for host in HOSTS:  # what the ranks have
        text = cluster("exec", host, "sh", "-c", "cat /proc/$(pgrep -f '[t]rainer.worker --run-dir')/environ")
        variables = dict(item.partition("=")[::2] for item in text.split("\0"))
        assert (variables["HOSTILE"], variables["PASSED_TOKEN"]) == (HOSTILE.replace("\r\n", "\n"), "s3cret")
        assert (variables["FROM_SETUP"], variables["GLOO_SOCKET_IFNAME"]) == ("it's", "eth0")
        assert variables["MASTER_ADDR"] == "10.77.0.11"
    # neither the token nor the environment is an argument of any process
    for host in ("login", *HOSTS):
        arguments = cluster("exec", host, "ps", "-eo", "args", "ww")
        assert "DSFT_LINK" not in arguments
        assert "s3cret" not in arguments
    cluster("exec", "login", "kill", "-INT", launcher_pid(cluster))
    out, errors = launched.communicate(timeout=60)
    assert launched.returncode == 130, errors + out
    assert run.verdicts()[0]["outcome"] == "stopped"
    for path in run.path.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    assert run.published_checkpoints()[-1] == run.step_lines()[-1]["step"]


def test_cancel_from_elsewhere(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    launched = launch(config)
    run = RunDirectory(tmp_path / "runs" / "words")
    steps(cluster, run, 2)
    status = json.loads(cluster("exec", "n1", *DSFT, "status", str(run.path), "--json"))
    assert status["state"] == "running"
    assert "loss" in cluster("exec", "n3", *DSFT, "logs", str(run.path)) or run.step_lines()
    cluster("exec", "n1", *DSFT, "cancel", str(run.path))
    launched.communicate(timeout=60)
    assert launched.returncode == 143
    assert run.published_checkpoints()[-1] == run.step_lines()[-1]["step"]


@pytest.mark.faults
def test_nothing_outlives_a_killed_launcher(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    launched = launch(config)
    steps(cluster, RunDirectory(tmp_path / "runs" / "words"), 2)
    assert all(left(cluster, host) for host in HOSTS)
    cluster("exec", "login", "kill", "-KILL", launcher_pid(cluster))
    began = time.monotonic()
    for host in HOSTS:
        cluster.wait(lambda host=host: not left(cluster, host), f"nothing left on {host}", 10)  # type: ignore[misc]
    assert time.monotonic() - began < 10
    launched.communicate(timeout=10)


@pytest.mark.faults
def test_a_host_cut_off_ends_its_ranks(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """The cable of n3 is pulled: its ranks end by themselves, and the launcher says which host was lost."""
    launched = launch(config, "resilience.max_restarts=0")
    run = RunDirectory(tmp_path / "runs" / "words")
    steps(cluster, run, 2)
    cluster("linkdown", "n3")
    try:
        cluster.wait(lambda: not left(cluster, "n3"), "nothing left on n3", 40)
        launched.communicate(timeout=60)
    finally:
        cluster("linkup", "n3")
    assert launched.returncode == 75
    assert (run.verdicts()[0]["class"], run.verdicts()[0]["node"]) == ("node", "n3")


@pytest.mark.faults
def test_a_spare_takes_the_place_of_a_host_that_lost_its_power(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    launched = launch(config, "training.max_steps=300", "cluster.spare_nodes=1", "cluster.connect_seconds=3")
    run = RunDirectory(tmp_path / "runs" / "words")
    cluster.wait(lambda: len(run.published_checkpoints()) > 0, "a checkpoint", 90)
    cluster("kill", "n2")
    try:
        cluster.wait(lambda: bool(run.verdicts()), "a verdict", 40)
        cluster.wait(
            lambda: any(e["event"] == "first_step" and e["attempt"] == 2 for e in run.merged_events()), "n3", 60
        )
        cluster("exec", "n1", *DSFT, "cancel", str(run.path))
        launched.communicate(timeout=60)
    finally:
        cluster("boot", "n2")
    first = run.verdicts()[0]
    assert (first["class"], first["node"], first["action"]) == ("node", "n2", "retry")
    assert {report["node"] for report in run.agent_reports(2)} == {"n1", "n3"}


def test_every_problem_of_the_hosts_is_told_before_a_rank_starts(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """n2 is away, n3's Python has no dsft, n1 is named twice."""
    python = tmp_path / "python"  # n3 alone sees another dsft first
    python.write_text(
        f'#!/bin/sh\n[ "$(hostname)" != n3 ] || export PYTHONPATH={tmp_path}/other\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    other = tmp_path / "other"
    for package in ("launcher", "slurm", "trainer"):
        shutil.copytree(ROOT / package, other / package)
    (other / "launcher" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    cluster("kill", "n2")
    try:
        launched = launch(
            config,
            f"cluster.python={python}",
            "cluster.connect_seconds=2",
            f"cluster.hosts={json.dumps([*HOSTS, '10.77.0.11'])}",
        )
        _, errors = launched.communicate(timeout=60)
    finally:
        cluster("boot", "n2")
    assert launched.returncode == 2
    assert "n2 does not answer: ssh: connect to host n2 port 22" in errors
    assert "n3 has another dsft: 0.0.1" in errors
    assert "10.77.0.11 and n1 are the same machine" in errors or "n1 and 10.77.0.11 are the same machine" in errors
    assert not RunDirectory(tmp_path / "runs" / "words").attempts()


def test_a_setup_line_that_fails_is_named(cluster: Cluster, config: Path) -> None:
    launched = launch(config, 'cluster.setup=["true # fine", "module load nothing"]')
    _, errors = launched.communicate(timeout=60)
    assert launched.returncode == 2
    assert "line 2 of cluster.setup failed" in errors


@pytest.mark.faults
def test_a_launcher_killed_during_setup_leaves_none(cluster: Cluster, config: Path) -> None:
    launched = launch(config, 'cluster.setup=["sleep 987"]')
    sleeping = ("exec", "n1", "sh", "-c", "pgrep -f '^[s]leep 987' || true")
    cluster.wait(lambda: bool(cluster(*sleeping)), "setup", 30)
    cluster("exec", "login", "kill", "-KILL", launcher_pid(cluster))
    cluster.wait(lambda: not cluster(*sleeping), "no setup line left", 10)
    launched.communicate(timeout=10)
