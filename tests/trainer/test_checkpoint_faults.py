"""Saves that are killed, find no room, or may not write, at every point: the next start has the newest whole one."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_state import PlainState, make_state, save_rank

from trainer.checkpoint import POINTS, Slices
from trainer.checkpoint_files import abandon, damage, folder_name, list_checkpoints, remove_unpublished
from trainer.engine import Shard
from trainer.rundir import RunDirectory

RANKS = 2
# From here on the checkpoint is there, whatever happens then
PUBLISHED = {"published", "retain"}


def rank_process(path: Path, rank: int, step: int, point: str | None, fault: str) -> None:
    def at_point(reached: str) -> None:
        if reached == point:
            if fault == "kill":
                os._exit(9)
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    torch.set_num_threads(1)
    error = save_rank(path, make_state(step, rank, RANKS), step, at_point)
    os._exit(0 if error is None else 1)


def save(path: Path, step: int, rank_at_fault: int = -1, point: str | None = None, fault: str = "kill") -> list[int]:
    """Save with all ranks; their exit codes. Ranks that wait for a killed one are killed, as their agent would."""
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(RANKS):
        where = point if rank == rank_at_fault else None
        processes.append(context.Process(target=rank_process, args=(path, rank, step, where, fault)))
        processes[-1].start()
    victim = processes[rank_at_fault] if rank_at_fault >= 0 else processes[0]
    victim.join(30)
    for process in processes:
        process.join(1 if victim.exitcode == 9 else 30)
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


@pytest.mark.parametrize(("rank", "point"), [(rank, point) for rank in range(RANKS) for point in reached_by(rank)])
def test_killed_at_any_point_the_newest_whole_checkpoint_is_there(rank: int, point: str, tmp_path: Path) -> None:
    assert save(tmp_path, 1) == [0, 0]
    codes = save(tmp_path, 2, rank, point)
    assert codes[rank] == 9, "the point was not reached"
    step, _ = newest_whole(tmp_path)
    assert step == (2 if point in PUBLISHED else 1)
    assert save(tmp_path, 3) == [0, 0]  # and the run goes on
    assert newest_whole(tmp_path) == (3, [])


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


def test_a_folder_without_rights_is_a_failed_save(tmp_path: Path) -> None:
    """The checkpoints folder is a file, which stops root as well."""
    (tmp_path / "checkpoints").write_text("")
    error = save_rank(tmp_path, make_state(1, 0, 1), 1)
    assert error is not None
    assert "checkpoint of step 1 not written" in error


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing", "manifest", "state"])
def test_damage_is_named_and_passed_over(harm: str, tmp_path: Path) -> None:
    for step in (1, 2):
        assert save(tmp_path, step) == [0, 0]
    folder = tmp_path / "checkpoints" / folder_name(2)
    path = folder / "rank-00001-of-00002.safetensors"
    if harm in ("flipped", "state"):
        path = path if harm == "flipped" else folder / "state.json"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    elif harm == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif harm == "missing":
        path.unlink()
    else:
        path = folder / "manifest.json"
        path.write_text(path.read_text()[:-20])
    step, said = newest_whole(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert str(path if harm != "manifest" else folder) in said[0]
    assert (tmp_path / "checkpoints" / f"{folder_name(2)}.abandoned-1").is_dir()


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
