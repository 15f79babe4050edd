"""Jobs that have left the queue, as SLURM's accounting (slurmdbd over MariaDB) remembers them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulated import Cluster, brought_up

from launcher import jobs
from slurm import client

pytestmark = [pytest.mark.cluster, pytest.mark.matrix, pytest.mark.timeout(300)]


@pytest.fixture
def accounted() -> Iterator[Cluster]:
    if not (shutil.which("slurmdbd", path="/usr/sbin") and shutil.which("mariadbd", path="/usr/sbin")):
        pytest.skip("missing: slurmdbd, mariadb-server")
    with brought_up(1, SIM_DBD="1") as made:
        yield made


def test_the_accounting_knows_how_jobs_ended(
    accounted: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in accounted.environment.items():
        monkeypatch.setenv(name, value)
    submit = ["sbatch", "--parsable", "--output=/dev/null"]
    good = accounted.run(*submit, "--wrap=true").stdout.strip()
    bad = accounted.run(*submit, "--wrap=exit 3").stdout.strip()
    chain = accounted.run(*submit, "--array=0-1%1", "--wrap=true").stdout.strip()
    cancelled = accounted.run(*submit, "--wrap=sleep 60").stdout.strip()
    accounted.wait_for_state(cancelled, "RUNNING")
    accounted.run("scancel", cancelled)
    wanted = {good: "finished", bad: "failed", f"{chain}_0": "finished", f"{chain}_1": "finished", cancelled: "stopped"}

    def found() -> dict[str, str]:
        return {number: job.state for number, job in client.accounted([good, bad, chain, cancelled, "9999"]).items()}

    accounted.wait(lambda: found() == wanted, f"{wanted}, but {found()}", seconds=90)
    # out of the queue, the accounting is what `dsft status` has
    monkeypatch.setattr(client, "queued", lambda *_: {})
    answer = jobs.ask({Path("/a"): bad, Path("/b"): chain, Path("/c"): "9999"})
    assert {str(path): job.state for path, job in answer.jobs.items()} == {"/a": "failed", "/b": "finished"}
    assert answer.unknown == {}
