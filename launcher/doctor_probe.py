"""What a node tells of itself, asked over a TCP link: versions, storage, GPUs, clock, who it reaches. Torch-free.

    DSFT_LINK="ADDRESS PORT TOKEN" python -P -m launcher.doctor_probe

ADDRESS "ssh" or "srun" stands for where that came from. The other end is
`launcher.doctor_nodes`; one JSON object a line each way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launcher
from launcher.backends.links import keep_alive
from launcher.backends.node import LINK_VARIABLE, free_port, interfaces
from launcher.environment import installed_version
from launcher.gpus import find_gpus, nvidia_smi
from trainer.failures import EXIT_FAILED, node_name
from trainer.processes import die_with_parent, host_identity, package_root
from trainer.rundir import Json

_CONNECT_SECONDS = 10.0
_REACH_SECONDS = 3.0
_SPEED_SECONDS = 3.0  # at most, for writing and for reading
_CHUNK = 4 << 20


def main() -> int:
    """Answer until the other side closes the link."""
    address, port, token = os.environ.pop(LINK_VARIABLE).split()
    client = os.environ.get("SSH_CONNECTION", "").split(" ")[0]
    if address == "ssh":
        address = client
    elif address == "srun":
        address = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
        die_with_parent()
    else:
        die_with_parent()
    try:
        link = socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS)
    except OSError as error:
        where = f"{address}, port {port}"
        jump = "; if it came through a jump host or NAT, set `cluster.address`" if client == address else ""
        print(f"{node_name()} cannot open a TCP connection to the launcher ({where}): {error}{jump}", file=sys.stderr)
        return EXIT_FAILED
    link.settimeout(None)
    keep_alive(link)
    hello = {"token": token, "node": node_name(), "client": client, "identity": host_identity()}
    _say(link, hello)
    with socket.create_server(("", 0)) as listener, link.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                answer = _ACTIONS[request["do"]](request, link, listener)
            except Exception as error:  # one answer that cannot be given is no reason to give none
                answer = {"error": f"{type(error).__name__}: {error}"}
            _say(link, answer)
    return 0


def _say(link: socket.socket, message: Json) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


# -- answers -----------------------------------------------------------------------------------------------------------


def _facts(request: Json, link: socket.socket, listener: socket.socket) -> Json:
    folder = Path(request["folder"])
    return {
        "dsft": launcher.__version__,
        "source": source_digest(),
        "root": str(package_root()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: installed_version(name) for name in request.get("packages", ())},
        "sees": _read(folder / request["marker"]),
        "writes": _writes(folder, request["marker"], request["node"]),
        "missing": [path for path in request.get("paths", ()) if not os.path.exists(path)],
        "gpus": _gpus(),
        "port": listener.getsockname()[1],
        "free_port": free_port(link),
    }


def source_digest() -> str:
    """A digest of dsft's own code: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for folder in ("launcher", "slurm", "trainer"):
        for path in sorted((package_root() / folder).rglob("*.py")):
            digest.update(str(path.relative_to(package_root())).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text()
    return None


def _writes(folder: Path, marker: str, node: str) -> str | None:
    """Leave a file for the launcher to see; returns why that is not possible."""
    try:
        (folder / f"{marker}.{node}").write_text(node)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _gpus() -> list[Json] | None:
    """The GPUs that nvidia-smi tells of, with bytes used and the share of time busy (0 for AMD's, of which it does not
    tell); None where none are found."""
    if shutil.which("nvidia-smi") is None:
        others = find_gpus(os.environ)
        return [{"name": gpu.name, "memory": gpu.memory, "used": 0, "busy": 0} for gpu in others] or None
    found = []
    query = "--query-gpu=name,memory.total,memory.used,utilization.gpu"
    for line in nvidia_smi(query, "--format=csv,noheader,nounits"):
        name, total, used, busy = (part.strip() for part in line.split(","))
        sizes = [int(text) << 20 if text.isdigit() else 0 for text in (total, used)]
        found.append({"name": name, "memory": sizes[0], "used": sizes[1], "busy": int(busy) if busy.isdigit() else 0})
    return found


def _clock(request: Json, link: socket.socket, listener: socket.socket) -> Json:
    return {"time": time.time()}


def _disk(request: Json, link: socket.socket, listener: socket.socket) -> Json:
    """Free bytes, and bytes per second of writing (to the disk, with fsync) and of reading (past the cache)."""
    folder = Path(request["folder"])
    path = folder / f"{request['marker']}.{request['node']}.speed"
    usage = shutil.disk_usage(folder)
    chunk = os.urandom(_CHUNK)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            size, started = 0, time.monotonic()
            while size < request["bytes"] and time.monotonic() - started < _SPEED_SECONDS:
                size += os.write(descriptor, chunk)
            os.fsync(descriptor)
            written = size / (time.monotonic() - started)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(descriptor, 0, os.SEEK_SET)
            size, started = 0, time.monotonic()
            while (got := len(os.read(descriptor, _CHUNK))) and time.monotonic() - started < _SPEED_SECONDS:
                size += got
            read = size / (time.monotonic() - started)
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    return {"free": usage.free, "write": written, "read": read}


def _reach(request: Json, link: socket.socket, listener: socket.socket) -> Json:
    """Which of `peers` (name -> [address, port]) take a TCP connection; the reason for each that does not."""
    failed = {}
    for name, (address, port) in request["peers"].items():
        try:
            socket.create_connection((address, port), timeout=_REACH_SECONDS).close()
        except OSError as error:
            failed[name] = str(error)
    return {"failed": failed}


def _network(request: Json, link: socket.socket, listener: socket.socket) -> Json:
    """Run `trainer.probe` as one rank of the nodes that were chosen; its answer, or what it said before it died."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer.probe", json.dumps(request["probe"]), str(os.getpid())],
        env=interfaces(link) | dict(os.environ) | request["environment"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + request["seconds"]
    try:
        while True:
            try:
                out, errors = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if (
                    select.select([link], [], [], 0)[0] or time.monotonic() > deadline
                ):  # the other side is gone, or late
                    return {"error": f"no result within {request['seconds']:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in out.splitlines() if line.startswith('{"probe"')]
    if not lines:
        return {"error": (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    answer: Json = json.loads(lines[-1])
    return answer


_ACTIONS: dict[str, Callable[[Json, socket.socket, socket.socket], Json]] = {
    "facts": _facts,
    "clock": _clock,
    "disk": _disk,
    "reach": _reach,
    "network": _network,
}

if __name__ == "__main__":
    sys.exit(main())
