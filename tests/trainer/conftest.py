"""What tests of whole runs share; a file whose runs are of another kind has fixtures of its own by these names."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from training_runs import launch, logs, make_run, make_workspace

from trainer.rundir import RunDirectory


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> RunDirectory:
    """A run of two ranks that nothing has disturbed."""
    run = make_run(tmp_path_factory.mktemp("runs") / "whole", workspace, 2)
    assert launch(run, 2) == 0, logs(run)
    return run


@pytest.fixture
def graph_counters(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.compile without code generation, which fails at graph breaks; dynamo's counters, from zero."""
    import torch._dynamo

    compiler = functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda function, mode: compiler(function))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters
