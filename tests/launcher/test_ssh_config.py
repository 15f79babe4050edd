"""The SSH cluster's section: hosts, host files, and the shell that starts a node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.backends.ssh import remote_script, ssh_command
from trainer.config.hostfile import parse_hostfile, with_hostfile
from trainer.config.loading import load_config
from trainer.config.schema import SshCluster


def section(**values: Any) -> SshCluster:
    return SshCluster.model_validate({"backend": "ssh", **values})


def test_hosts_and_spares() -> None:
    cluster = section(hosts=["n1", "root@n2", "10.0.0.3", "fe80::1%eth0"], spare_nodes=1)
    assert (cluster.nodes, len(cluster.hosts)) == (3, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hosts": ["n1", "u@n1"]}, "n1 is among the hosts twice"),
        ({"hosts": ["-oProxyCommand=id"]}, "pattern"),
        ({"hosts": ["n1/../x"]}, "pattern"),
        ({"hosts": ["n1 n2"]}, "pattern"),
        ({"hosts": []}, "at least 1"),
        ({}, "hosts"),
        ({"hosts": ["n1"], "spare_nodes": 1}, "none is left"),
        ({"hosts": ["n1"], "hostfile": "x"}, "one of `hosts` and `hostfile`"),
        ({"hosts": ["n1"], "environment": {"A B": "1"}}, "cannot be the name"),
        ({"hostfile": "/nowhere/hosts"}, "cannot be read: No such file"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**values)


def test_a_hostfile_becomes_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\n\nn1 slots=4  # the first\nroot@n2 slots=4\n")
    cluster = section(hostfile=str(path))
    assert (cluster.hosts, cluster.processes_per_node, cluster.hostfile) == (("n1", "root@n2"), 4, None)
    assert section(hostfile=str(path), processes_per_node=2).processes_per_node == 2
    assert section(**json.loads(cluster.model_dump_json())) == cluster  # a run's record launches again


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 slots=4\nn1 slots=2\n", "line 2: n1 appears twice"),
        ("n1 slots=four\n", "line 1: found 'slots=four'"),
        ("n1 slots=0\n", "line 1"),
        ("n1 gpus=4\n", "line 1: found 'gpus=4'"),
        ("# nothing\n", "names no host"),
    ],
)
def test_bad_hostfiles(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_hostfile(text, "hosts")


def test_hosts_with_different_slots_need_a_number(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("n1 slots=4\nn2 slots=8\n")
    with pytest.raises(ValueError, match=r"differ in their slots \(n1 4, n2 8\)"):
        with_hostfile({"hostfile": str(path)})
    assert with_hostfile({"hostfile": str(path), "processes_per_node": 4})["processes_per_node"] == 4
    with pytest.raises(ValueError, match=r"4 slot\(s\), processes_per_node is 8"):
        with_hostfile({"hostfile": str(path), "processes_per_node": 8})


def test_the_users_options_come_before_ours() -> None:
    command = ssh_command(section(hosts=["n1"], ssh_options=["-o", "ConnectTimeout=99"]), "n1")
    assert command.index("ConnectTimeout=99") < command.index("ConnectTimeout=10")
    assert command[-3:-1] == ["--", "n1"]
    assert "BatchMode=yes" in command


def run_script(cluster: SshCluster, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a login shell on a host does with the remote command; stdin stays open as ssh's does."""
    bootstrap = ssh_command(cluster, "n1")[-1]
    with subprocess.Popen(
        ["sh", "-c", bootstrap], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(remote_script(cluster, "json.tool", variables) + "\0")
        process.stdin.flush()
        out, errors = process.stdout.read(), process.stderr.read()
        return subprocess.CompletedProcess([], process.wait(20), out, errors)


HOSTILE = " a,b 'c' \"d\" $(id) `id` ${HOME} \\n \t#!\n;& ü漢\x1b[0m %j * !x"


def test_values_reach_the_host_unchanged(tmp_path: Path) -> None:
    shown = tmp_path / "python"
    shown.write_text(f"#!{sys.executable}\nimport os, sys, json\nprint(json.dumps([os.environ['V'], sys.argv[1:]]))\n")
    shown.chmod(0o755)
    setup = ["export SEEN=1 # a comment", "cat > /dev/null", '[ "$SEEN" = 1 ]']
    done = run_script(section(hosts=["n1"], python=str(shown), setup=setup), {"V": HOSTILE})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [HOSTILE, ["-P", "-m", "json.tool"]]


def test_a_setup_line_that_fails_ends_it(tmp_path: Path) -> None:
    done = run_script(section(hosts=["n1"], setup=["true", "(exit 7) # why"]), {})
    assert done.returncode == 2
    assert "line 2 of cluster.setup failed (status 7)" in done.stderr


@pytest.mark.parametrize("name", ["ssh", "slurm"])
def test_the_profiles_that_come_with_dsft_can_be_used(name: str) -> None:
    configs = Path(__file__).parents[2] / "configs"
    profile = configs / "clusters" / f"{name}.json"
    config = load_config(configs / "quickstart.json", [f"cluster={profile}"])
    assert (config.cluster.backend, config.cluster.nodes, config.cluster.gpus_per_node) == (name, 2, 8)
