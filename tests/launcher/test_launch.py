"""`dsft launch` with the real trainer: to the end, through kill -9 and Ctrl-C, and with what cannot work."""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from launcher.detach import log_path, tell_ready
from trainer.processes import kill_run, processes_of_run
from trainer.rundir import RunDirectory

ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus and a tokenizer of it."""
    folder = tmp_path_factory.mktemp("launch")
    records = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(30) for b in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "lines.txt").write_text("\n".join(record["prompt"] + record["completion"] for record in records))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "small"), vocab_size=40, minloglevel=2
    )
    return folder


@pytest.fixture
def other_group() -> str:
    """A group that is not this process's own, and that it may give files to."""
    own = os.getegid()
    numbers = [group.gr_gid for group in grp.getgrall()] if os.geteuid() == 0 else os.getgroups()
    name = next((grp.getgrgid(number).gr_name for number in numbers if number != own), None)
    if name is None:
        pytest.skip("needs root, or a second group")
    return name


def config_file(folder: Path, name: str, **training: Any) -> Path:
    source = {"path": "train.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "name": name,
        "task": {"type": "causal-lm"},
        "model": {"config": {"model_type": "llama", "vocab_size": 40, **sizes}, "tokenizer": "small.model"},
        "data": {"train": [source], "evaluation": [source | {"limit": 50}], "sequence_length": 64},
        "training": {"global_batch_size": 4, "max_steps": 6, "optimizer": {"learning_rate": 5e-3}, **training},
        "checkpoint": {"interval_steps": 3},
        "cluster": {"processes_per_node": 2, "environment": {"OMP_NUM_THREADS": "1", "MY_API_KEY": "sesame"}},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": ROOT, "XDG_STATE_HOME": str(folder / "state"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def dsft(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(folder, *arguments, **environment)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def state_of(folder: Path, run: RunDirectory) -> str:
    return str(json.loads(dsft(folder, "status", str(run.path), "--json")[1])["state"])


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_a_launch_runs_to_its_end_and_says_so_the_second_time(folder: Path) -> None:
    config = config_file(folder, "whole")
    code, output, errors = dsft(folder, "launch", str(config), "--json")
    assert code == 0, errors
    report = json.loads(output)
    assert (report["state"], report["steps"], report["failures"]) == ("finished", 6, [])
    assert report["loss_last"] < report["loss_first"]
    assert report["evaluation"]["loss"] > 0
    assert 0 < report["goodput"]["ratio"] < 1
    run = RunDirectory(folder / "runs" / "whole")
    assert (run.export_dir / "model.safetensors").is_file()
    assert "sesame" not in "".join(path.read_text() for path in run.path.glob("*.json"))
    assert processes_of_run(run.path) == []

    data = folder / "train.jsonl"
    data.rename(folder / "gone.jsonl")  # it is needed no more
    try:
        code, output, _ = dsft(folder, "launch", str(config))
    finally:
        (folder / "gone.jsonl").rename(data)
    assert code == 0
    assert "finished already" in output
    assert run.attempts() == [1]
    with open("/dev/full", "w") as full:  # who cannot be told is not told that the run has failed
        again = [sys.executable, "-m", "launcher", "launch", str(config)]
        assert subprocess.run(again, cwd=folder, env=os.environ | {"PYTHONPATH": ROOT}, stdout=full).returncode == 0
    moved = shutil.copytree(run.path, folder / "archive" / "moved")
    code, output, _ = dsft(folder, "resume", "archive/moved", MY_API_KEY="sesame")
    assert (code, f"{moved}: this run is finished already" in output) == (0, True)
    code, _, errors = dsft(folder, "launch", str(config), "--set", "training.max_steps=9")
    assert code == 2
    assert "training.max_steps: the run has 6, the config 9" in errors


def test_a_run_goes_on_after_kill_9_of_its_launcher(folder: Path) -> None:
    config = config_file(folder, "killed", max_steps=400)
    run = RunDirectory(folder / "runs" / "killed")
    process = start(folder, "launch", str(config))
    wait_for(run.published_checkpoints)
    assert state_of(folder, run) == "running"
    code, _, errors = dsft(folder, "launch", str(config))
    assert code == 75
    assert f"process {process.pid}" in errors
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of_run(run.path), 5)
    assert state_of(folder, run) == "failed"

    reached = run.published_checkpoints()[-1]
    code, _, errors = dsft(folder, "resume", "killed")
    assert code == 2  # the secret was not recorded
    assert "MY_API_KEY" in errors
    second = start(folder, "resume", "killed", MY_API_KEY="sesame")
    wait_for(lambda: any(event["event"] == "first_step" and event["attempt"] == 2 for event in run.merged_events()))
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 130
    first_step = next(e for e in run.merged_events() if e["event"] == "first_step" and e["attempt"] == 2)
    assert first_step["step"] == reached + 1
    assert run.published_checkpoints()[-1] == run.step_lines()[-1]["step"]  # the last step was saved
    assert state_of(folder, run) == "stopped"
    assert "stopped on request (interrupt)" in output
    assert processes_of_run(run.path) == []


