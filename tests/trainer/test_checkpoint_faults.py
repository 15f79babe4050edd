"""Saves that are killed, find no room, or may not write, at every point: the next start has the newest whole one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_state import PlainState, make_state, save_rank

from trainer.checkpoint import POINTS, Saver
from trainer.checkpoint_files import Retention, abandon, damage, folder_name, list_checkpoints, remove_unpublished
from trainer.parameters import Shard
from trainer.rundir import RunDirectory
from trainer.slices import Slices

pytestmark = pytest.mark.faults

RANKS = 2
# From here on the checkpoint is there, whatever happens then
PUBLISHED = {"published", "retain"}


def rank_process(path: Path, rank: int, step: int, point: str | None, fault: str, reached_it: Any) -> None:
    def at_point(reached: str) -> None:
        if reached == point:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "kill all":
                reached_it.set()
                time.sleep(60)  # until it is killed, with all the others
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    torch.set_num_threads(1)
    if fault == "stopped writing" and rank == 1:  # by the kernel
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    error = save_rank(path, make_state(step, rank, RANKS), step, at_point)
    os._exit(0 if error is None else 1)


def save(path: Path, step: int, rank_at_fault: int = -1, point: str | None = None, fault: str = "kill") -> list[int]:
    """Save with all ranks; their exit codes. Ranks that wait for a killed one are killed, as their agent would.

    "kill all": when the rank is at the point, every rank is killed, wherever it is.
    """
    context = multiprocessing.get_context("fork")
    processes = []
    reached = context.Event()
    for rank in range(RANKS):
        where = point if rank == rank_at_fault else None
        processes.append(context.Process(target=rank_process, args=(path, rank, step, where, fault, reached)))
        processes[-1].start()
    if fault == "kill all":
        assert reached.wait(30), "the point was not reached"
        for process in processes:
            process.kill()
    victim = processes[rank_at_fault] if rank_at_fault >= 0 else processes[0]
    victim.join(30)
    for process in processes:
        process.join(0.3 if (victim.exitcode or 0) < 0 else 30)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def newest_whole(path: Path) -> tuple[int, list[str]]:
    """What a start does: (the step it goes on from, what it says about the others)."""
    run = RunDirectory(path)
    said = remove_unpublished(run.checkpoints_dir)
    for step in reversed(run.published_checkpoints()):
        folder = run.checkpoints_dir / folder_name(step)
        found = damage(folder)
        if found is None:
            assert_holds(folder, step)
            return step, said
        said.append(found)
        abandon(folder)
    return 0, said


def assert_holds(folder: Path, step: int) -> None:
    """Every element of every slice is the one of this step."""
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == step
    slices = Slices(folder, state)
    expected = make_state(step, 0, 1)
    for shard in expected.shards():
        for kind, tensor in shard.tensors.items():
            found = torch.empty_like(tensor)
            slices.read_into(f"{kind}/{shard.name}", Shard(shard.name, shard.numel, 0, shard.numel, {}), found)
            assert torch.equal(found, tensor), (kind, shard.name)
    counter = torch.empty(1, dtype=torch.int64)
    slices.read_into("buffer/n", Shard("n", 1, 0, 1, {}), counter)
    assert counter.item() == step


def reached_by(rank: int) -> list[str]:
    return [point for point in POINTS if rank == 0 or POINTS.index(point) <= POINTS.index("report")]


@pytest.mark.parametrize("fault", ["kill", "kill all"])
@pytest.mark.parametrize(("rank", "point"), [(rank, point) for rank in range(RANKS) for point in reached_by(rank)])
def test_killed_at_any_point_the_newest_whole_checkpoint_is_there(
    rank: int, point: str, fault: str, tmp_path: Path
) -> None:
    """One rank, or all of them while this one is there."""
    assert save(tmp_path, 1) == [0, 0]
    codes = save(tmp_path, 2, rank, point, fault)
    assert codes[rank] == -signal.SIGKILL, "the point was not reached"
    step, said = newest_whole(tmp_path)
    left_behind = point not in (*PUBLISHED, "folder")  # the other rank may have made it even then
    assert not left_behind or said == [folder_name(2)], "what is passed over is named"
    assert step == (2 if point in PUBLISHED else 1)
    assert save(tmp_path, 3) == [0, 0]  # and the run goes on
    assert newest_whole(tmp_path) == (3, [])


def test_a_rank_that_fails_before_there_is_a_folder_is_heard(tmp_path: Path) -> None:
    def refuse(point: str) -> None:
        if point == "folder":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assert save_rank(tmp_path, make_state(1, 1, RANKS), 1, refuse)
    assert "rank 1 could not write its part" in str(save_rank(tmp_path, make_state(1, 0, RANKS), 1))
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("fault", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize(("rank", "point"), [(rank, point) for rank in range(RANKS) for point in reached_by(rank)])
def test_a_failed_save_harms_nothing_and_leaves_nothing(rank: int, point: str, fault: str, tmp_path: Path) -> None:
    assert save(tmp_path, 1) == [0, 0]
    codes = save(tmp_path, 2, rank, point, fault)
    published = point in PUBLISHED
    assert codes[rank] == codes[0] == (0 if published else 1), "rank 0 hears of every failure"
    step, _ = newest_whole(tmp_path)
    assert step == (2 if published else 1)
    if not published:
        assert [c.step for c in list_checkpoints(RunDirectory(tmp_path))] == [1], "the space was not given back"
        assert save(tmp_path, 2) == [0, 0]  # the same step again
        assert newest_whole(tmp_path)[0] == 2


def test_a_file_that_the_kernel_stops_half_way(tmp_path: Path) -> None:
    """At 700 bytes, fewer than the slices of rank 1 have."""
    assert save(tmp_path, 1) == [0, 0]
    assert save(tmp_path, 2, 1, None, "stopped writing") == [1, 1]
    assert newest_whole(tmp_path) == (1, [])
    assert save(tmp_path, 2) == [0, 0]
    assert newest_whole(tmp_path) == (2, [])


def test_killed_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """A file of 300 MB is written: as soon as it is seen, its writer is killed."""
    assert save_rank(tmp_path, make_state(1, 0, 1), 1) is None
    folder = tmp_path / "checkpoints" / folder_name(2)

    def write() -> None:
        torch.set_num_threads(1)  # the parent's threads are not in a forked child, which would wait for them
        state = PlainState(0, 1, {"a": torch.zeros(100 << 20, dtype=torch.uint8)})
        save_rank(tmp_path, state, 2)

    writer = multiprocessing.get_context("fork").Process(target=write, daemon=True)
    writer.start()
    deadline = time.monotonic() + 30
    while not (folder.is_dir() and any(folder.iterdir())):
        assert time.monotonic() < deadline
    writer.kill()
    writer.join()
    assert not (folder / "rank-00000-of-00001.safetensors").exists(), "it was too late"
    assert newest_whole(tmp_path) == (1, [folder_name(2)])


def can_mount() -> bool:
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.mark.skipif(not can_mount(), reason="no namespaces of one's own here, so no small disk")
def test_a_disk_that_is_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o size=48k none {tmp_path} && exec {sys.executable} {__file__} {tmp_path}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*NAMESPACE, "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0] == "step 1: None"
    assert "checkpoint of step 2 not written" in told[1]
    assert "No space left on device" in told[1]
    assert told[2:4] == ["there: [1], space given back: True", "step 2: None"]
    assert "checkpoint of step 3 not written" in told[4]
    assert "Read-only file system" in told[4]
    assert told[5:] == ["newest whole: 2", "step 3: None", "newest whole: 3"]


def on_a_small_disk(path: Path) -> None:
    """Run by the test above in a mount namespace."""

    def attempt(step: int) -> None:
        print(f"step {step}: {save_rank(path, make_state(step, 0, 1), step)}")

    def mount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=True)

    attempt(1)
    with (path / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    os.truncate(path / "filler", (path / "filler").stat().st_size - 4096)  # a small file fits, all of them do not
    before = os.statvfs(path).f_bfree
    attempt(2)
    there = [checkpoint.step for checkpoint in list_checkpoints(RunDirectory(path))]
    print(f"there: {there}, space given back: {os.statvfs(path).f_bfree == before}")
    (path / "filler").unlink()
    attempt(2)
    mount("ro")
    attempt(3)
    mount("rw")
    print(f"newest whole: {newest_whole(path)[0]}")
    attempt(3)
    print(f"newest whole: {newest_whole(path)[0]}")


def test_two_saves_in_a_row(tmp_path: Path) -> None:
    """The second waits for the first, whose buffers it would overwrite; killed then, the first is whole."""

    def slow(point: str) -> None:
        if point == "write":
            time.sleep(0.3)

    state = make_state(1, 0, 1)
    saver = Saver(RunDirectory(tmp_path), state, Retention(3), lambda *_, **__: None, slow)  # type: ignore[arg-type]
    details = {"data": {}, "progress": 0.0, "losses": []}
    first = saver.save(1, {**details, "batches": 1})
    for tensors in (state.trained, state.kept):
        for name, tensor in make_state(2, 0, 1).trained.items() | make_state(2, 0, 1).kept.items():
            if name in tensors:
                tensors[name].copy_(tensor)
    second = saver.save(2, {**details, "batches": 2})
    assert second > 0.2 > first, "training waited for the first save"
    saver.wait()
    for step in (1, 2):
        assert_holds(tmp_path / "checkpoints" / folder_name(step), step)
    assert save(tmp_path, 3) == [0, 0]
    save(tmp_path, 4, 1, "rename", "kill all")
    assert newest_whole(tmp_path) == (3, [folder_name(4)])


def test_a_folder_without_rights_is_a_failed_save(tmp_path: Path) -> None:
    """The checkpoints folder is a file, which stops root as well."""
    (tmp_path / "checkpoints").write_text("")
    error = save_rank(tmp_path, make_state(1, 0, 1), 1)
    assert error is not None
    assert "checkpoint of step 1 not written" in error


FILES = ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "state.json", "manifest.json")


def test_damage_is_named_and_passed_over(tmp_path: Path) -> None:
    """Any file of a checkpoint: a flipped byte, the last byte cut off, the file gone."""
    whole = tmp_path / "whole"
    for step in (1, 2):
        assert save(whole, step) == [0, 0]
    for name, harm in itertools.product(FILES, ("flipped", "truncated", "missing")):
        run = tmp_path / f"{name}-{harm}"
        shutil.copytree(whole, run)
        path = run / "checkpoints" / folder_name(2) / name
        if harm == "missing":
            path.unlink()
        elif harm == "truncated":
            os.truncate(path, path.stat().st_size - 2)
        else:
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)
        step, said = newest_whole(run)
        if (name, harm) == ("manifest.json", "flipped"):
            assert step in (1, 2)  # white space, perhaps
            continue
        assert (step, len(said)) == (1, 1), (name, harm)
        if (name, harm) == ("manifest.json", "missing"):
            assert said == [folder_name(2)]  # removed: it was never published
            continue
        assert str(path if name != "manifest.json" else path.parent) in said[0]
        assert (run / "checkpoints" / f"{folder_name(2)}.abandoned-1").is_dir()


def test_a_published_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    assert save_rank(tmp_path, make_state(1, 0, 1), 1) is None
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / folder_name(1)).iterdir()}
    error = save_rank(tmp_path, make_state(7, 0, 1), 1)
    assert error is not None
    assert "never overwritten" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / folder_name(1)).iterdir()} == before


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    """Every file is JSON, or safetensors: a JSON header and exactly the raw bytes that it describes."""
    assert save(tmp_path, 1) == [0, 0]
    files = sorted((tmp_path / "checkpoints" / folder_name(1)).iterdir())
    assert [file.suffix for file in files].count(".safetensors") == RANKS
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".json":
            json.loads(data)
            continue
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        spans = sorted(entry["data_offsets"] for entry in header.values())
        assert spans[0][0] == 0
        assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
        assert 8 + length + spans[-1][1] == len(data)
        assert all(entry["dtype"] in ("F32", "I64") for entry in header.values())


def test_no_code_of_a_checkpoint_or_export_can_read_a_pickle() -> None:
    import trainer

    folder = Path(trainer.__file__).parent
    for path in [*folder.glob("checkpoint*.py"), *folder.glob("export*.py")]:
        assert not re.search(r"pickle|torch\.(load|save)\b", path.read_text().replace("no pickle", "")), path


def test_distributed_checkpoint_reads_our_files(tmp_path: Path) -> None:
    """torch.distributed.checkpoint's own reader puts the slices of all ranks together."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    assert save(tmp_path, 4) == [0, 0]
    expected = {
        f"{kind}/{shard.name}": tensor.clone()
        for shard in make_state(4, 0, 1).shards()
        for kind, tensor in shard.tensors.items()
    }
    found = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    reader = HuggingFaceStorageReader(str(tmp_path / "checkpoints" / folder_name(4)))
    dcp.load(found, storage_reader=reader, no_dist=True)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_a_small_parameter_may_have_no_slice_on_the_last_rank(tmp_path: Path) -> None:
    for rank in (2, 1, 0):
        state = PlainState(rank, 3, {"tiny": torch.tensor([5.0])})
        assert save_rank(tmp_path, state, 1) is None
    folder = tmp_path / "checkpoints" / folder_name(1)
    found = torch.zeros(1)
    slices = Slices(folder, json.loads((folder / "state.json").read_text()))
    slices.read_into("master/tiny", Shard("tiny", 1, 0, 1, {}), found)
    assert found.item() == 5.0


if __name__ == "__main__":
    on_a_small_disk(Path(sys.argv[1]))
