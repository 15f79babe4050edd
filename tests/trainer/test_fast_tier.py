"""Checkpoints on node-local storage: a restart on the same nodes loses less, and never takes a wrong part."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from plain_state import make_state
from training_runs import figures, launch, launch_and_kill, logs, make_run

from trainer.checkpoint import Saver
from trainer.checkpoint_files import Retention, abandon_after, differences, folder_name
from trainer.fast_tier import FastTier
from trainer.rundir import RunDirectory

DETAILS = {"data": {}, "progress": 0.0, "batches": 1, "losses": []}


def tier(tmp_path: Path, rank: int = 0, token: int = 7) -> FastTier:
    made = FastTier(str(tmp_path / "node"), RunDirectory(tmp_path / "run"), rank, 2, lambda array: [array])
    made.token = token
    return made


def save_fast(tmp_path: Path, step: int, shared: bool = False, token: int = 7) -> None:
    """By both ranks, which share a node."""
    savers = []
    for rank in range(2):
        fast = tier(tmp_path, rank, token)
        state = make_state(step, rank, 2)
        run = RunDirectory(tmp_path / "run")
        run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        savers.append(Saver(run, state, Retention(9), lambda *_, **__: None, fast=fast))  # type: ignore[arg-type]
        (savers[-1].save if shared else savers[-1].save_fast)(step, DETAILS)
    for saver in savers:
        assert saver.wait(30)
        assert saver.error is None


def test_the_last_ones_stay_and_shared_storage_says_which_count(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for step in (2, 4, 6, 8):
        save_fast(tmp_path, step)
    fast = tier(tmp_path, 1)
    assert fast.listed(0) == [(8, 7), (6, 7), (4, 7)]
    assert fast.listed(6) == [(8, 7)]
    assert sorted(path.name for path in fast.folder.iterdir()) == [folder_name(step) for step in (4, 6, 8)]
    folder, state = fast.part(8, 7)  # type: ignore[misc]
    assert (folder.name, state["step"]) == (folder_name(8), 8)  # type: ignore[call-overload,union-attr]
    assert "has no" in fast.part(8, 8), "of another save"  # type: ignore[operator]
    path = next((fast.folder / folder_name(8)).glob("rank-00001*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in fast.part(8, 7)  # type: ignore[operator]
    assert tier(tmp_path, 0).part(8, 7)[1]["step"] == 8  # type: ignore[index,call-overload]
    assert run.published_checkpoints() == []
    assert abandon_after(run, 4) == []
    assert fast.listed(0) == [], "gone back to step 4: no later one counts"
    for step in (5, 7):
        save_fast(tmp_path, step)
    assert fast.listed(0) == [(7, 7), (5, 7)]
    assert isinstance(fast.part(5, 7), tuple), "those of before are the first to go"
    (fast.folder / folder_name(2)).mkdir()
    (fast.folder / folder_name(2) / "rank-00002-of-00003.json").touch()  # of an attempt with more ranks
    fast.clear()
    assert list((tmp_path / "node").iterdir()) == []


def test_what_is_flushed_is_what_is_written_directly(tmp_path: Path) -> None:
    save_fast(tmp_path, 4, shared=True)
    flushed = tmp_path / "run" / "checkpoints" / folder_name(4)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "flushed")
    for rank in (1, 0):
        run = RunDirectory(tmp_path / "run")
        saver = Saver(run, make_state(4, rank, 2), Retention(9), lambda *_, **__: None)  # type: ignore[arg-type]
        saver.save(4, DETAILS)
        if rank == 0:
            assert saver.wait(30)
    assert saver.error is None
    # but for buffers, of which every rank has its own
    found = list(differences(flushed, tmp_path / "flushed" / folder_name(4)))
    assert [what for what, _, _ in found] == ["files.rank-00001-of-00002.safetensors"]


def test_without_room_there_it_is_written_directly(tmp_path: Path) -> None:
    told = []
    run = RunDirectory(tmp_path / "run")
    fast = FastTier(str(tmp_path / "node"), run, 0, 1, lambda array: [np.asarray(array)])
    shutil.rmtree(fast.folder)
    fast.folder.write_text("no folder")
    saver = Saver(run, make_state(2, 0, 1), Retention(9), lambda event, **_: told.append(event), fast=fast)  # type: ignore[arg-type]
    saver.save(2, DETAILS)
    assert saver.wait(30)
    assert told == ["checkpoint_fast_failed", "checkpoint"]
    assert run.published_checkpoints() == [2]


SECTIONS = {"evaluation": {}, "export": {"enabled": False}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> RunDirectory:
    """Without a fast tier."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", workspace, 2, sections=SECTIONS)
    assert launch(run, 2) == 0, logs(run)
    return run


@pytest.mark.matrix
@pytest.mark.parametrize(("harm", "start"), [("none", 8), ("flipped byte", 6), ("another node", 4)])
def test_a_killed_run_goes_on_bit_for_bit(
    harm: str, start: int, whole: RunDirectory, workspace: Path, tmp_path: Path
) -> None:
    """Killed while step 8 is flushed: goes on from there, or from the newest of which every rank has its part."""
    node = tmp_path / "node"
    settings = {"interval_steps": 4, "fast_interval_steps": 2, "fast_dir": str(node), "keep_last": 3}
    run = make_run(tmp_path / "run", workspace, 2, sections={**SECTIONS, "checkpoint": settings})
    launch_and_kill(run, 2, "8:0:manifest")
    assert run.published_checkpoints() == [4]
    (kept,) = node.iterdir()
    parts = sorted(kept.glob("*/rank-00001*.safetensors"))
    if harm == "flipped byte":
        for path in parts:  # those after step 6, which may or may not have come to be
            if path.parent.name > folder_name(6):
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
    elif harm == "another node":
        for path in parts:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    assert launch(run, 2, attempt=2) == 0, logs(run)
    log = logs(run)
    if harm == "none":  # step 10 may have been reached
        assert f"resumed from {kept}/step-" in log
    else:
        assert f"resumed from {kept if start == 6 else run.checkpoints_dir}/{folder_name(start)}" in log
        assert "warning: fast checkpoint of step 8 is not used: " in log
    assert figures(run) == figures(whole)
    ends = [one.checkpoints_dir / folder_name(12) for one in (run, whole)]
    different = [what for what, _, _ in differences(*ends)]
    assert set(different) <= {"state.config_hash", "files.rank-00001-of-00002.safetensors"}
    assert not list(node.iterdir()), "nothing is left on the nodes"
