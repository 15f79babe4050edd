"""Heartbeats of real processes: what they publish, while they wait, and while storage or the process stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import heartbeat
from trainer.collectives import timeout_seconds
from trainer.config.schema import ResilienceConfig
from trainer.heartbeat import INTERVAL_SECONDS, STACK_SIGNAL, Heartbeat, read

ROOT = str(Path(__file__).resolve().parents[2])
PROGRAM = """
import os, sys, time
from pathlib import Path
from trainer import heartbeat
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
heartbeat.write_stacks_on_signal(folder / "stacks" / f"rank{rank}.txt")
heartbeat.start(folder / "heartbeats" / f"rank{rank}", rank)
"""
COLLECTIVES = """
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
control = dist.new_group(backend="gloo")
def stuck():
    time.sleep(300)
for step in (1, 2, 3):
    mark = heartbeat.enter("data", step)
    heartbeat.enter("step")
    if rank == 1 and step == 3:
        stuck()
    dist.all_reduce(torch.ones(2))
    dist.all_reduce(torch.ones(2), group=control)
    heartbeat.step_done(mark, 0.25)
"""


def start(program: str, folder: Path, rank: int = 0) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM + program, str(rank), str(folder)], env=environment)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def beat(folder: Path, rank: int = 0) -> Heartbeat | None:
    return read(folder / "heartbeats" / f"rank{rank}")


def test_a_rank_that_did_not_enter_a_collective_shows_in_its_heartbeat(tmp_path: Path) -> None:
    ranks = [start(COLLECTIVES, tmp_path, rank) for rank in (0, 1)]
    try:

        def beats() -> list[Heartbeat]:
            return [found for rank in (0, 1) if (found := beat(tmp_path, rank)) is not None]

        wait_for(
            lambda: [found.step for found in beats()] == [3, 3] and beats()[0].collectives != beats()[1].collectives
        )
        waiting, stuck = beats()
        assert (waiting.phase, stuck.phase, waiting.progress) == ("step", "step", stuck.progress)
        assert waiting.data_seconds == stuck.data_seconds == 0.25
        assert 0 < waiting.step_seconds <= waiting.longest_step_seconds
        assert waiting.collectives == (stuck.collectives[0] + 1, stuck.collectives[1])
        wait_for(lambda: all(new.beats > old.beats for new, old in zip(beats(), (waiting, stuck), strict=True)))
        assert [found.signs() for found in beats()] == [waiting.signs(), stuck.signs()]  # alive, but not getting on

        for rank in ranks:
            rank.send_signal(STACK_SIGNAL)
        stacks = [tmp_path / "stacks" / f"rank{rank}.txt" for rank in (0, 1)]
        for path, place in zip(stacks, ("in all_reduce", "in stuck"), strict=True):
            wait_for(lambda path=path, place=place: place in path.read_text())  # the main thread's comes last
            assert "heartbeat.py" in path.read_text()  # the publishing thread's, too
        assert [rank.poll() for rank in ranks] == [None, None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_suspended_process_is_told_from_one_that_waits(tmp_path: Path) -> None:
    rank = start("time.sleep(300)", tmp_path)
    try:
        wait_for(lambda: beat(tmp_path) is not None)
        rank.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        before = beat(tmp_path)
        time.sleep(1.5 * INTERVAL_SECONDS)
        assert beat(tmp_path) == before
        rank.send_signal(signal.SIGCONT)
        wait_for(lambda: beat(tmp_path) != before)
    finally:
        rank.kill()
        rank.wait()


def test_the_begin_and_the_end_of_a_slow_phase_are_published_at_once(tmp_path: Path) -> None:
    """Else a rank suspended right after an evaluation has the long limit of that phase: its last word is an old one."""
    slow = "heartbeat.INTERVAL_SECONDS = 300; heartbeat.enter('data', 8)"
    go = "\nwhile not (folder / 'go').exists(): time.sleep(0.01)\n"
    rank = start(f"{slow}; heartbeat.enter('evaluation', 8){go}heartbeat.enter('data', 9); time.sleep(300)", tmp_path)
    try:
        for phase in ("evaluation", "data"):
            wait_for(lambda phase=phase: (found := beat(tmp_path)) and found.phase == phase, 20)
            (tmp_path / "go").touch()
    finally:
        rank.kill()
        rank.wait()


def test_the_last_word_is_that_it_has_ended(tmp_path: Path) -> None:
    """And its thread has ended with it: a rank waits for that."""
    words = "heartbeat.enter('export', 9); heartbeat.finish(); os._exit(heartbeat._publisher.is_alive())"
    rank = start(words, tmp_path)
    assert rank.wait(60) == 0
    last = beat(tmp_path)
    assert last is not None
    assert (last.phase, last.step) == ("ended", 9)


def test_storage_that_stands_still_does_not_hold_up_the_main_thread(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    os.mkfifo(tmp_path / "heartbeats" / "rank0")  # to open it for writing blocks for ever
    began = "t = time.perf_counter(); [heartbeat.enter('step', n) for n in range(10_000)]"
    rank = start(f"{began}; heartbeat.finish(); os._exit(time.perf_counter() - t > 10)", tmp_path)
    assert rank.wait(60) == 0


def test_a_group_that_was_left_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after going back behind a bad step: else it would be blamed for the next hang."""

    class Group:
        def __init__(self, entered: int) -> None:
            self.size, self._get_sequence_number_for_group = lambda: 2, lambda: entered

    groups = [Group(30), Group(7), Group(2)]
    world = SimpleNamespace(_world=SimpleNamespace(pg_map=dict.fromkeys(groups)))
    monkeypatch.setitem(sys.modules, "torch.distributed.distributed_c10d", world)  # type: ignore[arg-type]
    monkeypatch.setattr(heartbeat, "_passed_over", [])
    assert heartbeat._collectives() == (30, 7, 2)
    heartbeat.pass_over(groups[1])
    assert heartbeat._collectives() == (30, 2)


def test_the_supervisor_judges_slow_phases_before_a_collective_gives_up() -> None:
    for seconds in (60.0, 1800.0, 10_000.0):
        assert timeout_seconds(ResilienceConfig(slow_phase_timeout_seconds=seconds)) >= max(seconds + 60, 1800)
