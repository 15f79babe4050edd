"""The kernel's words about GPUs and memory, in the format of /dev/kmsg."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.kernel_log import broken_device, read_kernel_log, since_boot, telling

# As drivers 470 to 570 and Linux 5.x and 6.x write them, behind what /dev/kmsg puts before
RECORDS = [
    "4,1203,98000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n",
    "6,1300,100000000,-;eth0: link becomes ready\n SUBSYSTEM=net\n",
    "4,1301,100500000,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=2317, name=python, Ch 00000008, intr 00000000. MMU Fault\n",
    "4,1302,101000000,c;NVRM: Xid (PCI:0000:86:00): 48, pid=2317, DBE (double bit error)\n",
    "3,1303,102000000,-;Memory cgroup out of memory: Killed process 4101 (python3) total-vm:9000kB, anon-rss:400kB\n",
    "3,1304,103000000,-;Out of memory: Killed process 7 (pt_main_thread) total-vm:1kB\n",
    "not a record",
    "4,x,y,-;NVRM: Xid (PCI:0000:3b:00): 79\n",
]


def test_only_what_tells_and_is_new_counts() -> None:
    lines = telling(RECORDS, since=99.0)
    assert [line[:12] for line in lines] == ["NVRM: Xid (P", "NVRM: Xid (P", "Memory cgrou", "Out of memor"]
    assert "fallen off" in telling(RECORDS, since=97.0)[0]


def test_a_fault_of_a_program_is_none_of_the_device() -> None:
    lines = telling(RECORDS, since=99.0)
    assert (broken_device(lines) or "").startswith("NVRM: Xid (PCI:0000:86:00): 48")
    assert broken_device(lines[:1]) is None  # 31: the program's own


def test_a_log_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    assert read_kernel_log(str(tmp_path / "none")) == []
    assert all(";" in record for record in read_kernel_log())
    assert telling(read_kernel_log(), since_boot() + 1.0) == []


def test_reading_goes_on_behind_what_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a broken GPU fills the log."""
    answers: list[bytes | OSError] = [b"1", BrokenPipeError(), b"3", BlockingIOError()]

    def read(_descriptor: int, _size: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("trainer.kernel_log.os.read", read)
    assert read_kernel_log("/dev/null") == ["1", "3"]
