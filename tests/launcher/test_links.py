"""A link to a node's real process, with a real agent and ranks behind it."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.backends.links import Links
from launcher.backends.node import LINK_VARIABLE
from trainer.failures import NODE_VARIABLE
from trainer.processes import kill_run, processes_of_run
from trainer.rundir import RunDirectory

HERE = Path(__file__).parent


def test_ranks_write_their_stacks_when_they_are_asked_over_the_link(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    attempt = run.new_attempt()
    arguments = ["--run-dir", str(run.path), "--attempt", str(attempt)]
    arguments += ["--worker-module", "supervised", "--", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    links = Links(["here"], arguments, {"MODE": "hang", "PYTHONPATH": path})
    variables = {LINK_VARIABLE: f"127.0.0.1 {links.port} {links.token}", NODE_VARIABLE: "here", "PYTHONPATH": path}
    node = subprocess.Popen([sys.executable, "-P", "-m", "launcher.backends.node"], env=os.environ | variables)
    try:
        links.release()
        deadline = time.monotonic() + 60
        while not all((run.attempt_dir(attempt) / f"pid{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        links.ask_for_stacks()
        stacks = [run.stack_path(attempt, rank) for rank in (0, 1)]
        while not all(stack.read_text().count("in train") for stack in stacks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert links.nodes["here"].code is None  # agent and ranks live on
    finally:
        links.close()
        node.wait(20)
        left = processes_of_run(run.path)
        kill_run(run.path)
    assert left == []


@pytest.mark.parametrize("says", [b"[" * 60_000 + b"\n", None], ids=["nonsense", "gone at once"])
def test_links_outlive_whoever_calls(says: bytes | None) -> None:
    links = Links(["a", "b"], [], {})
    hello = json.dumps({"token": links.token, "node": "a", "port": 1}).encode() + b"\n"
    caller = socket.create_connection(("127.0.0.1", links.port))
    with links._lock:  # nobody reads what it says before it is gone
        caller.sendall(says or hello)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        if says is None:
            time.sleep(0.1)
            caller.close()
            time.sleep(0.1)
    if says is not None:
        assert caller.recv(1) == b""  # what is no link is closed
        caller.close()
    with socket.create_connection(("127.0.0.1", links.port)) as node:
        node.sendall(hello)
        deadline = time.monotonic() + 20
        while links.nodes["a"].address == "" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert links.nodes["a"].address == "127.0.0.1"
    links.close()
