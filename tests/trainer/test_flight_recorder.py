"""Flight recorder: what ranks on GPUs find in their environment, and the pipe by which a dump is asked for."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from trainer import flight_recorder


def test_a_rank_records_into_its_attempt_unless_the_user_has_other_plans(tmp_path: Path) -> None:
    found = flight_recorder.variables(tmp_path, 77, {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    assert found["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "flight" / "rank")
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in found
    assert flight_recorder.variables(tmp_path, 77, {})["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


def test_torch_knows_the_variables(tmp_path: Path) -> None:
    """A name that torch has given up would be ignored without a word."""
    folder = Path(torch.__file__).parent
    header = (folder / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_bytes()
    with open(folder / "lib/libtorch_cpu.so", "rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for name in flight_recorder.variables(tmp_path, 1, {}):
            assert name.encode() in header or library.find(name.encode()) >= 0, name


def test_a_dump_is_asked_for_by_a_pipe_of_each_rank() -> None:
    """As torch makes and reads it; a rank that does not record has none."""
    pid = os.getpid()
    path = f"/tmp/dsft-flight-{pid}-rank3.pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        flight_recorder.ask(pid, [2, 3])
        assert os.read(reader, 10) == b"1\n"
    finally:
        os.close(reader)
        flight_recorder.ask(pid, [3])  # nobody reads: it does not wait
        flight_recorder.clear(pid, [2, 3])
    assert not Path(path).exists()
