"""The process between dsft and an untrusted program; a fresh interpreter, run as a file, that imports nothing of dsft.

It reads a JSON object from standard input (source, token, folder, limits), shuts itself in, starts the program as
process 1 of namespaces of its own, and writes one JSON object: {"status": "passed" | "failed" | "timeout" | "refused",
"message"}.

What holds, by the kernel: the program and all it starts see and signal no process but their own, and all of them end
with the first (PID namespace); there is no network, not even a loopback device (network namespace); the file system is
the system's libraries and Python's, read-only, and an empty folder in memory of limited size (mount namespace,
pivot_root); no capabilities, an ordinary user, no way to gain privileges; limits of CPU time, address space, file size,
processes and open files; system calls that make namespaces, sockets or shared memory, or reach into other processes or
the kernel's key rings, are refused (seccomp). As root the namespaces are made directly and left for a user id of the
program's own; else they are made in a user namespace. The guard adds up the memory of all of a program's processes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = 0x7E020000  # these, and those of control groups
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000  # this number is the same on all processors
_READ_ONLY = 1 | 2  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_VISIBLE = ("/usr", "/bin", "/lib", "/lib32", "/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_FIRST_USER, _USERS = 61184, 4000  # of root's programs: ids that systemd keeps for users who come and go
_MOST = 4096  # bytes of a program's message
_LOOKS_SECONDS = 0.02  # between looks at a program's memory
# System calls that are refused, by their numbers on x86-64 and arm64. Most need a capability outside of a user
# namespace; what is left reaches beyond a program or holds memory that no limit counts.
_PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # place below, AUDIT_ARCH
_CLONE, _CLONE3 = (56, 220), (435, 435)
_REFUSED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _shut_in(root: str, file_mib: int) -> None:
    """Enter namespaces, with a root directory made at ``root``. Raises OSError where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    kinds = _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
    _call("unshare", kinds if user == 0 else kinds | _CLONE_NEWUSER)
    if user != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _mount_memory(root, "size=1m")
    visible: list[str] = []
    for path in (*_VISIBLE, sys.base_prefix, *_DEVICES):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not any(path.startswith(other + "/") or path == other for other in visible):
            _show(path, root + path)
            visible.append(path)
    os.makedirs(root + "/tmp")
    _set_read_only(root)
    _mount_memory(root + "/tmp", f"size={file_mib}m,nr_inodes=1000,mode=0777")
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/tmp")


def _mount_memory(path: str, options: str) -> None:
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())


def _show(path: str, target: str) -> None:
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    _call("mount", os.fsencode(path), os.fsencode(target), None, _MS_BIND | _MS_REC, None)


