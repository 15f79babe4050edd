"""Real faults under runs of two ranks: a full disk, bad data that no check saw; and what faults cost in all.

`pytest -m matrix -s tests/launcher/test_faults.py` prints what each drill measured; docs/failures.md has a table of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervised import SAVE_STEPS
from test_launch import config_file, dsft, folder, start, wait_for  # noqa: F401
from test_supervisor import Launch

from launcher.drill import inject
from launcher.report import report
from trainer.processes import processes_of_run
from trainer.rundir import RunDirectory, read_lines, write_json

pytestmark = [pytest.mark.faults, pytest.mark.matrix, pytest.mark.timeout(900)]
STEPS = 60


def rewritten(config: Path, **sections: Any) -> Path:
    """The config with keys of its sections replaced."""
    value = json.loads(config.read_text())
    for name, keys in sections.items():
        value[name] = {**value.get(name, {}), **keys} if isinstance(keys, dict) else keys
    write_json(config, value)
    return config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    path = disk / "filler"
    with open(path, "wb") as file:
        while (free := shutil.disk_usage(disk).free) > leave:
            file.write(b"\1" * min(free - leave, 1 << 20))
            file.flush()
    return path


def test_a_full_disk_costs_checkpoints_and_not_the_run(folder: Path, small_disk: Path) -> None:  # noqa: F811
    """Full: the run goes on without new checkpoints, stops before its end and says so; with room it is finished."""
    sections = {"output_dir": str(small_disk), "logging": {"tensorboard": False}, "resilience": {"max_restarts": 0}}
    config = rewritten(config_file(folder, "disk", max_steps=STEPS), **sections)
    process = start(folder, "launch", str(config))
    run = RunDirectory(small_disk / "disk")
    wait_for(lambda: len(run.published_checkpoints()) > 1, 300)
    filler = fill(small_disk, leave=300_000)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 75, output + errors
    failed = [event for event in run.merged_events() if event["event"] == "checkpoint_failed"]
    (verdict,) = run.verdicts()
    assert (verdict["class"], verdict["outcome"]) == ("storage", "failed")
    assert "free some space" in verdict["message"] or "no room for the last checkpoint" in verdict["message"]
    assert len(run.step_lines()) == STEPS  # the steps went on to the last one
    assert run.published_checkpoints()[-1] < failed[0]["step"] < failed[-1]["step"]
    filler.unlink()
    code, _, errors = dsft(folder, "launch", str(config))
    assert code == 0, errors
    losses: dict[int, set[float]] = {}
    for line in read_lines(run.metrics_path):
        if "loss" in line:
            losses.setdefault(line["step"], set()).add(line["loss"])
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in losses.values())  # the second time as the first, to the last bit
    assert run.published_checkpoints()[-1] == STEPS
    assert processes_of_run(run.path) == []
    code, _, errors = dsft(folder, "launch", str(config_file(folder, "undisturbed", max_steps=STEPS)))
    assert code == 0, errors
    weights, expected = (
        {path.name: path.read_bytes() for path in one.export_dir.glob("*.safetensors")}
        for one in (run, RunDirectory(folder / "runs" / "undisturbed"))
    )
    assert weights == expected != {}
    print(f"full disk: {len(failed)} checkpoints not written, then {verdict['message']}; the same weights in the end")


def test_a_bad_record_that_no_check_saw_is_never_retried(folder: Path) -> None:  # noqa: F811
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[450] = json.dumps({"prompt": "3 plus "})
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    config = config_file(folder, "late", max_steps=STEPS)
    source = {"path": "bad.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}}
    code, _, errors = dsft(folder, "launch", str(rewritten(config, data={"train": [source], "window_documents": 40})))
    run = RunDirectory(folder / "runs" / "late")
    (verdict,) = run.verdicts()
    assert (code, verdict["class"], verdict["action"]) == (2, "data", "stop"), errors
    assert "line 451" in verdict["message"]
    assert processes_of_run(run.path) == []


def test_the_useful_share_of_a_run_under_fire(tmp_path: Path) -> None:
    """ETTR >= 1 - (detection + 1.5 cold starts + half a checkpoint interval) / MTBF, all measured in this drill.

    The ranks sleep in place of training (supervised.py); agents, supervisor, faults, checkpoints and ledger are real.
    """
    faults = ("kill-rank", "kill-agent", "kill-rank")
    run = RunDirectory(tmp_path / "runs" / "drill")
    began = time.time()
    launch = Launch(run, "steps", {"max_restarts": len(faults) + 1})
    first_steps = lambda: [e for e in run.merged_events() if e["event"] == "first_step"]  # noqa: E731
    for number, fault in enumerate((*faults, None), start=1):
        wait_for(lambda number=number: len(first_steps()) == number, 300)  # type: ignore[misc]
        time.sleep(4 * (first_steps()[0]["time"] - began))
        if fault is not None:
            inject(run, fault, number % 2, None)  # type: ignore[arg-type]
    run.request_stop(run.attempts()[-1], "cancel")
    code, _ = launch.end()
    outside = time.time() - began
    assert code == 143
    value, events = report(run), run.merged_events()
    goodput, failures = value["goodput"], value["failures"]
    steps = run.step_lines()[-1]["step"]
    assert [line["step"] for line in run.step_lines()] == list(range(1, steps + 1))
    assert len(failures) == len(faults)

    first = {e["attempt"]: e["time"] for e in events if e["event"] == "first_step"}
    cold = first[1] - began
    detection = max(failure["detection_seconds"] for failure in failures)
    recovery = max(failure["recovery_seconds"] for failure in failures)
    interval = SAVE_STEPS * goodput["useful_seconds"] / steps
    between = goodput["wall_seconds"] / len(faults)
    bound = 1 - (detection + 1.5 * cold + 0.5 * interval) / between
    print(
        f"ETTR {goodput['ettr']:.3f} >= {bound:.3f}: {len(faults)} faults, one every {between:.0f} s; detection "
        f"{detection:.1f} s, cold start {cold:.1f} s, recovery at most {recovery:.1f} s, {interval:.1f} s between "
        f"checkpoints; {goodput['seconds']['repeated']:.1f} s repeated; "
        f"the account has {goodput['wall_seconds']:.1f} s of {outside:.1f} s"
    )
    assert goodput["ettr"] >= bound > 0
    assert detection <= 5
    assert recovery <= 1.5 * cold
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"], rel=1e-9)
    assert goodput["wall_seconds"] == pytest.approx(outside, rel=0.01)
    assert processes_of_run(run.path) == []
