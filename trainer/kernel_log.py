"""What the kernel says about this node while ranks run: errors of GPUs (NVIDIA's Xid), kills for memory. Torch-free.

/dev/kmsg has a record for each message: `priority,sequence,microseconds since boot,flags;text` (Documentation/ABI/
testing/dev-kmsg of the kernel). Ordinary users may read it where the sysctl kernel.dmesg_restrict is 0.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable

# Xids after which the device, its memory or its link is not to be trusted before somebody has looked at it: an
# uncorrectable memory error (48, 95), a row that could not be remapped (64), NVLink (74), fallen off the bus (79), its
# system processor (119, 120) and an unrecovered ECC error (140); by NVIDIA's catalogue of Xid errors
BROKEN_DEVICE = frozenset({48, 64, 74, 79, 95, 119, 120, 140})
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_KILL = re.compile(r"(?:Out of memory|Memory cgroup out of memory): Killed process \d+ \(")
_LARGEST_RECORD = 8192
_MOST_LINES = 10


def since_boot() -> float:
    """Seconds on the kernel log's clock."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def read_kernel_log(path: str = "/dev/kmsg") -> list[str]:
    """All records that the kernel still has, oldest first; none where this user may not read them."""
    records: list[str] = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return records
    try:
        while True:
            try:
                if not (data := os.read(descriptor, _LARGEST_RECORD)):
                    return records
                records.append(data.decode(errors="replace"))
            except BrokenPipeError:  # the next one was overwritten: the kernel goes on with the oldest that is left
                continue
            except OSError:  # the end, most of all
                return records
    finally:
        os.close(descriptor)


def telling(records: Iterable[str], since: float) -> list[str]:
    """The messages about GPUs and kills for memory, from `since` on (seconds since boot); the last few."""
    found = []
    for record in records:
        head, _, text = record.partition(";")
        fields = head.split(",")
        if len(fields) < 3 or not fields[2].isdecimal() or int(fields[2]) < 1e6 * since:
            continue
        line = text.split("\n")[0]
        if _XID.search(line) or _KILL.search(line):
            found.append(line)
    return found[-_MOST_LINES:]


def broken_device(lines: Iterable[str]) -> str | None:
    """The first message which says that a GPU, its memory or its link is broken, not just a program on it."""
    for line in lines:
        if (match := _XID.search(line)) and int(match[2]) in BROKEN_DEVICE:
            return line
    return None