def _set_read_only(path: str) -> None:
    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]

    wanted = Attributes(_READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    place, attributes = ctypes.c_char_p(os.fsencode(path)), ctypes.byref(wanted)
    number = ctypes.c_long(_SYS_MOUNT_SETATTR)
    if _libc.syscall(number, ctypes.c_int(_AT_FDCWD), place, ctypes.c_uint(_AT_RECURSIVE), attributes, size) != 0:
        raise OSError(ctypes.get_errno(), "mount_setattr (Linux 5.12): " + os.strerror(ctypes.get_errno()))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _limit(request: dict[str, Any]) -> None:
    memory, files = request["memory_mib"] << 20, request["file_mib"] << 20
    seconds = int(request["timeout_seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NPROC, request["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _drop_privileges(guard: int) -> None:
    """No capability is left, and of root not even the user."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:  # there are fewer than 64
            break
    if os.getuid() == 0:
        user = _FIRST_USER + guard % _USERS
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    header, none = Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), ctypes.byref(none))


def _filter_calls() -> None:
    """Refuse system calls from here on, in all that this process starts. Raises OSError where that is not possible."""
    machine = os.uname().machine
    if machine not in _PROCESSORS:
        raise OSError(0, f"the numbers of system calls on {machine} are not known here")
    place, architecture = _PROCESSORS[machine]
    load, equal, at_least, some_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF, on words
    kill, allow, refuse, unknown = 0x80000000, 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 1 << 30), (end, 0, 0, refuse)]  # numbers of x32
    code += [(equal, 0, 1, _CLONE3[place]), (end, 0, 0, unknown)]  # its flags cannot be seen; libraries then take clone
    for numbers in _REFUSED.values():
        code += [(equal, 0, 1, numbers[place]), (end, 0, 0, refuse)]
    code += [(equal, 0, 3, _CLONE[place]), (load, 0, 0, 16), (some_bit, 0, 1, _NAMESPACES), (end, 0, 0, refuse)]
    code.append((end, 0, 0, allow))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code), b"".join(struct.pack("HBBI", *instruction) for instruction in code))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def _program(request: dict[str, Any], report: int, guard: int) -> None:
    """Process 1: becomes the program, and reports that it came to its end."""
    os.setsid()  # it may well signal its whole group
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(3, report)
    os.closerange(report + 1, 1024)
    os.environ.clear()
    os.environ.update({"HOME": "/tmp", "TMPDIR": "/tmp", "PATH": "/usr/bin:/bin"})
    _drop_privileges(guard)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of user would take it back
    _limit(request)
    token, source = request["token"], request["source"]
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
        message = token  # only a program that came to its end gets here
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    try:
        os.write(report, message.encode(errors="replace")[:_MOST])
    finally:
        os._exit(0)


def main() -> None:
    """Run one program; never returns."""
    request = json.loads(sys.stdin.read())
    parent = os.getppid()
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answer: dict[str, str] = {}
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)  # is out of sight from inside
    try:
        _shut_in(request["folder"], request["file_mib"])
        _filter_calls()
    except OSError as error:
        answer = {"status": "refused", "message": str(error)}
    if not answer:
        found, report = os.pipe()
        guard = os.getpid()
        child = os.fork()
        if child == 0:
            os.close(found)
            _program(request, report, guard)
        os.close(report)
        answer = _wait(child, found, request, parent, processes)
    os.write(1, json.dumps(answer).encode())
    os._exit(0)


def _wait(child: int, found: int, request: dict[str, Any], parent: int, processes: int) -> dict[str, str]:
    """Until process 1 ends, its time is up or it takes too much; with it ends everything in its namespace."""
    look = time.monotonic()
    deadline, most = look + request["timeout_seconds"], request["memory_mib"] << 20
    ended, large = 0, False
    while not ended and not large and time.monotonic() < deadline and os.getppid() == parent:
        ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(0.005)
            if time.monotonic() > look + _LOOKS_SECONDS:
                look, large = time.monotonic(), _memory(child, processes) > most
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if large:
            return {"status": "failed", "message": f"more than {request['memory_mib']} MiB in all its processes"}
        return {"status": "timeout", "message": f"longer than {request['timeout_seconds']} s"}
    os.set_blocking(found, False)
    try:
        message = os.read(found, _MOST).decode(errors="replace")
    except BlockingIOError:
        message = ""
    if message == request["token"]:
        return {"status": "passed", "message": ""}
    return {"status": "failed", "message": message.replace(request["token"], "") or "ended before its last line"}


def _memory(process: int, processes: int) -> int:
    """Bytes that a process and all below it hold, seen in the opened folder /proc; what has just ended counts nothing.

    A page that two of them share counts twice.
    """
    try:
        total = int(_read(f"{process}/statm", processes).split()[1]) * resource.getpagesize()
        tasks = os.open(f"{process}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=processes)
        try:
            below = [pid for task in os.listdir(tasks) for pid in _read(f"{task}/children", tasks).split()]
        finally:
            os.close(tasks)
    except OSError:
        return 0
    return total + sum(_memory(int(pid), processes) for pid in below)


def _read(path: str, folder: int) -> str:
    descriptor = os.open(path, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 1 << 16).decode()
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
