"""The lock of a run: one holder, takeover from the dead, none from the living."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import lease as module
from trainer.lease import LockedError, acquire, read_holder
from trainer.processes import parent_of, start_time
from trainer.rundir import read_json, write_json

ROOT = str(Path(__file__).resolve().parents[2])
HOLD = """
import sys, time
from pathlib import Path
from trainer.lease import acquire, LockedError
if len(sys.argv) > 2:
    while time.time() < float(sys.argv[2]): pass
try:
    lease = acquire(Path(sys.argv[1]), lease_seconds=1.0, renew_seconds=0.2)
except LockedError as error:
    print("locked", flush=True); sys.exit(75)
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments],
        env=os.environ | {"PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def pretend_other_host(folder: Path) -> None:
    """Make the newest holder one of another host, whose pid says nothing here."""
    path = max(folder.glob("holder-*"))
    write_json(path, read_json(path) | {"host": "elsewhere/boot/pid:[1]"})


def test_a_living_holder_is_named_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock")
    assert first_line(process) == "held"
    begin = time.monotonic()
    with pytest.raises(LockedError, match=f"process {process.pid}"):
        acquire(tmp_path / "lock", lease_seconds=30)
    assert time.monotonic() - begin < 1
    process.kill()
    process.wait()


def test_a_dead_holder_of_this_host_is_replaced_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock")
    assert first_line(process) == "held"
    process.kill()
    process.wait()
    begin = time.monotonic()
    acquire(tmp_path / "lock", lease_seconds=30).release()
    assert time.monotonic() - begin < 1


def test_a_process_of_another_user_that_cannot_be_seen_is_waited_out(tmp_path: Path) -> None:
    first = acquire(tmp_path, renew_seconds=0.05)
    other = os.getuid() + 1
    first._value |= {"user": other, "pid": 2**22 + 1}  # as where /proc shows nobody else's processes
    while read_json(tmp_path / "holder-00000001")["user"] != other:
        time.sleep(0.01)
    with pytest.raises(LockedError):
        acquire(tmp_path, lease_seconds=5.0)
    first.release()


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    for generation in (1, 2, 3):
        with acquire(tmp_path / "lock") as lease:
            assert not lease.lost.is_set()
            assert read_holder(tmp_path / "lock").generation == generation  # type: ignore[union-attr]
    assert len(list((tmp_path / "lock").iterdir())) == 1


def test_a_silent_holder_elsewhere_is_waited_out_for_the_lease_and_no_longer(tmp_path: Path) -> None:
    acquire(tmp_path / "lock").release()
    path = max((tmp_path / "lock").glob("holder-*"))
    write_json(path, read_json(path) | {"host": "elsewhere/boot/pid:[1]", "released": False})
    waited = []
    begin = time.monotonic()
    acquire(tmp_path / "lock", waited.append, lease_seconds=1.0).release()
    assert 0.9 < time.monotonic() - begin < 2.5
    assert [holder.host for holder in waited] == ["elsewhere/boot/pid:[1]"]


def test_a_holder_elsewhere_that_renews_keeps_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "host_identity", lambda: "elsewhere/boot/pid:[1]")
    lease = acquire(tmp_path / "lock", renew_seconds=0.2)
    monkeypatch.undo()
    with pytest.raises(LockedError):
        acquire(tmp_path / "lock", lease_seconds=2.0)
    lease.release()


def test_of_many_contenders_for_a_dead_lock_one_wins(tmp_path: Path) -> None:
    acquire(tmp_path / "lock").release()
    for _ in range(3):
        start = str(time.time() + 0.7)
        contenders = [hold(tmp_path / "lock", start) for _ in range(4)]
        assert sorted(first_line(process) for process in contenders) == ["held", "locked", "locked", "locked"]
        for process in contenders:
            process.kill()
            process.wait()


def test_a_holder_that_was_suspended_finds_that_it_has_lost(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock")
    assert first_line(process) == "held"
    process.send_signal(signal.SIGSTOP)
    pretend_other_host(tmp_path / "lock")  # on its own host it would count as alive
    lease = acquire(tmp_path / "lock", lease_seconds=1.0, renew_seconds=0.2)
    mine = read_holder(tmp_path / "lock")
    process.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    assert not lease.lost.is_set()
    now = read_holder(tmp_path / "lock")
    assert mine is not None
    assert now is not None
    assert (now.generation, now.pid) == (mine.generation, os.getpid())
    process.kill()
    process.wait()
    lease.release()


def test_a_lock_that_cannot_be_given_back_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    lease = acquire(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        lease.release()
    holder = read_holder(tmp_path)
    assert holder is not None
    assert not holder.released
    monkeypatch.setattr(module, "same_host", lambda _: False)  # as seen from elsewhere
    acquire(tmp_path, lease_seconds=0.3).release()


def test_a_process_may_be_called_anything() -> None:
    command = "open('/proc/self/comm', 'wb').write(b'kn) S \\xc3'); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert (start_time(process.pid) or 0) >= (start_time(os.getpid()) or 0) > 0
    assert parent_of(process.pid) == os.getpid()
    process.communicate()
    assert start_time(process.pid) is None


def test_losing_is_noticed(tmp_path: Path) -> None:
    lease = acquire(tmp_path / "lock", renew_seconds=0.1)
    write_json(tmp_path / "lock" / "holder-00000099", read_json(max((tmp_path / "lock").glob("holder-*"))))
    assert lease.lost.wait(2)
    lease.release()
    assert read_holder(tmp_path / "lock").released is False  # type: ignore[union-attr]
