"""A real SLURM cluster of three nodes for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simulated import Cluster, brought_up


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes n1, n2 and n3, idle; gone when the session ends."""
    with brought_up(3) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_jobs_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel what a test has left in the queue."""
    yield
    if "cluster" in request.fixturenames:
        made: Cluster = request.getfixturevalue("cluster")
        made.run("scancel", "--user=root")
        made.wait(lambda: not made.run("squeue", "--noheader").stdout.strip(), "an empty queue")
