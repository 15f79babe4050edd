"""`dsft launch` on three nodes, interrupted as a time limit would, against the same run on one machine."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated import Cluster
from tune_inputs import write_words

from trainer.rundir import RunDirectory

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
STEPS = 120  # of about 0.1 s: others look on, and the time limit comes, before they are done


def write_inputs(folder: Path) -> Path:
    """Words, and a config; returns the config's path."""
    write_words(folder)
    config: dict[str, Any] = {
        "name": "words",
        "task": {"type": "causal-lm"},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "max_position_embeddings": 64,
            },
            "tokenizer": "tokenizer.json",
        },
        "data": {"train": [{"path": "train.jsonl", "format": "jsonl"}], "sequence_length": 32},
        "training": {
            "global_batch_size": 12,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "optimizer": {"learning_rate": 1e-2},
        },
        "cluster": {"backend": "slurm", "nodes": 3, "time": "1:00:00", "umask": "0027"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def exported(run: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.export_dir.glob("*.safetensors"))}


def follow(cluster: Cluster, output: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command that goes on, with its output in a file."""
    with open(output, "wb") as file:
        environment = cluster.environment | variables
        # a test run in the background of a shell ignores INT, and so would what it starts
        reset = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, preexec_fn=reset
        )


def test_three_nodes_interrupted_end_where_one_machine_does(cluster: Cluster, tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    variables = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
    dsft = (sys.executable, "-P", "-m", "launcher")

    run = RunDirectory(tmp_path / "runs" / "words")
    watch = tmp_path / "watch.log"
    follower = follow(cluster, watch, *dsft, "launch", str(config), "--watch", **variables)
    submitted = re.compile(r"submitted job (\d+)")
    cluster.wait(lambda: bool(submitted.search(watch.read_text())), "a job id")
    job = submitted.findall(watch.read_text())[0]
    again = cluster.run(*dsft, "launch", str(config), check=False, **variables)
    assert again.returncode == 2
    assert f"job {job}" in again.stderr

    cluster.wait(lambda: len(run.step_lines()) >= 3, "three steps", seconds=120)
    # somebody else looks on for a while
    command = ["resume", "--watch", str(run.path), "--set", "cluster.time=2:00:00"]
    other = follow(cluster, tmp_path / "other.log", *dsft, *command, **variables)
    cluster.wait(lambda: "running on n[1-3]" in (tmp_path / "other.log").read_text(), "another view")
    other.send_signal(signal.SIGINT)
    assert other.wait(30) == 0
    said = (tmp_path / "other.log").read_text()
    assert f"job {job} goes on without this terminal" in said
    assert f"job {job} was submitted with other values of cluster.time; for those of now" in said
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    # meanwhile the same on this machine, undisturbed
    alone = RunDirectory(tmp_path / "alone" / "words")
    local = [f"output_dir={alone.path.parent}", 'cluster={"backend": "local", "processes_per_node": 3}']
    cluster.run(*dsft, "launch", str(config), "--set", local[0], "--set", local[1], seconds=200, **variables)
    cluster.wait_for_state(job, "COMPLETED", "FAILED", seconds=150)

    log = (run.path / "job.log").read_text()
    assert follower.wait(60) == 0, watch.read_text()
    shown = watch.read_text()
    for text in (f"job {job}: running on n[1-3]", "attempt 2 starts", f"step {STEPS}/{STEPS}", "words: finished"):
        assert text in shown
    assert cluster.state(job) == "COMPLETED", log
    first, second = run.verdicts()
    assert (first["outcome"], first["reason"], first["exit_code"]) == ("stopped", "stopped on request (time_limit)", 75)
    assert second["outcome"] == "finished"
    assert 0 < first["step"] < STEPS
    assert run.published_checkpoints()[-1] == STEPS
    assert log.count("checking data and tokenizer") == 2  # nothing of the first job's output is lost
    lines, expected = run.step_lines(), alone.step_lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["batch_digest"] for line in lines] == [line["batch_digest"] for line in expected]
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert exported(run) == exported(alone) != {}
    assert all(path.stat().st_mode & 0o027 == 0 for path in run.path.rglob("*"))  # whoever wrote it, on whichever node
    finished = cluster.run(*dsft, "launch", str(config), **variables).stdout
    assert "finished already" in finished
