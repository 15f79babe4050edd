"""The probe on this machine's processor: it costs little, and its heartbeat shows a rank that gets less of its core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from launcher.stragglers import slow_ranks
from trainer import heartbeat, stragglers

PROGRAM = """
import sys, time
from pathlib import Path
import torch
from trainer import heartbeat, stragglers
heartbeat.start(Path(sys.argv[1]), int(sys.argv[2]))
probe = stragglers.Probe(torch.device("cpu"))
while True:
    probe.run()
    time.sleep(0.05)
"""


def test_it_is_due_once_a_minute_and_publishes_what_it_took() -> None:
    probe = stragglers.Probe(torch.device("cpu"))
    assert not probe.due()
    count = heartbeat._state.probes
    start = time.perf_counter()
    probe.run()
    seconds = time.perf_counter() - start
    assert heartbeat._state.probes == count + 1
    assert 0 < heartbeat._state.probe_seconds < seconds
    assert not probe.due()
    probe._next = 0.0
    assert probe.due()


def test_a_rank_that_is_held_up_shows_in_its_probe(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / f"rank{k}"), str(k)], env=environment)
        for k in (0, 1)
    ]

    def beats() -> dict[int, heartbeat.Heartbeat]:
        found = (heartbeat.read(tmp_path / f"rank{k}") for k in (0, 1))
        return {beat.rank: beat for beat in found if beat is not None and beat.probes}

    try:
        deadline = time.monotonic() + 90
        while len(beats()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        slow = 0
        while slow < 3:  # rank 1 runs one millisecond in five
            assert time.monotonic() < deadline, beats()
            count = beats()[1].probes
            while beats()[1].probes == count:
                ranks[1].send_signal(signal.SIGSTOP)
                time.sleep(0.004)
                ranks[1].send_signal(signal.SIGCONT)
                time.sleep(0.001)
            slow = slow + 1 if 1 in slow_ranks({k: beat.probe_seconds for k, beat in beats().items()}) else 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
