"""`cluster.doctor`: a job that was given a bad node trains on the others from the start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated import Cluster
from test_slurm_training import write_inputs

from launcher.first_step import blamed
from trainer.rundir import RunDirectory

ROOT = Path(__file__).parents[2]


def test_a_problem_of_two_nodes_is_nobodys_alone() -> None:
    problems = [
        "n2 is slow: it sends 9.5 MiB/s, where other nodes reach 1.6 GiB/s",
        "GPU 0 of n4 is in use: 2 GiB of its memory, 3 % of the time",
        "the link from n1 to n3 is slow: 1 MiB/s, others 9 MiB/s",
        "n11 has no /data/n5/train.jsonl: it has to lie on storage that all hosts share",
        "the clock of n1-ib is 3.0 s ahead",
    ]
    assert blamed(problems, ["n1", "n2", "n3", "n4", "n5", "n11"]) == ["n11", "n2", "n4"]


@pytest.mark.cluster
@pytest.mark.matrix
@pytest.mark.timeout(200)
def test_a_node_without_the_storage_is_left_out_before_the_first_attempt(cluster: Cluster, tmp_path: Path) -> None:
    path = write_inputs(tmp_path)
    value: dict[str, Any] = json.loads(path.read_text())
    value["cluster"] = {"backend": "slurm", "nodes": 2, "spare_nodes": 1, "time": "1:00:00", "doctor": True}
    value["training"]["max_steps"] = 3
    value["output_dir"] = str(tmp_path / "mounted")
    path.write_text(json.dumps(value))
    (tmp_path / "mounted").mkdir()
    cluster(
        "exec", "n2", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "mounted")
    )  # its mount of the storage is lost
    variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
    try:
        job = json.loads(
            cluster.run(sys.executable, "-P", "-m", "launcher", "launch", str(path), "--json", **variables).stdout
        )
        cluster.wait_for_state(job["job_id"], "COMPLETED", "FAILED", seconds=120)
    finally:
        cluster("exec", "n2", "umount", str(tmp_path / "mounted"))
    run = RunDirectory(Path(job["run"]))
    log = (run.path / "job.log").read_text()
    assert cluster.state(job["job_id"]) == "COMPLETED", log
    assert [verdict["outcome"] for verdict in run.verdicts()] == ["finished"], log
    assert sorted(folder.name for folder in (run.attempt_dir(1) / "logs").iterdir()) == ["n1", "n3"]
    assert "n2: left out" in log
    told = [event["message"] for event in run.merged_events() if event["event"] == "warning"]
    assert any(message.startswith("n2 does not see") for message in told)
