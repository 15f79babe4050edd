"""States in files on nodes of which one has no disk: the run goes on without it, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launched import Launched, set_variables, write_config
from simulated import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.matrix, pytest.mark.faults, pytest.mark.timeout(300)]


def on_disk(folder: Path, disk: Path, **where: int) -> Path:
    config = write_config(folder, "slurm", 3, **where)
    value = json.loads(config.read_text()) | {"deepspeed": {"offload_optimizer": "nvme", "nvme_path": str(disk)}}
    config.write_text(json.dumps(value))
    return config


def test_a_spare_takes_the_place_of_a_node_without_its_disk(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(cluster, tmp_path, monkeypatch)
    disk = tmp_path / "disk"
    disk.mkdir()
    cluster("exec", "n2", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk))
    try:
        launched = Launched(cluster, on_disk(tmp_path, disk, nodes=2, spare_nodes=1))
        launched.finish(150)
    finally:
        cluster("exec", "n2", "umount", str(disk))
    first, _ = launched.run.verdicts()
    assert (first["class"], first["node"], first["unfit"]) == ("node", "n2", True)
    assert f"n2: {disk} cannot be written to" in first["message"]
    assert launched.nodes_of(2) == {"n1", "n3"}
    assert launched.requeues() == 0


def test_a_folder_that_no_node_has_is_the_users_mistake(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(cluster, tmp_path, monkeypatch)
    launched = Launched(cluster, on_disk(tmp_path, tmp_path / "none", nodes=2, spare_nodes=1))
    cluster.wait_for_state(launched.job, "COMPLETED", "FAILED", seconds=120)
    (verdict,) = launched.run.verdicts()
    assert (verdict["class"], verdict["action"], verdict["exit_code"]) == ("user", "stop", 2)
    assert "none is no folder" in verdict["message"]
    assert launched.requeues() == 0
