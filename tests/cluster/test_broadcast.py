"""A Python environment that a job brings to its nodes as one file, as docs/slurm.md describes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from simulated import brought_up
from test_slurm_training import write_inputs

from trainer.rundir import RunDirectory

ROOT = Path(__file__).parents[2]


ON_EACH = "srun --overlap --no-kill --ntasks=$SLURM_NNODES --ntasks-per-node=1"
RECIPES = {
    "tar": [
        "sbcast --force {shared}/env.tar {local}/env.tar",
        "srun --ntasks=$SLURM_NNODES --ntasks-per-node=1 tar -xf {local}/env.tar -C {local}",
    ],
    "squashfs": [
        ON_EACH + ' sh -c \'trap "" TERM; fusermount -uz {local}/env 2> /dev/null; mkdir -p {local}/env;'
        " exec squashfuse -f {shared}/env.sqsh {local}/env' &",
        'trap "kill $!" EXIT',
        ON_EACH + " sh -c 'until [ -x {local}/env/bin/python ]; do sleep 0.2; done'",
    ],
}


@pytest.mark.matrix
@pytest.mark.cluster
@pytest.mark.timeout(700)
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_run_from_an_environment_on_the_nodes_own_disk(tmp_path: Path, recipe: str) -> None:
    if recipe == "squashfs" and not (shutil.which("squashfuse") and shutil.which("mksquashfs")):
        pytest.skip("squashfuse or squashfs-tools is not installed")
    local = tmp_path / "local"  # each node has its own
    local.mkdir()
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if recipe == "tar":
        subprocess.run(["tar", "-cf", str(tmp_path / "env.tar"), "-C", str(tmp_path), "env"], check=True)
    else:
        subprocess.run(["mksquashfs", str(environment), str(tmp_path / "env.sqsh"), "-quiet"], check=True)
    path = write_inputs(tmp_path)
    value: dict[str, Any] = json.loads(path.read_text())
    value["training"]["max_steps"] = 2
    value["cluster"] = {
        "backend": "slurm",
        "nodes": 2,
        "time": "1:00:00",
        "python": str(local / "env/bin/python"),
        "setup": [line.format(shared=tmp_path, local=local) for line in RECIPES[recipe]],
    }
    path.write_text(json.dumps(value))
    with brought_up(2, SIM_LOCAL=str(local)) as cluster:
        variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
        command = [sys.executable, "-P", "-m", "launcher", "launch", str(path), "--json"]
        job = json.loads(
            subprocess.run(
                command, env=cluster.environment | variables, stdout=subprocess.PIPE, check=True, timeout=200
            ).stdout
        )
        cluster.wait_for_state(job["job_id"], "COMPLETED", "FAILED", seconds=500)
        run = RunDirectory(Path(job["run"]))
        assert cluster.state(job["job_id"]) == "COMPLETED", (run.path / "job.log").read_text()
    assert not (local / "env").exists()  # not on this machine
    assert [verdict["outcome"] for verdict in run.verdicts()] == ["finished"]
    assert sorted(report["node"] for report in run.agent_reports(1)) == ["n1", "n2"]
