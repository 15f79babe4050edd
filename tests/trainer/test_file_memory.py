"""States in files: nothing but their place differs from states in host memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.verdict import Snapshot, classify
from trainer import local_disk
from trainer.failures import UserError, node_name, write_failure
from trainer.file_memory import FileMemory
from trainer.health import UnfitNodeError


def test_tensors_are_zeros_in_files_without_a_name(tmp_path: Path) -> None:
    memory = FileMemory(tmp_path)
    sizes = {torch.float32: 5, torch.bfloat16: 70 << 20, torch.uint8: 0, torch.int64: 3}
    made = [memory.zeros(numel, dtype) for dtype, numel in sizes.items()]
    assert [(t.dtype, t.numel()) for t in made] == list(sizes.items())
    assert not any(t.any() for t in made)
    made[0].fill_(1)
    assert not made[3].any()  # neighbours in one file
    copied = memory.copy(torch.arange(6.0).view(2, 3))
    assert torch.equal(copied, torch.arange(6.0).view(2, 3))
    assert not list(tmp_path.iterdir())


def test_large_ones_keep_no_file_open(tmp_path: Path) -> None:
    """A process may often have but 1024, and a model more tensors than that."""
    memory, before = FileMemory(tmp_path), len(os.listdir("/proc/self/fd"))
    kept = [memory.zeros(9 << 20, torch.uint8) for _ in range(3)]
    kept[0].fill_(1)
    assert not kept[1].any()
    assert len(os.listdir("/proc/self/fd")) == before


PROGRAM = """
import json, sys, time, torch
from trainer.file_memory import FileMemory

def size(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

before = size("RssAnon"), size("RssFile")
tensor = FileMemory(sys.argv[1]).zeros(32 << 20, torch.float32)
tensor.fill_(1)
print(json.dumps([size("RssAnon") - before[0], size("RssFile") - before[1]]), flush=True)
time.sleep(600)
"""


def test_they_are_no_memory_of_the_process_and_gone_with_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout
    anonymous, mapped = json.loads(process.stdout.readline())
    held = Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert anonymous < 16 << 20 < 128 << 20 <= mapped
    assert f"{tmp_path}/" in held
    assert not list(tmp_path.iterdir())


IN_A_SMALL_FILE_SYSTEM = """
import sys, torch
from trainer import local_disk
from trainer.failures import StorageError
from trainer.file_memory import FileMemory

memory = FileMemory(sys.argv[1])
kept = memory.zeros(20 << 20, torch.float32)
try:
    memory.zeros(20 << 20, torch.float32)
except StorageError as error:  # it filled up since it was looked at
    print(error)
kept.fill_(1)
del kept
memory.zeros(20 << 20, torch.float32).fill_(1)
print(local_disk.file_system(__import__("pathlib").Path(sys.argv[1])))
print(local_disk.problem(__import__("pathlib").Path(sys.argv[1]), 1, 1))
"""


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    mount = (
        f"mount -t tmpfs -o size=128m none {tmp_path} && exec {sys.executable} -c '{IN_A_SMALL_FILE_SYSTEM}' {tmp_path}"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount], env=environment, capture_output=True, text=True
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no mount of one's own here: {done.stderr}")
    error, kind, problem = done.stdout.splitlines()
    assert f"needs 0.0839 GB in {tmp_path} beside the 0.0839 GB it has there, and 0.0503 GB are free" in error
    assert kind == "tmpfs"
    assert "is memory itself (tmpfs)" in problem


MOUNTS = [
    "/dev/sda / ext4 rw 0 0",
    "none /local\\040disk tmpfs rw 0 0",
    "h:/home /home nfs4 rw 0 0",
    "x /home/a xfs rw 0 0",
]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/var", "ext4"), ("/local disk/x", "tmpfs"), ("/home/b", "nfs4"), ("/home/a/c", "xfs"), ("/home/ab", "nfs4")],
)
def test_the_file_system_of_a_folder(folder: str, kind: str) -> None:
    assert local_disk.file_system(Path(folder), MOUNTS) == kind


def test_a_folder_that_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_disk.problem(tmp_path, 1, 1 << 20) is None
    assert "is no folder" in str(local_disk.problem(tmp_path / "none", 1, 0))
    assert "cannot be seen (File name too long)" in str(local_disk.problem(tmp_path / ("x" * 300), 1, 0))
    assert "1e+09 GB are needed" in str(local_disk.problem(tmp_path, 1, 10**18))
    monkeypatch.setattr(local_disk, "file_system", lambda folder: "lustre")
    assert local_disk.problem(tmp_path, 1, 0) is None
    assert "on the network (lustre)" in str(local_disk.doubt(tmp_path))
    monkeypatch.setattr(local_disk, "file_system", lambda folder: "btrfs")
    assert "keep it from filling up" in str(local_disk.doubt(tmp_path))


def test_a_disk_of_one_node_is_its_fault_and_that_of_all_the_users(tmp_path: Path) -> None:
    plan = {"nvme": {"path": str(tmp_path), "holds": ["optimizer"]}, "memory": {"nvme": 10**18}}
    serves, does_not = np.array([0]), np.array([1])

    def planned(*others: np.ndarray) -> FileMemory | None:
        return FileMemory.planned(plan, 2, lambda own: [own, *others])

    with pytest.raises(UserError, match="2e\\+09 GB are needed"):
        planned(does_not)
    with pytest.raises(UnfitNodeError, match="2e\\+09 GB are needed") as caught:
        planned(serves)
    record = write_failure(tmp_path, 1, caught.value, None)
    plan["memory"] = {"nvme": 1}
    with pytest.raises(ConnectionError, match="another node") as echo:
        planned(does_not)
    records = [record, write_failure(tmp_path, 0, echo.value, None) | {"node": "another", "time": 0.0}]
    verdict = classify(Snapshot({}, records=records))
    assert (verdict.failure_class, verdict.node, verdict.rank, verdict.unfit) == ("node", node_name(), 1, True)
    memory = planned(serves)
    assert memory is not None
    assert (memory.optimizer, memory.parameters) == (True, False)
    plan["nvme"] = None
    assert planned(serves) is None
