"""The agent by itself: held until released, stopped at once, dying with its parent, deaf to the user's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.failures import EXIT_TEMPORARY, UserError, classify, exit_code_of
from trainer.processes import kill_run, start_time
from trainer.rundir import RunDirectory, read_json
from trainer.worker import check_packages

ROOT = str(Path(__file__).resolve().parents[2])
RANK = """
import os, sys, time
from trainer.worker import main
def train(run, attempt):
    (run.attempt_dir(attempt) / ("pid" + os.environ["RANK"])).write_text(str(os.getpid()))
    if os.environ.get("MODE") == "sleep":
        time.sleep(300)
    if os.environ.get("MODE") == "asserts" and not __debug__:
        sys.exit(1)
if __name__ == "__main__":
    sys.exit(main(train=train))
"""


def test_a_node_that_does_not_come_is_trouble_of_the_network() -> None:
    from torch.distributed import DistStoreError

    error = DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined.")
    assert (classify(error), exit_code_of(error)) == ("communication", EXIT_TEMPORARY)


class Node:
    """An agent with two ranks."""

    def __init__(self, folder: Path, mode: str = "", cwd: Path | None = None, hold: bool = False) -> None:
        self.run = RunDirectory(folder / "run")
        self.attempt = self.run.new_attempt()
        (folder / "modules").mkdir(exist_ok=True)
        (folder / "modules" / "small_rank.py").write_text(RANK)
        command = [sys.executable, "-P", "-m", "trainer.agent", "--run-dir", str(self.run.path)]
        command += ["--attempt", str(self.attempt), "--worker-module", "small_rank", *(["--hold"] if hold else [])]
        self.process = subprocess.Popen(
            [*command, "--", "--nproc-per-node=2"],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder / 'modules'}", "MODE": mode},
            stdin=subprocess.PIPE,
            text=True,
        )

    def rank_pid(self, rank: int) -> int:
        path = self.run.attempt_dir(self.attempt) / f"pid{rank}"
        deadline = time.monotonic() + 30
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return int(path.read_text())

    def report(self) -> Any:
        (path,) = (self.run.attempt_dir(self.attempt) / "agents").iterdir()
        return read_json(path)


def test_a_log_takes_any_text_in_any_locale(tmp_path: Path) -> None:
    command = "from trainer.worker import *; write_output_to(Path('a.log')); print('\\u00fc \\udcff')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", command], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "a.log").read_text() == "\\xfc \\udcff\n"


def test_it_waits_to_be_released(tmp_path: Path) -> None:
    node = Node(tmp_path, hold=True)
    with pytest.raises(subprocess.TimeoutExpired):
        node.process.wait(4)
    assert not (node.run.attempt_dir(1) / "pid0").exists()
    assert node.process.stdin is not None
    node.process.stdin.write("go\n")
    node.process.stdin.flush()
    assert node.process.wait(30) == 0
    assert node.report()["exit_codes"] == {"0": 0, "1": 0}


def test_it_ends_quietly_if_it_is_never_released(tmp_path: Path) -> None:
    node = Node(tmp_path, hold=True)
    assert node.process.stdin is not None
    node.process.stdin.close()
    assert node.process.wait(30) == 0
    assert not (node.run.attempt_dir(1) / "agents").exists()


def test_sigterm_ends_it_and_its_ranks_at_once_even_suspended_ones(tmp_path: Path) -> None:
    node = Node(tmp_path, "sleep")
    ranks = [node.rank_pid(0), node.rank_pid(1)]
    os.kill(ranks[1], signal.SIGSTOP)
    begin = time.monotonic()
    node.process.terminate()
    assert node.process.wait(10) == 143
    assert time.monotonic() - begin < 5
    assert [start_time(pid) for pid in ranks] == [None, None]
    assert node.report()["message"] == "stopped by SIGTERM"


def test_ranks_die_with_it(tmp_path: Path) -> None:
    node = Node(tmp_path, "sleep")
    ranks = [node.rank_pid(0), node.rank_pid(1)]
    node.process.kill()
    node.process.wait()
    deadline = time.monotonic() + 3
    while any(start_time(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [start_time(pid) for pid in ranks] == [None, None]


def test_the_users_folder_cannot_shadow_packages(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("trainer", "torch", "launcher", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit('shadowed')")
    assert Node(tmp_path, cwd=folder).process.wait(60) == 0


def test_nothing_is_left_in_tmpdir_and_ranks_run_with_their_asserts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp dir").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp dir"))
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    assert Node(tmp_path, "asserts").process.wait(60) == 0
    assert list((tmp_path / "tmp dir").iterdir()) == []


def test_an_intruder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages()
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "launcher", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "launcher")):
        check_packages()


def test_kill_run_finds_what_has_left_its_session(tmp_path: Path) -> None:
    environment = os.environ | {"DSFT_RUN_DIR": str(tmp_path)}
    command = ["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert start_time(int(output)) is not None
    assert kill_run(tmp_path) == []
    assert start_time(int(output)) is None
