"""Hosts over plain ssh: one agent a host, held together by the supervisor's TCP links.

The command on the remote side is always `_BOOTSTRAP`; everything else, the link's token too, goes through ssh's stdin,
where neither `ps` nor the remote login shell sees it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.backends.links import (
    END_SECONDS,
    Ends,
    LinkedAttempt,
    LinkedBackend,
    answered,
    passed_environment,
    wait_or_kill,
)
from launcher.backends.node import INTERFACE_VARIABLE, LINK_VARIABLE
from trainer.config.schema import SshCluster
from trainer.failures import NODE_VARIABLE, UserError
from trainer.processes import added_root
from trainer.rundir import RunDirectory, write_json

# Any login shell takes this. -l: /etc/profile is where sites define `module`
_BOOTSTRAP = """exec bash -lc 'IFS= read -rd "" script; eval "$script"'"""
_TAIL_CHARACTERS = 300
_PROBE_SECONDS = 10.0  # besides connecting: for a login shell on a host that was lost


def host_name(host: str) -> str:
    """The name of a host in logs and records: as the config has it, without the user."""
    return host.rpartition("@")[2]


def ssh_command(cluster: SshCluster, host: str) -> list[str]:
    """The ssh to a host. The user's options come first: of an option given twice, ssh takes the first."""
    own = ["BatchMode=yes", f"ConnectTimeout={cluster.connect_seconds}", "ServerAliveInterval=5"]
    own += ["ServerAliveCountMax=3", "ForwardX11=no", "ForwardAgent=no"]
    options = [part for option in own for part in ("-o", option)]
    return ["ssh", "-T", *cluster.ssh_options, *options, "--", host, _BOOTSTRAP]


def remote_script(cluster: SshCluster, module: str, variables: Mapping[str, str]) -> str:
    """What bash runs on a host: setup lines, then `module` in the host's Python.

    While setup lines run, the end of stdin (ssh or the launcher is gone) kills them; after that the link decides.
    """
    lines = ["exec 3<&0 < /dev/null", "{ read -r _ <&3; kill -KILL 0; } > /dev/null 2>&1 &", "dsft_lifeline=$!"]
    for number, line in enumerate(cluster.setup, start=1):
        lines += [line, _setup_check(number)]
    lines += ["kill $dsft_lifeline; wait $dsft_lifeline 2> /dev/null", "exec 3<&-"]
    if (root := added_root()) is not None:
        lines.append(f'export PYTHONPATH={shlex.quote(str(root))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    if cluster.network_interface:
        variables = {**variables, INTERFACE_VARIABLE: cluster.network_interface}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines.append(shlex.join(["exec", cluster.python or sys.executable, "-P", "-m", module]))
    return "\n".join(lines) + "\n"


def _setup_check(number: int) -> str:
    return (
        f"dsft_status=$?; [ $dsft_status = 0 ] || "
        f'{{ echo "line {number} of cluster.setup failed (status $dsft_status)" >&2; kill $dsft_lifeline; exit 2; }}'
    )


def start_on(cluster: SshCluster, host: str, script: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Run a script on a host. Closing the process's stdin, or killing it, ends what is not held by a link."""
    try:
        process = subprocess.Popen(
            ssh_command(cluster, host),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is the supervisor's to act on
        )
    except OSError as error:
        raise UserError(f"ssh cannot be started: {error.strerror}; install OpenSSH's client here") from None
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(script.encode() + b"\0")
        process.stdin.flush()
    return process


def end_processes(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Close every ssh's stdin, give the remote sides so long to end, and end what is left."""
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
    wait_or_kill(processes, seconds)


@dataclass(kw_only=True)
class SshAttempt(LinkedAttempt):
    """A started attempt: one ssh and one link a host."""

    processes: dict[str, subprocess.Popen[bytes]]

    def poll(self) -> dict[str, int] | None:
        """Node -> exit code of its agent (NODE_LOST: it or its link is gone) once no agent is left, else None."""
        codes = self.ends.poll(lambda name: self.processes[name].poll())
        for name, code in (codes or {}).items():
            if code != 0 and not self.links.nodes[name].address:
                self._report_missing(name, code)
        return codes

    def _report_missing(self, name: str, code: int) -> None:
        """An agent that never was leaves no report of its own: say what ssh said."""
        said = _tail(ssh_log(self.run, self.attempt, name)) or f"nothing was heard from it; ssh ended with {code}"
        empty: dict[str, object] = {"exit_codes": {}, "ended": {}, "killed_ranks": [], "first_failed_rank": None}
        value = {"node": name, **empty, "class": "node", "message": f"ssh {name}: {said}", "time": time.time()}
        path = self.run.agent_report_path(self.attempt, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)

    def kill(self) -> list[int]:
        """Close the links, upon which every host kills what it has; then end what ssh is left."""
        if not self._closed:
            self._closed = True
            for node in self.links.nodes.values():
                if node.lost:  # its ssh would be waited for in vain
                    self.processes[node.name].kill()
            self.links.close()
            end_processes(list(self.processes.values()), END_SECONDS)
        return []


@dataclass
class SshBackend(LinkedBackend):
    """Starts attempts on the hosts of `cluster`. `address`: of this machine, as they reach it."""

    cluster: SshCluster
    address: str

    def exhausted(self) -> str | None:
        """Call it after a failed attempt: its lost hosts come last from now on. There is always another attempt."""
        self._lose()
        return None

    def candidates(self) -> list[str]:
        """All hosts: there is no scheduler that knows better."""
        return [host_name(host) for host in self.cluster.hosts]

    def answering(self, nodes: Sequence[str]) -> list[str]:
        """Those of the hosts that ssh reaches and that see the run directory."""
        script = f"test -e {shlex.quote(str(self.run.plan_path))}\n"
        hosts = {host_name(host): host for host in self.cluster.hosts}
        with open(os.devnull, "wb") as output:
            processes = {name: start_on(self.cluster, hosts[name], script, output) for name in nodes}
        found = answered(processes, self.cluster.connect_seconds + _PROBE_SECONDS)
        end_processes(list(processes.values()), 0.0)
        return found

    def seconds_left(self) -> float:
        """Nobody ends the run but its user."""
        return math.inf

    def start(self, attempt: int) -> SshAttempt:
        """Start a held agent on each of the attempt's hosts: spares rather than hosts lost before."""
        hosts = {host_name(host): host for host in self.cluster.hosts}
        names = self.pool.choose(list(hosts))
        links = self._open_links(names, attempt, passed_environment(self.cluster))
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in names:
                variables = {LINK_VARIABLE: f"{self.address} {links.port} {links.token}", NODE_VARIABLE: name}
                script = remote_script(self.cluster, "launcher.backends.node", variables)
                log = ssh_log(self.run, attempt, name)
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "ab") as output:
                    processes[name] = start_on(self.cluster, hosts[name], script, output)
        except BaseException:
            links.close()
            end_processes(list(processes.values()), 0.0)
            raise
        started = SshAttempt(run=self.run, attempt=attempt, links=links, ends=Ends(links), processes=processes)
        self._last = started
        return started


def ssh_log(run: RunDirectory, attempt: int, name: str) -> Path:
    """What ssh and the node's process said, apart from what agent and ranks write over there."""
    return run.agent_log_path(attempt, name).with_name("ssh.log")


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError):
        return " ".join(path.read_text(errors="replace").split())[-_TAIL_CHARACTERS:]
    return ""
