"""The asking end of `launcher.doctor_probe`: starts a probe on each node, asks all of them, and leaves none behind."""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from launcher.backends.links import keep_alive
from launcher.backends.node import LINK_VARIABLE
from launcher.backends.ssh import end_processes, host_name, remote_script, start_on
from trainer.config.schema import SshCluster
from trainer.failures import NODE_VARIABLE
from trainer.rundir import Json

PROBE = "launcher.doctor_probe"
_HELLO_SECONDS = 5.0
_TAIL_CHARACTERS = 300


@dataclass
class Probe:
    """A node that has answered; `address` is the one it came from."""

    name: str
    connection: socket.socket
    lines: IO[str]
    address: str
    hello: Json


@dataclass
class Probes:
    """The nodes that answered, and why the others did not."""

    nodes: dict[str, Probe] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def ask(self, requests: Mapping[str, Json], seconds: float) -> dict[str, Json]:
        """Send each node its request, all at once; node -> answer, or {"error": why there is none}."""
        for name, request in requests.items():
            with contextlib.suppress(OSError):  # seen below
                self.nodes[name].connection.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + seconds
        answers = {}
        for name in requests:
            probe = self.nodes[name]
            try:
                probe.connection.settimeout(max(0.1, deadline - time.monotonic()))
                answers[name] = json.loads(probe.lines.readline() or '{"error": "the connection was lost"}')
            except (OSError, ValueError) as error:
                late = isinstance(error, TimeoutError)
                answers[name] = {"error": f"no answer within {seconds:.0f} s" if late else str(error)}
        return answers

    def close(self) -> None:
        """End the probes."""
        for probe in self.nodes.values():
            probe.lines.close()
            probe.connection.close()

    def launcher_address(self, configured: str | None) -> str:
        """The address of this machine as the nodes reach it."""
        clients = [probe.connection.getsockname()[0] for probe in self.nodes.values()]
        return configured or next((client for client in clients if not client.startswith("127.")), "127.0.0.1")

    def address_of(self, name: str) -> str:
        """A node's address as the others reach it: one that runs on this machine came in over the loopback."""
        address = self.nodes[name].address
        return self.launcher_address(None) if address.startswith("127.") else address


Starter = Callable[[int, str, IO[bytes]], subprocess.Popen[bytes]]


@contextlib.contextmanager
def probes(
    starters: Mapping[str, Starter], expected: Mapping[str, Sequence[str]], count: int, seconds: float
) -> Iterator[Probes]:
    """Start a probe on each node; yields when `count` nodes have answered, or all that will within `seconds`.

    `starters`: label -> what starts a process there, given (port, token, its output); `expected`: label -> the nodes
    which that process brings (none if they are not known in advance).
    """
    token = secrets.token_hex(16)
    found = Probes()
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("", 0), backlog=128))
        listener.settimeout(0.1)
        stack.callback(lambda: end_processes(list(processes.values()), 5.0))
        stack.callback(found.close)
        outputs = {label: stack.enter_context(tempfile.TemporaryFile()) for label in starters}
        for label, start in starters.items():
            processes[label] = start(listener.getsockname()[1], token, outputs[label])
        deadline = time.monotonic() + seconds
        while len(found.nodes) < count and time.monotonic() < deadline:
            waiting = [label for label in starters if processes[label].poll() is None]
            silent = [label for label in waiting if not expected[label] or set(expected[label]) - set(found.nodes)]
            _accept(listener, token, found)
            if not silent:
                break
        for label in starters:
            for name in set(expected[label] or [label]) - set(found.nodes):
                if expected[label] or len(found.nodes) < count:
                    found.absent[name] = _said(outputs[label], processes[label].poll(), seconds)
        yield found


def _accept(listener: socket.socket, token: str, found: Probes) -> None:
    """Take one connection, if it comes now and knows the token."""
    try:
        connection, (address, *_) = listener.accept()
    except TimeoutError:
        return
    connection.settimeout(_HELLO_SECONDS)
    keep_alive(connection)
    lines = connection.makefile("r", encoding="utf-8")
    try:
        hello = json.loads(lines.readline(4096))
        if hmac.compare_digest(hello["token"], token) and hello["node"] not in found.nodes:
            found.nodes[hello["node"]] = Probe(hello["node"], connection, lines, address, hello)
            return
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    connection.close()


def _said(output: IO[bytes], code: int | None, seconds: float) -> str:
    output.seek(0)
    text = " ".join(output.read().decode(errors="replace").split())
    if len(text) > _TAIL_CHARACTERS:
        text = f"... {text[-_TAIL_CHARACTERS:].partition(' ')[2]}"
    return text or (f"no answer within {seconds:.0f} s" if code is None else f"its command ended with {code}")


def ssh_probes(cluster: SshCluster, seconds: float) -> contextlib.AbstractContextManager[Probes]:
    """Probes on all hosts of an SSH cluster, spares too."""

    def starter(host: str) -> Starter:
        def start(port: int, token: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
            variables = {LINK_VARIABLE: f"{cluster.address or 'ssh'} {port} {token}", NODE_VARIABLE: host_name(host)}
            return start_on(cluster, host, remote_script(cluster, PROBE, variables), output)

        return start

    names = {host_name(host): host for host in cluster.hosts}
    return probes(
        {name: starter(host) for name, host in names.items()}, {name: [name] for name in names}, len(names), seconds
    )
