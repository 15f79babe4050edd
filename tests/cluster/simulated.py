"""A real SLURM cluster of simulated nodes (cluster.sh), or the reason why there is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "cluster.sh"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv", "ssh-keygen")


@dataclass(frozen=True)
class Cluster:
    """The running cluster; `environment` has SLURM's commands first on PATH."""

    base: Path
    environment: dict[str, str]

    def __call__(self, *arguments: str) -> str:
        """Run cluster.sh, for example `cluster("fail", "n2")`; returns what it prints."""
        return self.run(str(SCRIPT), *arguments).stdout

    def run(
        self, *command: str, check: bool = True, seconds: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this machine with the cluster's SLURM."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 60) -> str:
        """Wait until the job is in one of SLURM's states; returns it."""
        return self.wait(lambda: (s := self.state(job_id)) in states and s, f"job {job_id}: {states}", seconds)

    def state(self, job_id: str) -> str:
        command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
        return self.run(*command).stdout.strip()

    def wait(self, condition: Callable[[], str | bool], what: str, seconds: float = 60) -> str:
        """Wait for a true value of `condition`; fails, showing the queue, if it does not come."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds} s\n{self.run('squeue', '--states=all').stdout}")
            time.sleep(0.1)
        return str(value)


def missing() -> str | None:
    """Why no cluster can be brought up here, or None."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    lacking = [name for name in COMMANDS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if lacking:
        return f"missing: {', '.join(lacking)} (Debian: slurm-wlm munge iproute2 openssh-server)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


@contextlib.contextmanager
def brought_up(nodes: int, **variables: str) -> Iterator[Cluster]:
    """A cluster of its own; `variables` are those of cluster.sh."""
    if reason := missing():
        pytest.skip(reason)
    base = Path(tempfile.mkdtemp(prefix="sl"))  # short: paths of sockets have a limit
    base.rmdir()  # cluster.sh makes it, and removes only what is its own
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
        "SIM_BASE": str(base),
        "PATH": f"{base}/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **variables,
    }
    made = Cluster(base, environment)
    try:
        made("up", str(nodes))
        yield made
    finally:
        subprocess.run([SCRIPT, "down"], env=environment, check=True, timeout=60)


def read_json_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
