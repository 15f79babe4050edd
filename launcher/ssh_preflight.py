"""What has to hold on every host before a rank starts there over SSH; all problems are told at once."""

from __future__ import annotations

import secrets

from launcher.doctor_checks import essential_problems, gpu_problems, needed_paths
from launcher.doctor_nodes import Probes, ssh_probes
from trainer.config.schema import LaunchConfig, SshCluster
from trainer.failures import UserError
from trainer.rundir import RunDirectory

_START_SECONDS = 60.0  # besides connecting: setup lines and Python on a cold file system
_ANSWER_SECONDS = 30.0


def check_hosts(config: LaunchConfig, cluster: SshCluster, run: RunDirectory) -> str:
    """Ask every host; returns the address by which they reach this machine. Raises UserError with every problem."""
    nonce = secrets.token_hex(8)
    marker = f".probe-{nonce}"
    (run.path / marker).write_text(nonce)
    try:
        with ssh_probes(cluster, cluster.connect_seconds + _START_SECONDS) as found:
            problems = _problems(config, cluster, run, found, marker, nonce)
            address = found.launcher_address(cluster.address)
    finally:
        for path in run.path.glob(f"{marker}*"):
            path.unlink(missing_ok=True)
    if problems:
        head = f"{len(problems)} thing{'s' if len(problems) > 1 else ''} to change before the hosts can run this"
        raise UserError("\n".join([head, *(f"  {problem}" for problem in problems)]))
    return address


def _problems(
    config: LaunchConfig,
    cluster: SshCluster,
    run: RunDirectory,
    found: Probes,
    marker: str,
    nonce: str,
) -> list[str]:
    request = {"do": "facts", "folder": str(run.path), "marker": marker, "paths": needed_paths(config)}
    facts = found.ask({name: request | {"node": name} for name in found.nodes}, _ANSWER_SECONDS)
    on_cpu = cluster.environment.get("DS_ACCELERATOR") == "cpu"
    return [
        *essential_problems(found, facts, str(run.path), nonce),
        *gpu_problems(facts, cluster.gpus_per_node, on_cpu),
    ]
