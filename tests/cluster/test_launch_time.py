"""`benchmarks/launch.py` on the real cluster: its figures are there; what they are is for a quiet machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from simulated import Cluster

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
def test_a_launch_is_accepted(cluster: Cluster) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "launch.py"), "--repeats", "1"]
    value = json.loads(cluster.run(*command, seconds=120).stdout)
    print(value)
    assert 0 < value["sbatch_alone_seconds"] < value["median_seconds"] < 20
