"""Which checkpoints stay, when the next one is due, and what `dsft checkpoint` shows."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_state import make_state, save_rank
from safetensors.torch import load_file, save_file

from launcher import cli
from launcher.commands import checkpoint as command
from trainer.checkpoint import Saver
from trainer.checkpoint_files import (
    Checkpoint,
    Retention,
    abandon_after,
    checksum,
    damage,
    differences,
    folder_name,
    list_checkpoints,
    published,
    rank_file,
    remove,
    superfluous,
)
from trainer.checkpoint_interval import (
    PRIOR_MTBF_SECONDS,
    auto_interval_seconds,
    estimate_mtbf_seconds,
    young_daly_seconds,
)
from trainer.config.schema import CheckpointConfig
from trainer.failures import UserError
from trainer.pinned_memory import PinnedMemory
from trainer.rundir import RunDirectory, write_json
from trainer.saving import SavePolicy

ROOT = Path(__file__).parents[2]


def test_storage_that_is_away_puts_a_save_off_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle")

    state = make_state(0, 0, 1)
    run = RunDirectory(tmp_path)
    run.new_attempt()
    saver = Saver(run, state, Retention(2), print)  # type: ignore[arg-type]  # as an Engine
    policy = SavePolicy(CheckpointConfig(interval_steps="auto"), saver, run, 1, 1)
    with monkeypatch.context() as patch:
        for name in ("exists", "unlink", "glob", "mkdir"):
            patch.setattr(Path, name, away)
        assert not policy.due(1)
        problem = saver.missing_space()
    assert problem is not None
    assert "cannot be used: Stale file handle" in problem
    write_json(run.save_request_path(1), {})
    policy._next_poll = 0.0
    assert policy.due(2)
    assert not run.save_request_path(1).exists()


def test_slices_share_chunks_of_pinned_memory_and_are_written_as_they_are(tmp_path: Path) -> None:
    """On a GPU alone they are pinned; torch rounds each piece of that up to a power of two."""
    sizes: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    memory = PinnedMemory(allocate)
    kept = {f"w{n}": memory.empty(70_000 + n, torch.float32).fill_(n) for n in range(40)}
    kept |= {"half": memory.empty(3, torch.bfloat16).fill_(7), "n": memory.empty(1, torch.int64).fill_(9)}
    needed = sum(tensor.nbytes for tensor in kept.values())
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sum(sizes[:-1]) < needed < sum(sizes) < 2 * needed
    save_file(kept, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert [len(memory.empty(size, torch.uint8)) for size in (3 << 29, 1 << 29)] == [3 << 29, 1 << 29]
    assert sizes[-1] == 2 << 30  # for both


def checkpoint(step: int, loss: float | None = None, status: str = "published") -> Checkpoint:
    return Checkpoint(Path(folder_name(step)), step, status, 0, 1, {} if loss is None else {"loss": loss})


def test_a_share_of_the_files_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = whole_checkpoint(tmp_path)
    looked = []
    monkeypatch.setattr("trainer.checkpoint_files.checksum", lambda path: looked.append(path.name) or checksum(path))
    assert [damage(folder, lambda index, rank=rank: index % 2 == rank) for rank in (0, 1)] == [None, None]
    names = [*(rank_file(rank, 3) for rank in range(3)), "state.json"]
    assert looked == [names[0], names[2], names[1], names[3]]
    (folder / names[1]).unlink()
    assert damage(folder, lambda index: index % 2 == 0) is None
    assert f"{names[1]} is missing" in str(damage(folder, lambda index: index % 2 == 1))
    assert f"{names[1]} is missing" in str(damage(folder))


def test_a_checkpoint_is_what_its_name_says_and_its_manifest_lists_all_of_it(tmp_path: Path) -> None:
    folder, manifest = whole_checkpoint(tmp_path)
    assert damage(folder) is None
    copied = shutil.copytree(folder, tmp_path / folder_name(9))
    assert "holds the checkpoint of step 5" in str(damage(copied))
    for name in manifest["files"]:
        files = {other: entry for other, entry in manifest["files"].items() if other != name}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        assert f"does not list {name}" in str(damage(folder))


def test_a_link_to_a_checkpoint_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    folder, _ = whole_checkpoint(tmp_path / "archive")
    link = tmp_path / folder.name
    link.symlink_to(folder)
    assert damage(link) is None
    remove(link)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    assert damage(folder) is None


def whole_checkpoint(parent: Path) -> tuple[Path, dict[str, Any]]:
    """(folder, manifest) of a checkpoint of three ranks."""
    folder = parent / folder_name(5)
    folder.mkdir(parents=True)
    names = [*(rank_file(rank, 3) for rank in range(3)), "state.json"]
    for name in names:
        (folder / name).write_text(name)
    files = {name: {"bytes": len(name), "xxh3_128": checksum(folder / name)} for name in names}
    manifest = {"format": 1, "step": 5, "world_size": 3, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, manifest


def kept(checkpoints: list[Checkpoint], retention: Retention) -> list[int]:
    gone = {c.step for c in superfluous(checkpoints, retention)}
    return [c.step for c in checkpoints if c.step not in gone]


def test_the_last_the_best_and_every_nth_are_kept() -> None:
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 1.5, 5: math.nan, 6: 2.0, 7: None}
    found = [checkpoint(step, loss) for step, loss in losses.items()]
    assert kept(found, Retention(2)) == [6, 7]
    assert kept(found, Retention(1, keep_best=2)) == [2, 4, 7]
    assert kept([checkpoint(step, 1.0) for step in (1, 2, 3, 4)], Retention(1, keep_best=2)) == [1, 2, 4]  # as `judge`
    assert kept(found, Retention(1, keep_every_steps=3)) == [3, 6, 7]
    assert kept([checkpoint(step) for step in (3, 13, 17, 22, 29, 31)], Retention(1, keep_every_steps=10)) == [
        13,
        22,
        31,
    ]


def test_what_was_set_aside_is_not_touched() -> None:
    found = [checkpoint(1), checkpoint(2, status="abandoned"), checkpoint(3, status="unpublished")]
    assert superfluous(found, Retention(1)) == []


@given(
    st.lists(st.tuples(st.integers(1, 500), st.none() | st.floats()), unique_by=lambda item: item[0], min_size=1),
    st.integers(1, 4),
    st.integers(0, 3),
    st.none() | st.integers(1, 60),
)
def test_the_newest_stays_and_thinning_out_twice_changes_nothing(
    found: list[tuple[int, float | None]], last: int, best: int, every: int | None
) -> None:
    checkpoints = [checkpoint(step, loss) for step, loss in found]
    retention = Retention(last, best, every)
    gone = superfluous(checkpoints, retention)
    rest = [c for c in checkpoints if c not in gone]
    assert max(step for step, _ in found) in [c.step for c in rest]
    assert len(rest) >= min(last, len(checkpoints))
    assert superfluous(rest, retention) == []


@pytest.mark.parametrize(("cost", "mtbf"), [(0.1, 86400.0), (5.0, 3600.0), (60.0, 1800.0), (300.0, 1200.0)])
def test_daly_s_interval_loses_least_time(cost: float, mtbf: float) -> None:
    """Against Daly's complete model (2006, eq. 20, without restart time), minimised by trying every interval."""

    def total(interval: float) -> float:
        return mtbf * math.expm1((interval + cost) / mtbf) / interval

    best = min(total(mtbf * 1.001**-n) for n in range(12_000))
    assert total(young_daly_seconds(cost, mtbf)) <= best * 1.002
    assert young_daly_seconds(0.1, 86400.0) == pytest.approx(math.sqrt(2 * 0.1 * 86400.0), rel=0.01)
    assert young_daly_seconds(3000.0, 1000.0) == 1000.0


