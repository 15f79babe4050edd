"""What runs on each node of an attempt: keeps the link to the supervisor, starts the agent, leaves nothing behind.

    DSFT_LINK="ADDRESS PORT TOKEN" python -P -m launcher.backends.node

It is the task of srun (or the command of ssh); what the two ends say is in `launcher.backends.links`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.backends.links import keep_alive
from trainer.failures import EXIT_FAILED, EXIT_TEMPORARY, NODE_VARIABLE, node_name
from trainer.heartbeat import STACK_SIGNAL
from trainer.processes import RUN_VARIABLE, die_with_parent, kill_run

LINK_VARIABLE = "DSFT_LINK"
INTERFACE_VARIABLE = "DSFT_INTERFACE"
_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.05
_END_SECONDS = 5.0
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass
class Node:
    """The state of this node's part of the attempt."""

    link: socket.socket
    agent: subprocess.Popen[bytes] | None = None
    run_dir: Path | None = None
    terminating: bool = False
    deadline: float = float("inf")
    _buffer: bytes = field(default=b"")

    def say(self, **message: Any) -> None:
        self.link.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> bool:
        """Obey what the supervisor says; False once the link has ended."""
        try:
            data = self.link.recv(65536)
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(data)

    def _obey(self, message: dict[str, Any]) -> None:
        if "start" in message:
            self._start(message["start"], message["environment"])
        elif self.agent is not None and "go" in message and self.agent.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.agent.stdin.write(b"go\n")
                self.agent.stdin.flush()
        elif self.agent is not None and "stacks" in message:
            self.agent.send_signal(STACK_SIGNAL)
        elif self.agent is not None and "end" in message:
            self.agent.send_signal(signal.SIGQUIT)  # torch's agent kills its ranks and reports
            self.deadline = time.monotonic() + _END_SECONDS

    def _start(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.run_dir = Path(arguments[arguments.index("--run-dir") + 1])
        if NODE_VARIABLE in os.environ:  # over SSH nobody else has cleared away what a lost connection left here
            kill_run(self.run_dir)
        own = ["--parent-pid", str(os.getpid()), "--hold"]
        self.agent = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer.agent", *own, *arguments],
            env=interfaces(self.link) | dict(os.environ) | environment | {RUN_VARIABLE: str(self.run_dir)},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Leave nothing of the run on this node."""
        if self.agent is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.agent.pid, signal.SIGKILL)
        if self.run_dir is not None:
            kill_run(self.run_dir)


def main() -> int:
    """Serve until the supervisor closes the link; the exit code is the agent's."""
    if NODE_VARIABLE not in os.environ:  # without its connection sshd ends at once; the link tells, and leaves time
        die_with_parent()
    address, port, token = os.environ.pop(LINK_VARIABLE).split()
    node = Node(socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS))
    node.link.settimeout(_CONNECT_SECONDS)
    keep_alive(node.link)

    def terminate(number: int, frame: object) -> None:
        node.terminating = True

    signal.signal(signal.SIGTERM, terminate)
    step = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}".strip(".")
    node.say(token=token, node=node_name(), port=free_port(node.link), step=step)
    try:
        return _serve(node)
    finally:
        node.kill()


def _serve(node: Node) -> int:
    told = False
    code: int | None = None
    while True:
        readable, _, _ = select.select([node.link], [], [], _POLL_SECONDS)
        if readable and not node.read():
            return EXIT_TEMPORARY if code is None else code
        if node.terminating and not told:
            told = True
            node.say(terminating=True)
        if node.agent is not None and code is None:
            if time.monotonic() > node.deadline:
                node.kill()
            code = node.agent.poll()
            if code is not None:
                node.kill()  # what a dead agent may have left behind
                node.say(exit=code)


def free_port(link: socket.socket) -> int:
    with socket.create_server((link.getsockname()[0], 0)) as probe:
        return int(probe.getsockname()[1])


def interfaces(link: socket.socket) -> dict[str, str]:
    """The network interface that gloo and NCCL are to use, unless the environment names one already."""
    name = os.environ.get(INTERFACE_VARIABLE) or _interface_of(link.getsockname()[0], link)
    if not name:
        return {}
    # "=": NCCL takes a name for a prefix otherwise
    return {"GLOO_SOCKET_IFNAME": name, **({"NCCL_SOCKET_IFNAME": f"={name}"} if name != "lo" else {})}


def _interface_of(address: str, link: socket.socket) -> str | None:
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode()[:15])
        with contextlib.suppress(OSError):  # an interface without an IPv4 address
            answer = fcntl.ioctl(link.fileno(), _SIOCGIFADDR, request)
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        print(f"{node_name()}: the link to the supervisor broke: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
