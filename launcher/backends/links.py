"""The supervisor's end of its links to the nodes of an attempt: one TCP connection a node, JSON lines both ways.

node -> supervisor  {"token", "node", "port", "step"} first; {"terminating": true}; {"exit": code of the agent}
supervisor -> node  {"start": agent arguments, "environment": {...}}; {"go": true}; {"stacks": true}; {"end": true}

A closed link, whichever side closes it, means that nothing of the attempt may go on running on that node. Nothing
here waits for shared storage, and a node that has lost its power is noticed within LOST_SECONDS.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.nodes import NodePool
from launcher.verdict import NODE_LOST
from trainer.config.schema import SlurmCluster, SshCluster
from trainer.failures import EXIT_FAILED, UserError
from trainer.rundir import RunDirectory

LOST_SECONDS = 5
END_SECONDS = 10.0
START_SECONDS = 300.0  # for srun or ssh, and setup lines, to have a process on every node
_VICTIM_SECONDS = 2.0  # after the first failure: for the other agents to find theirs
_KEEP_ALIVE_SECONDS = 1
_LARGEST_LINE = 1 << 16


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice, within LOST_SECONDS, that the other end is gone without a word."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_ALIVE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, LOST_SECONDS // _KEEP_ALIVE_SECONDS - 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS)


def address_towards(nodes: Sequence[str]) -> str:
    """The IP address by which other hosts reach this one: that of the interface which leads to `nodes`.

    This host's own name often resolves to 127.0.1.1, so it is the routing table that is asked.
    """
    for node in nodes:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((node, 9))  # sends nothing
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    return "127.0.0.1"


@dataclass
class NodeLink:
    """What is known of one node of the attempt."""

    name: str
    connection: socket.socket | None = None
    address: str = ""
    port: int = 0  # a free port of the node, for the rendezvous
    step: str = ""  # SLURM's step, to be cancelled
    started: bool = False
    terminating: bool = False
    lost: bool = False
    code: int | None = None  # the agent's exit code


class Links:
    """Waits for `nodes`, starts their agents when all are there, and lets them go on `release`.

    Reads in a thread of its own, so that agents start while the supervisor is busy; `nodes` may be read at any time.
    """

    def __init__(self, nodes: Sequence[str], agent_arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.token = secrets.token_hex(16)
        self.nodes = {name: NodeLink(name) for name in nodes}
        self._agent_arguments = list(agent_arguments)
        self._environment = environment
        self._released = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("", 0), backlog=len(nodes))
        self.port = int(self._listener.getsockname()[1])
        self._wake, self._woken = socket.socketpair()
        self._closed = False
        self._buffers: dict[socket.socket, bytes] = {}
        self._thread = threading.Thread(target=self._serve, name="links", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let every agent start its ranks, now or as soon as it is there."""
        with self._lock:
            self._released = True
            for link in self.nodes.values():
                if link.started:
                    self._send(link, {"go": True})

    def ask_for_stacks(self) -> None:
        """Tell every agent that still runs to have its ranks write their stacks."""
        with self._lock:
            for link in self.nodes.values():
                if link.code is None:
                    self._send(link, {"stacks": True})

    def end(self) -> None:
        """Tell every agent that still runs to kill its ranks, report and end."""
        with self._lock:
            for link in self.nodes.values():
                if link.code is None:
                    self._send(link, {"end": True})

    def close(self) -> None:
        """Close all links: whatever still runs on the nodes is killed."""
        self._closed = True
        self._wake.send(b"x")
        self._thread.join()
        for connection in [*self._buffers, self._listener, self._wake, self._woken]:
            connection.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select():
                    connection = key.fileobj
                    if connection is self._listener:
                        with contextlib.suppress(OSError):
                            new, _ = self._listener.accept()
                            new.settimeout(LOST_SECONDS)
                            keep_alive(new)
                            self._buffers[new] = b""
                            selector.register(new, selectors.EVENT_READ)
                    elif isinstance(connection, socket.socket) and connection is not self._woken:
                        with self._lock:
                            alive = self._read(connection)
                        if not alive:
                            selector.unregister(connection)
                            connection.close()
                            del self._buffers[connection]

    def _read(self, connection: socket.socket) -> bool:
        """Take in what a node says; False if the link has ended."""
        link = next((link for link in self.nodes.values() if link.connection is connection), None)
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, rest = (self._buffers[connection] + data).split(b"\n")
        self._buffers[connection] = rest
        try:
            for line in lines:
                link = self._take(connection, link, json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError, OSError):  # not one of ours, or gone already
            data = b""
        if data and len(rest) < _LARGEST_LINE:
            return True
        if link is not None:
            link.lost = link.code is None
            link.connection = None
        return False

    def _take(self, connection: socket.socket, link: NodeLink | None, message: dict[str, Any]) -> NodeLink:
        if link is None:
            link = self.nodes[message["node"]]
            if not hmac.compare_digest(message["token"], self.token) or link.connection is not None or link.lost:
                raise ValueError("not a node of this attempt")
            link.address, link.port = connection.getpeername()[0], int(message["port"])
            link.connection = connection
            link.step = str(message.get("step", ""))
            if all(other.connection is not None for other in self.nodes.values()):
                self._start()
        link.terminating = link.terminating or "terminating" in message
        if "exit" in message:
            link.code = int(message["exit"])
        return link

    def _start(self) -> None:
        """All are there: the first node's address and free port are the rendezvous of the attempt."""
        first = next(iter(self.nodes.values()))
        for rank, link in enumerate(self.nodes.values()):
            arguments = [
                *(*self._agent_arguments, "--nnodes", str(len(self.nodes)), "--node-rank", str(rank)),
                *("--master-addr", first.address, "--master-port", str(first.port)),
                *("--rdzv-id", self.token[:8]),
            ]
            link.started = True
            self._send(link, {"start": arguments, "environment": self._environment})
            if self._released:
                self._send(link, {"go": True})

    def _send(self, link: NodeLink, message: dict[str, Any]) -> None:
        if link.connection is not None:
            with contextlib.suppress(OSError):  # the link has ended: the reader notices
                link.connection.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class Ends:
    """Tells when the agents behind `links` have all ended, and ends the others soon after the first failure."""

    links: Links
    start_seconds: float = START_SECONDS
    _started: float = field(default_factory=time.monotonic)
    _first: float | None = None
    _ending: bool = False

    def poll(self, starter: Callable[[str], int | None]) -> dict[str, int] | None:
        """Node -> exit code of its agent (NODE_LOST: it or its link is gone) once no agent is left, else None.

        `starter`: exit code of what has to bring up the process on a node; None while it runs.
        """
        nodes = self.links.nodes.values()
        late = time.monotonic() - self._started > self.start_seconds
        ended = {n.name: starter(n.name) for n in nodes if n.connection is None and not n.lost and n.code is None}
        if ended and (late or any(code is not None for code in ended.values())):
            # not all could be started: those that did not come are to blame
            return {n.name: _blame(ended[n.name], late) if n.name in ended else 0 for n in nodes}
        if all(node.code is not None or node.lost for node in nodes):
            return self._codes()
        if self._first is None:
            if self.is_failing:
                self._first = time.monotonic()
        elif not self._ending:
            # that a node is gone explains whatever the others may find
            if time.monotonic() - self._first > _VICTIM_SECONDS or any(node.lost for node in nodes):
                self._ending = True
                self.links.end()
        elif time.monotonic() - self._first > _VICTIM_SECONDS + END_SECONDS:
            return self._codes()
        return None

    @property
    def is_failing(self) -> bool:
        """Whether an agent has failed or a node is gone."""
        return any(node.lost or node.code for node in self.links.nodes.values())

    def _codes(self) -> dict[str, int]:
        # an agent that had to be killed is no cause of anything: 0
        return {node.name: NODE_LOST if node.lost else node.code or 0 for node in self.links.nodes.values()}


@dataclass(kw_only=True)
class LinkedAttempt:
    """A started attempt with a link to each of its nodes."""

    run: RunDirectory
    attempt: int
    links: Links
    ends: Ends
    _closed: bool = False

    def release(self) -> None:
        """Let the held agents start their ranks."""
        self.links.release()

    def is_failing(self) -> bool:
        """Whether an agent has failed or a node is gone, while others may have to be ended yet."""
        return self.ends.is_failing

    def ask_for_stacks(self) -> None:
        """Have every rank write the Python stacks of its threads."""
        self.links.ask_for_stacks()


@dataclass
class LinkedBackend:
    """Starts attempts whose nodes hold a link to the supervisor."""

    run: RunDirectory
    cluster: SlurmCluster | SshCluster
    processes: int
    environment: Mapping[str, str]
    worker_module: str = field(default="trainer.worker", kw_only=True)
    pool: NodePool = field(default_factory=lambda: NodePool(()), kw_only=True)
    # told how many nodes an attempt is about to have
    resize: Callable[[int], None] = field(default=lambda nodes: None, kw_only=True)
    _last: LinkedAttempt | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.pool.sizes = self.pool.sizes or (self.cluster.nodes,)

    def _open_links(self, nodes: Sequence[str], attempt: int, passed: Mapping[str, str]) -> Links:
        """Links for an attempt on these nodes, whose ranks get the variables `passed` as well."""
        self.resize(len(nodes))
        arguments = ["--run-dir", str(self.run.path), "--attempt", str(attempt)]
        arguments += ["--worker-module", self.worker_module, "--", "--nproc-per-node", str(self.processes)]
        return Links(nodes, arguments, {**self.environment, **passed})

    def _lose(self) -> None:
        """Hold it against the nodes of the last attempt that are gone or never came."""
        for node in self._last.links.nodes.values() if self._last is not None else ():
            if node.lost or not node.address:
                self.pool.lose(node.name)


def passed_environment(cluster: SlurmCluster | SshCluster) -> dict[str, str]:
    """The variables of `pass_environment`. Raises UserError for those that are not set."""
    missing = [name for name in cluster.pass_environment if name not in os.environ]
    if missing:
        raise UserError(f"cluster.pass_environment names {', '.join(missing)}: export it here, then launch again")
    return {name: os.environ[name] for name in cluster.pass_environment}


def answered(processes: Mapping[str, subprocess.Popen[bytes]], seconds: float) -> list[str]:
    """Those of the nodes whose process ends with 0 within so many seconds; the others' processes are ended."""
    wait_or_kill(processes.values(), seconds)
    return [node for node, process in processes.items() if process.returncode == 0]


def wait_or_kill(processes: Iterable[subprocess.Popen[bytes]], seconds: float) -> None:
    """Give all of the processes so long to end, and end what is left."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _blame(code: int | None, late: bool) -> int:
    if code is None:  # on its way still
        return EXIT_FAILED if late else 0
    return code or EXIT_FAILED