def test_bad_data_is_refused_before_any_rank_starts(folder: Path) -> None:
    config = config_file(folder, "bad")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    override = 'data.train=[{"path": "broken.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}}]'
    code, output, errors = dsft(folder, "launch", str(config), "--set", override)
    assert code == 2
    assert "broken.jsonl" in output + errors
    run = RunDirectory(folder / "runs" / "bad")
    assert list(run.attempt_dir(1).glob("logs/*/rank*.log")) == []
    report = json.loads(dsft(folder, "report", "bad", "--json")[1])
    assert (report["state"], report["failures"][0]["class"]) == ("failed", "data")
    assert processes_of_run(run.path) == []


def test_a_dry_run_shows_the_commands_and_creates_nothing(folder: Path) -> None:
    config = config_file(folder, "dry")
    code, output, _ = dsft(folder, "launch", str(config), "--dry-run")
    assert code == 0
    assert "-m trainer.worker" in output
    assert not (folder / "runs" / "dry").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_that_cannot_be_written_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, errors = dsft(folder, "launch", str(config_file(folder, "w")), "--set", f"output_dir={tmp_path}/runs")
    assert code == 2
    assert str(tmp_path) in errors


def test_a_detached_launch_goes_on_alone_and_is_told_to_stop(folder: Path) -> None:
    config = config_file(folder, "alone", max_steps=100000)
    code, output, errors = dsft(folder, "launch", str(config), "--detach", "--json")
    assert code == 0, errors
    answer = json.loads(output)
    run = RunDirectory(Path(answer["run"]))
    try:
        assert os.getsid(answer["pid"]) == answer["pid"]  # no terminal's end reaches it
        assert state_of(folder, run) == "running"
        wait_for(lambda: len(run.step_lines()) >= 2)
        logs = start(folder, "logs", "-f", "alone")
        assert dsft(folder, "cancel", "alone")[0] == 0
        text, _ = logs.communicate(timeout=60)  # ends with the run
        assert "attention:" in text
        assert state_of(folder, run) == "stopped"
        assert run.published_checkpoints() != []
        assert processes_of_run(run.path) == []
        assert "stopped on request (cancel)" in Path(answer["log"]).read_text()
    finally:
        kill_run(run.path)


def test_a_detached_launch_that_cannot_start_says_why(folder: Path, other_group: str) -> None:
    config = config_file(folder, "cannot")
    settings = json.loads(config.read_text())
    settings["data"]["train"][0]["columns"]["prompt"] = "no_such_column"
    settings["cluster"] |= {"umask": "0077", "group": other_group}
    config.write_text(json.dumps(settings))
    code, _, errors = dsft(folder, "launch", str(config), "--detach")
    assert code == 2
    assert "no_such_column" in errors
    run = RunDirectory(folder / "runs" / "cannot")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (run.path, log_path(run))] == [0o2700, 0o600]
    assert log_path(run).stat().st_gid == grp.getgrnam(other_group).gr_gid


def test_a_detached_launch_outlives_whoever_started_it() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    tell_ready(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(writer)
