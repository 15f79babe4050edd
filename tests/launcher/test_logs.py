"""`dsft logs`: by rank and by node."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main
from trainer.rundir import RunDirectory, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    write_json(run.config_path, {"name": "run"})
    attempt = run.new_attempt()
    for node, ranks in (("n1", (0, 1)), ("n2", (2, 3))):
        run.log_dir(attempt, node).mkdir(parents=True)
        run.agent_log_path(attempt, node).write_text(f"agent of {node}\n")
        for rank in ranks:
            run.log_path(attempt, node, rank).write_text(f"rank {rank} on {node}\n")
    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "rank 0 on n1\n"),
        (["--rank", "3"], "rank 3 on n2\n"),
        (
            ["--node", "n2"],
            "==> n2/agent.log <==\nagent of n2\n"
            "==> n2/rank2.log <==\nrank 2 on n2\n==> n2/rank3.log <==\nrank 3 on n2\n",
        ),
        (["--node", "n1", "--rank", "1"], "==> n1/rank1.log <==\nrank 1 on n1\n"),
    ],
)
def test_logs(run: RunDirectory, capsys: pytest.CaptureFixture[str], options: list[str], expected: str) -> None:
    assert main(["logs", str(run.path), *options]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(("options", "named"), [(["--rank", "9"], "0, 1, 2, 3"), (["--node", "n3"], "n1, n2")])
def test_what_is_not_there(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert main(["logs", str(run.path), *options]) == 2
    assert named in capsys.readouterr().err
