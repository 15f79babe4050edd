"""Hostile programs in the sandbox: each is stopped and counted as failed, and the host notices nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.config.generation import CodeExecutionConfig
from trainer.failures import UserError
from trainer.sandbox import Outcome, run_program, run_programs

LIMITS = CodeExecutionConfig(enabled=True, timeout_seconds=1.0, memory_mib=256, file_mib=4)

HOSTILE = {
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "forks": "import os\nwhile True: os.fork()",
    "forks in silence": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "allocates": "held = []\nwhile True: held.append('a' * 10**6)",
    "fills its folder": "f = open('big', 'wb')\nwhile True: f.write(b'x' * 10**6); f.flush()",
    "many files": "for n in range(10**6): open(str(n), 'w').close()",
    "writes to the system": "open('/usr/dsft-evil', 'w')",
    "removes the system": "import os; os.remove('/usr/bin/env')",
    "reads what is not its own": "open('/etc/passwd').read()",
    "socket": "import socket; socket.socket()",
    "socket underneath": "import _socket; _socket.socket().connect(('127.0.0.1', 22))",
    "sends underneath": "import _socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
    "socket of a kind that no namespace holds": "import _socket; _socket.socket(40, 1, 0)",  # to a hypervisor
    "follows a link": "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
    "looks at processes": "import ctypes, os; os.mkdir('p')\nassert LIBC.mount(b'proc', b'p', b'proc', 0, None) == 0",
    "namespaces of its own": "assert LIBC.unshare(0x10000000 | 0x20000) == 0",
    "a child in a namespace": "assert LIBC.syscall(56, 0x10000011, 0, 0, 0, 0) > 0",
    "traces its parent": "import os; assert LIBC.ptrace(16, os.getppid(), 0, 0) == 0",
    "key ring of its user": "assert LIBC.syscall(250, 0, -3, 0) > 0",
    "shared memory that outlives processes": "assert LIBC.shmget(0, 1 << 20, 0o1777) >= 0",
    "memory in files without a name": "import os; os.memfd_create('x')",
    "allocates in many processes": (
        "import os, time\nfor _ in range(5):\n if os.fork() == 0: break\nheld = b'x' * (60 << 20)\ntime.sleep(60)"
    ),
    "kills everything": "import os, signal; os.kill(-1, signal.SIGKILL); raise ValueError('nothing to kill')",
    "kills its parent": "import os, signal; assert os.getppid(); os.kill(os.getppid(), signal.SIGKILL)",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV); os.abort()",
    "floods": "while True: print('x' * 10**6)",
    "leaves early": "import sys; sys.exit(0)",
    "leaves in silence": "import os; os._exit(0)",
    "catches everything": "try:\n import sys; sys.exit(0)\nexcept BaseException: pass\nassert False",
    "catches for ever": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "no program": "def f(:",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "gains rights": "import os; os.setuid(0)" if os.getuid() else "import os; os.setuid(0); open('/usr/x', 'w')",
    "wrong answer": "assert 1 + 1 == 3",
}


@pytest.fixture(autouse=True, scope="module")
def _possible() -> None:
    try:
        run_program("", LIMITS)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_it_fails_in_time(program: str) -> None:
    start = time.monotonic()
    outcome = run_program(program.replace("LIBC", "__import__('ctypes').CDLL(None)"), LIMITS)
    assert not outcome.passed, outcome
    assert time.monotonic() - start < 15


def test_what_is_right_passes() -> None:
    program = "import math, re, collections, threading\nopen('notes', 'w').write('x')\nassert math.gcd(12, 18) == 6\n"
    program += "t = threading.Thread(target=print); t.start(); t.join()\nimport asyncio, subprocess\n"
    program += "async def three(): return 3\nassert asyncio.run(three()) == 3\n"
    program += "assert subprocess.run(['/bin/echo', 'x'], capture_output=True).stdout == b'x\\n'"
    assert run_program(program, LIMITS.model_copy(update={"timeout_seconds": 10.0})) == Outcome("passed")
    assert [one.passed for one in run_programs(["", "1 / 0", ""], LIMITS)] == [True, False, True]


def test_memory_of_all_processes_counts() -> None:
    outcome = run_program(HOSTILE["allocates in many processes"], LIMITS.model_copy(update={"timeout_seconds": 10.0}))
    assert outcome == Outcome("failed", "more than 256 MiB in all its processes")


def test_a_daemon_ends_with_its_program() -> None:
    """A process that has left session and parent is gone when the outcome is there."""
    name = f"dsft-daemon-{os.getpid()}"
    program = (
        "import os, time, ctypes\n"
        "if os.fork() == 0:\n"
        " os.setsid()\n"
        " if os.fork(): os._exit(0)\n"
        f" ctypes.CDLL(None).prctl(15, b'{name[-15:]}')\n"
        " time.sleep(60)\n"
        "time.sleep(0.2)"
    )
    assert run_program(program, LIMITS).passed
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:
            continue
    assert name[-15:] not in names


def test_the_host_keeps_its_files(tmp_path: Path) -> None:
    """Neither a file of ours is seen, nor does a program leave one."""
    (tmp_path / "mine").write_text("secret")
    program = f"import os\nassert not os.path.exists({str(tmp_path)!r})\nopen('/tmp/dsft-left-behind', 'w').write('x')"
    assert run_program(program, LIMITS).passed  # its /tmp is its own folder, in memory
    assert not Path("/tmp/dsft-left-behind").exists()
    assert (tmp_path / "mine").read_text() == "secret"


def test_environment_and_descriptors_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    program = (
        "import os\nassert 'SECRET_TOKEN' not in os.environ\n"
        "held = []\nfor n in range(3, 64):\n"
        " try: os.fstat(n); held.append(n)\n except OSError: pass\n"
        "assert len(held) <= 1, held"
    )
    assert run_program(program, LIMITS) == Outcome("passed")