def test_saves_do_not_follow_each_other_faster_than_they_are_written() -> None:
    assert auto_interval_seconds(0.001, 60.0, 3600.0) == 300.0


def test_the_mtbf_comes_from_the_ledger() -> None:
    day = PRIOR_MTBF_SECONDS

    def estimate(*events: tuple[float, str], now: float = 100.0) -> float:
        return estimate_mtbf_seconds([{"time": time, "event": event} for time, event in events], now)

    assert estimate() == day
    assert estimate((0, "attempt")) == day + 100
    assert estimate((0, "attempt"), (40, "first_step"), (90, "attempt")) == (day + 40 + 10) / 2
    assert estimate((0, "attempt"), (40, "stopped"), (90, "attempt")) == day + 40 + 10
    assert estimate((0, "attempt"), (40, "drill"), (41, "failure"), (90, "attempt")) == day + 41 + 10


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    for step in (2, 4, 6):
        assert save_rank(tmp_path, make_state(step, 0, 1), step, keep=3) is None
    config = {
        "name": "r",
        "task": {"type": "causal-lm"},
        "model": {"path": "/m"},
        "data": {"train": [{"path": "/d"}], "sequence_length": 8},
        "training": {"global_batch_size": 1, "max_steps": 8},
        "checkpoint": {"keep_last": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return RunDirectory(tmp_path)


def dsft(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "launcher", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_going_back_sets_later_ones_aside(run: RunDirectory) -> None:
    assert abandon_after(run, 2) == [f"{folder_name(6)}.abandoned-1", f"{folder_name(4)}.abandoned-1"]
    assert run.published_checkpoints() == [2]
    assert [c.status for c in list_checkpoints(run)] == ["published", "abandoned", "abandoned"]
    with pytest.raises(UserError, match="no checkpoint of step 4; there are 2"):
        published(run, 4)


def test_differences_name_what_differs(run: RunDirectory) -> None:
    folders = [run.checkpoints_dir / folder_name(step) for step in (2, 4)]
    assert list(differences(folders[0], folders[0])) == []
    assert {what for what, _, _ in differences(*folders)} == {
        "state.step",
        "state.batches",
        "files.rank-00000-of-00001.safetensors",
    }


def test_list_verify_and_gc(run: RunDirectory) -> None:
    code, out, _ = dsft("checkpoint", "list", run.path, "--json")
    assert (code, [(c["step"], c["status"]) for c in json.loads(out)]) == (0, [(n, "published") for n in (2, 4, 6)])
    code, out, _ = dsft("checkpoint", "gc", run.path, "--dry-run")
    assert (code, out.count("would remove")) == (0, 2)
    newest = run.checkpoints_dir / folder_name(6) / "state.json"
    whole = newest.read_text()
    newest.write_text(whole.replace("1", "2"))
    code, out, _ = dsft("checkpoint", "verify", run.path)
    assert code == 1
    assert out.splitlines()[:2] == ["step 2: whole", "step 4: whole"]
    assert "state.json does not match its checksum" in out.splitlines()[2]
    code, _, err = dsft("checkpoint", "gc", run.path)
    assert code == 2
    assert "nothing is removed" in err
    assert run.published_checkpoints() == [2, 4, 6]
    newest.write_text(whole)
    code, out, _ = dsft("checkpoint", "gc", run.path)
    assert (code, out.count("removed")) == (0, 2)
    assert run.published_checkpoints() == [6]
    assert dsft("checkpoint", "verify", run.path)[0] == 0


def test_what_a_running_run_removes_meanwhile_is_not_damaged(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def looked_at(folder: Path) -> str | None:
        if folder.name == folder_name(2):
            remove(folder)
        return damage(folder)

    monkeypatch.setattr(command, "damage", looked_at)
    assert cli.main(["checkpoint", "verify", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["step 4: whole", "step 6: whole"]


def test_verbs_say_what_is_wrong(run: RunDirectory) -> None:
    code, _, err = dsft("export", run.path, "--step", 3)
    assert (code, "no checkpoint of step 3; there are 2, 4, 6" in err) == (2, True)
    code, _, err = dsft("checkpoint", "save", run.path)
    assert (code, "is not running" in err) == (2, True)
    code, _, err = dsft("resume", run.path, "--step", 5)
    assert (code, "no checkpoint of step 5" in err) == (2, True)
