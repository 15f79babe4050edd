"""Real faults under real runs of two ranks: memory, disk, bad data at a late step; and what they cost in all.

`pytest -m matrix -s tests/launcher/test_faults.py` prints what each drill measured; docs/failures.md has a table of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launch import config_file, dsft, folder, start, wait_for  # noqa: F401
from test_supervisor import memory_group

from launcher.drill import inject
from trainer.processes import processes_of_run
from trainer.rundir import RunDirectory, write_json

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900)]
STEPS = 200


def rewritten(config: Path, **sections: Any) -> Path:
    """The config with keys of its sections replaced."""
    value = json.loads(config.read_text())
    for name, keys in sections.items():
        value[name] = {**value.get(name, {}), **keys} if isinstance(keys, dict) else keys
    write_json(config, value)
    return config


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDirectory:  # noqa: F811
    code, _, errors = dsft(folder, "launch", str(config_file(folder, "undisturbed", max_steps=STEPS)))
    assert code == 0, errors
    return RunDirectory(folder / "runs" / "undisturbed")


def assert_same_end(run: RunDirectory, other: RunDirectory) -> None:
    """The same losses and weights, to the last bit, and no process left."""
    assert [line["loss"] for line in run.step_lines()] == [line["loss"] for line in other.step_lines()]
    files = [{path.name: path.read_bytes() for path in one.export_dir.glob("*.safetensors")} for one in (run, other)]
    assert files[0] == files[1] != {}
    assert processes_of_run(run.path) == []


def process_of(run: RunDirectory, rank: int) -> int:
    for pid in processes_of_run(run.path):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in lines and b"trainer.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise AssertionError(f"rank {rank} does not run")


def test_the_kernel_kills_a_rank_for_memory(folder: Path, undisturbed: RunDirectory) -> None:  # noqa: F811
    process = start(folder, "launch", str(config_file(folder, "memory", max_steps=STEPS)))
    run = RunDirectory(folder / "runs" / "memory")
    with memory_group("1M") as group:
        wait_for(lambda: len(run.published_checkpoints()) > 0)
        group.write_text(str(process_of(run, 1)))
        hit = time.time()
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    first, second = run.verdicts()
    assert (first["class"], first["rank"], first["action"], second["outcome"]) == (
        "out_of_memory",
        1,
        "retry",
        "finished",
    )
    assert "killed by the kernel" in first["message"]
    assert any("for memory" in text for text in first["evidence"])
    assert_same_end(run, undisturbed)
    print(f"out of memory: verdict {first['time'] - hit:.1f} s after the limit was set; {first['evidence']}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, text=True
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


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    folder: Path,  # noqa: F811
    small_disk: Path,
    undisturbed: RunDirectory,
) -> None:
    """Full: the run goes on without new checkpoints, stops before its end and says so; with room it is finished."""
    config = rewritten(
        config_file(folder, "disk", max_steps=STEPS), output_dir=str(small_disk), logging={"tensorboard": False}
    )
    process = start(folder, "launch", str(config))
    run = RunDirectory(small_disk / "disk")
    wait_for(lambda: len(run.published_checkpoints()) > 1)
    filler = fill(small_disk, leave=300_000)
    failed = lambda: [e for e in run.merged_events() if e["event"] == "checkpoint_failed"]  # noqa: E731
    wait_for(lambda: len(failed()) > 1)
    before = run.published_checkpoints()[-1]
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 75, output + errors
    verdict = run.verdicts()[-1]
    assert (verdict["class"], verdict["outcome"]) == ("storage", "failed")
    assert "free some space" in verdict["message"]
    assert len(run.step_lines()) == STEPS  # the steps went on to the last one
    assert run.published_checkpoints()[-1] == before
    filler.unlink()
    code, _, errors = dsft(folder, "resume", str(run.path))
    assert code == 0, errors
    assert_same_end(run, undisturbed)
    print(
        f"full disk: {len(run.verdicts())} attempts, {len(failed())} checkpoints not written, then {verdict['message']}"
    )


def test_a_bad_record_at_a_late_step_is_never_retried(folder: Path) -> None:  # noqa: F811
    """Beyond what the checks before a launch look at."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[450] = json.dumps({"prompt": "3 plus "})
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    config = config_file(folder, "late", max_steps=STEPS)
    source = {"path": "bad.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}}
    began = time.time()
    code, _, errors = dsft(folder, "launch", str(rewritten(config, data={"train": [source], "window_documents": 40})))
    run = RunDirectory(folder / "runs" / "late")
    (verdict,) = run.verdicts()
    assert (code, verdict["class"], verdict["action"]) == (2, "data", "stop"), errors
    assert "line 451" in verdict["message"]
    assert run.step_lines(), "it failed at a step, not before the first"
    assert processes_of_run(run.path) == []
    print(f"bad record: stopped after step {run.step_lines()[-1]['step']}, {time.time() - began:.0f} s in all")


def test_the_useful_share_of_a_run_under_fire(folder: Path) -> None:  # noqa: F811
    """ETTR >= 1 - (detection + 1.5 cold starts + half a checkpoint interval) / MTBF, all measured in this drill."""
    faults, interval = ("kill-rank", "kill-agent", "kill-rank"), 50
    config = config_file(folder, "drill", max_steps=1_000_000)
    quiet = {"logging": {"tensorboard": False}, "data": {"evaluation": []}, "resilience": {"max_restarts": 4}}
    config = rewritten(config, checkpoint={"interval_steps": interval}, **quiet)
    began = time.time()
    process = start(folder, "launch", str(config), "--json")
    run = RunDirectory(folder / "runs" / "drill")
    first_steps = lambda: [e for e in run.merged_events() if e["event"] == "first_step"]  # noqa: E731
    for number, fault in enumerate((*faults, None), start=1):
        wait_for(lambda number=number: len(first_steps()) == number, 300)  # type: ignore[misc]
        cold = first_steps()[0]["time"] - began
        time.sleep(5 * cold)
        if fault is not None:
            inject(run, fault, number % 2, None)  # type: ignore[arg-type]
    assert dsft(folder, "cancel", str(run.path))[0] == 0
    output, errors = process.communicate(timeout=100)
    outside = time.time() - began
    assert process.returncode == 143, errors
    report = json.loads(output)
    goodput, failures, events = report["goodput"], report["failures"], run.merged_events()
    assert len(failures) == len(faults)
    steps = run.step_lines()[-1]["step"]
    assert [line["step"] for line in run.step_lines()] == list(range(1, steps + 1))

    first = {e["attempt"]: e["time"] for e in events if e["event"] == "first_step"}
    attempts = {e["attempt"]: e["time"] for e in events if e["event"] == "attempt"}
    cold = first[1] - next(e["started"] for e in events if e["event"] == "launched")
    detection = max(failure["detection_seconds"] for failure in failures)
    recovery = max(failure["recovery_seconds"] for failure in failures)
    step = goodput["useful_seconds"] / steps
    between = goodput["wall_seconds"] / len(faults)
    bound = 1 - (detection + 1.5 * cold + 0.5 * interval * step) / between
    print(
        f"ETTR {goodput['ettr']:.3f} >= {bound:.3f}: {len(faults)} faults, one every {between:.0f} s; "
        f"detection {detection:.1f} s, cold start {cold:.1f} s, recovery at most {recovery:.1f} s, "
        f"{interval} steps between checkpoints take "
        f"{interval * step:.1f} s; wall {goodput['wall_seconds']:.1f} s of {outside:.1f} s outside"
    )
    assert goodput["ettr"] >= bound > 0
    assert detection <= 5.0
    assert recovery <= 1.5 * cold
    assert max(first[n] - attempts[n] for n in first) <= 1.5 * cold
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"], rel=1e-9)
    assert goodput["wall_seconds"] == pytest.approx(outside, rel=0.01)
    assert processes_of_run(run.path) == []
