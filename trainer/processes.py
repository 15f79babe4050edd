"""Small facts about processes on Linux: who is alive, who belongs to a run, dying with one's parent; their environment.

Torch-free.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import site
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_PR_SET_PDEATHSIG = 1

# In the environment of every process of a run: what is left over can be found wherever it was re-parented to.
RUN_VARIABLE = "DSFT_RUN_DIR"


def package_root() -> Path:
    """The folder that holds `launcher` and `trainer`."""
    return Path(__file__).resolve().parent.parent


def added_root() -> Path | None:
    """What PYTHONPATH has to name for dsft to be found; None where it is installed.

    Site-packages on PYTHONPATH would come before the standard library; they are found without.
    """
    root = package_root()
    return None if str(root) in [*site.getsitepackages(), site.getusersitepackages()] else root


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of processes that import `trainer`: this very package first, nothing from the user's folder."""
    environment = dict(os.environ) | dict(extra or {})
    if (root := added_root()) is not None:
        # without empty entries, which mean the current folder
        entries = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *(entry for entry in entries if entry)])
    environment["PYTHONSAFEPATH"] = "1"
    environment.pop("PYTHONOPTIMIZE", None)  # 2 takes docstrings away, which transformers reads; 1 the checks of others
    return environment


def die_with_parent(expected_parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends. Call it before anything slow.

    `expected_parent` is the parent's pid: if it has died already, before the kernel knew, this process exits here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if expected_parent is not None and os.getppid() != expected_parent:
        os._exit(128 + signal.SIGKILL)


def host_identity() -> str:
    """Names this boot of this kernel and this pid namespace: where a pid means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # unknown: never equal to another's, see `same_host`


def same_host(identity: str) -> bool:
    """True if `identity` (another process's `host_identity`) is certainly this host's."""
    return bool(identity) and identity == host_identity()


def start_time(pid: int) -> int | None:
    """Start of a living process in clock ticks since boot; None if there is no such process, or only its zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in b"ZX" else int(fields[19])


def parent_of(pid: int) -> int | None:
    """The pid of a process's parent; None if there is no such process."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _stat(pid: int) -> list[bytes] | None:
    """The third field and those after it of /proc/PID/stat (proc(5)); the command name before may be any bytes."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last: another user's, hidden
        return None
    return stat[stat.rindex(b")") + 2 :].split()


def processes_of_run(run_dir: Path) -> list[int]:
    """Pids of living processes of this user on this host that were started for the run in `run_dir`."""
    mark = f"{RUN_VARIABLE}={run_dir}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        try:
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if mark in variables and start_time(int(name)) is not None:
            found.append(int(name))
    return found


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_run(run_dir: Path) -> list[int]:
    """Kill every process of the run on this host, again until none is left; returns those that outlive 5 s of that."""
    deadline = time.monotonic() + 5.0
    while (left := processes_of_run(run_dir)) and time.monotonic() < deadline:
        kill_all(left)
        time.sleep(0.02)
    return left


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory since boot, in whichever control group; 0: unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
