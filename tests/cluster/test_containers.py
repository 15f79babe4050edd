"""Jobs whose agents run in a container: two nodes of ZeRO-3 inside train as two nodes without one do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import image
import pytest
from simulated import Cluster, read_json_lines
from test_slurm_jobs import HOSTILE, PROGRAM
from test_slurm_training import ROOT, exported, write_inputs

from launcher.backends.slurm import submit
from slurm.job import Job
from trainer.config.schema import SlurmCluster
from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PACKAGES = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def root_file_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "root"
    image.build(path, (ROOT,))
    return path


def test_agents_and_ranks_are_inside(
    cluster: Cluster, tmp_path: Path, root_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charliecloud: all-reduce between two nodes; difficult values reach the ranks."""
    if shutil.which("ch-run") is None:
        pytest.skip("ch-run is not installed (Debian: charliecloud-runtime)")
    found = RunDirectory(tmp_path / "a dir")
    mounts = [f"{PACKAGES}:{image.SITE_PACKAGES}"]
    values = {"runtime": "charliecloud", "image": str(root_file_system), "mounts": mounts, "python": image.PYTHON}
    command = [sys.executable, "-P", str(PROGRAM), str(found.path), "2", "1", "0.3"]
    environment = {"PYTHONPATH": str(PROGRAM.parent), "REDUCED_CLUSTER": json.dumps({"container": values})}
    environment |= {"USER": "root", "HOSTILE": HOSTILE}
    config = SlurmCluster(backend="slurm", nodes=2, environment=environment)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    job = submit(Job("reduced", found.path, command, str(ROOT)), config)
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=150)
    assert cluster.state(job) == "COMPLETED", (found.path / "job.log").read_text()
    for rank, node in enumerate(("n1", "n2")):
        (note,) = read_json_lines(found.path / f"notes{rank}.jsonl")
        assert (note["node"], note["prefix"], note["HOSTILE"]) == (node, image.PREFIX, HOSTILE)


def run(cluster: Cluster, folder: Path, name: str, **container: Any) -> RunDirectory:
    """Train eight steps on two nodes; returns the finished run."""
    path = write_inputs(folder)
    value: dict[str, Any] = json.loads(path.read_text())
    value["name"] = name
    value["training"]["max_steps"] = 8
    value["cluster"] = {"backend": "slurm", "nodes": 2, "processes_per_node": 2, "time": "1:00:00"}
    if container:
        mounts = [f"{PACKAGES}:{image.SITE_PACKAGES}", str(folder)]
        value["cluster"]["container"] = {"mounts": mounts, "python": image.PYTHON, **container}
    path.write_text(json.dumps(value))
    variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state"), "USER": "root"}
    launch = [sys.executable, "-P", "-m", "launcher", "launch", str(path), "--json"]
    done = subprocess.run(
        launch, env=cluster.environment | variables, stdout=subprocess.PIPE, text=True, check=True, timeout=200
    )
    job = json.loads(done.stdout)
    cluster.wait_for_state(job["job_id"], "COMPLETED", "FAILED", seconds=500)
    found = RunDirectory(Path(job["run"]))
    assert cluster.state(job["job_id"]) == "COMPLETED", (found.path / "job.log").read_text()
    assert [verdict["outcome"] for verdict in found.verdicts()] == ["finished"]
    return found


@pytest.fixture(scope="module")
def plain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run(cluster, tmp_path_factory.mktemp("plain"), "plain")


def container(runtime: str, root: Path) -> dict[str, Any]:
    if runtime == "charliecloud":
        return {"image": str(root)}
    packed = root.parent / "image.sif"
    if not packed.exists():
        subprocess.run([runtime, "build", packed, root], check=True, capture_output=True)
    # as an ordinary user would have it: the root of a container of this machine lacks some capabilities
    return {"image": str(packed), "arguments": ["--userns", "--no-home"]}


@pytest.mark.matrix
@pytest.mark.parametrize(("runtime", "program"), [("charliecloud", "ch-run"), ("apptainer", "apptainer")])
def test_training_inside_is_training_outside(
    cluster: Cluster, tmp_path: Path, root_file_system: Path, plain: RunDirectory, runtime: str, program: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    assert not Path(image.PREFIX).exists()  # whoever ran this Python was inside
    inside = run(cluster, tmp_path, runtime, runtime=runtime, **container(runtime, root_file_system))
    assert [line["loss"] for line in inside.step_lines()] == [line["loss"] for line in plain.step_lines()]
    assert len(inside.step_lines()) == 8
    assert exported(inside) == exported(plain) != {}
    reports = inside.agent_reports(1)
    assert sorted(report["node"] for report in reports) == ["n1", "n2"]
