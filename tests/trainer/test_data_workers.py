"""Worker processes give what the rank would have made, name its errors, and do not outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from trainer.config.schema import LaunchConfig
from trainer.data.stream import BatchStream, build_training_stream
from trainer.data.workers import Workers, worker_count
from trainer.failures import DataError, DsftError
from trainer.processes import start_time
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_config(folder: Path, rows: list[dict[str, Any]], **data: Any) -> LaunchConfig:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.save(str(folder / "tokenizer.json"))
    for name, part in (("a", rows[::2]), ("b", rows[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return LaunchConfig.model_validate(
        {
            "name": "workers",
            "task": {"type": "causal-lm"},
            "model": {"config": {"model_type": "llama"}, "tokenizer": str(folder / "tokenizer.json")},
            "data": {
                "train": [{"path": str(folder / f"{name}.jsonl")} for name in "ab"],
                "sequence_length": 64,
                "window_documents": 150,
                **data,
            },
            "training": {"global_batch_size": 8, "epochs": 2},
        }
    )


ROWS = [{"text": "x" * (1 + n * 7 % 90)} for n in range(900)]


def stream(config: LaunchConfig, workers: int, state: dict[str, Any] | None = None) -> BatchStream:
    config = config.altered(data={"workers": workers})
    task = get_task(config, load_tokenizer(config.model))
    return build_training_stream(
        config, task, rank=0, world_size=1, micro_batch_size=4, gather=lambda rows: [rows], state=state
    )


def test_equal_with_any_number_of_workers(tmp_path: Path) -> None:
    config = make_config(tmp_path, ROWS)
    alone = stream(config, 0)
    expected = list(alone)
    for workers in (1, 4):
        made = stream(config, workers)
        assert [(b.digest, b.state) for b in made] == [(b.digest, b.state) for b in expected]
        assert made.counts() == alone.counts()
        assert made.counts()["split"] > 0
        assert made.counts()["nothing_to_learn"] > 0
    rest = stream(config, 2, state=json.loads(json.dumps(expected[9].state)))
    assert [b.digest for b in rest] == [b.digest for b in expected[10:]]


def test_they_really_work(tmp_path: Path) -> None:
    """Else the test above could pass by the thread's work alone."""
    config = make_config(tmp_path, ROWS)
    with Workers(config, 2) as workers:
        pieces, outcomes = workers.encode(1, np.arange(100, 200), range(100))
        assert len(pieces) == 100
        assert outcomes
        pids = [process.pid for process in workers._processes]
        for pid in pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"TOKENIZERS_PARALLELISM=false" in environment
    assert [start_time(pid) for pid in pids] == [None, None]


def test_an_abandoned_stream_leaves_no_process(tmp_path: Path) -> None:
    batches = iter(stream(make_config(tmp_path, ROWS), 2))
    next(batches)
    assert len(children()) == 2
    batches.close()
    deadline = time.monotonic() + 20
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children()


def children() -> list[int]:
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"trainer.data.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_bad_records_and_files(tmp_path: Path) -> None:
    config = make_config(tmp_path, [*ROWS, {"other": 1}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 451: no column 'text'"):
        list(stream(config, 4))
    skipping = make_config(tmp_path, [*ROWS, {"other": 1}], on_bad_record="skip")
    made = stream(skipping, 4)
    assert list(made)
    assert made.counts()["bad"] == 2  # in two epochs


def test_modules_of_the_current_folder_are_not_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random.py", "trainer.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with Workers(make_config(tmp_path, ROWS[:80]), 1) as workers:
        assert len(workers.encode(0, np.arange(40), range(40))[0]) == 40


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    with Workers(make_config(tmp_path, ROWS), 2) as workers:
        workers.encode(0, np.arange(100), range(100))
        os.kill(workers._processes[1].pid, signal.SIGTERM)  # of a preemption: the rank needs its batches still
        workers.encode(0, np.arange(100), range(100))
        os.kill(workers._processes[1].pid, signal.SIGKILL)
        workers._processes[1].wait()
        with pytest.raises(DsftError, match=r"has died \(exit codes \[None, -9\]\)"):
            workers.encode(0, np.arange(100), range(100))


def test_they_die_with_a_killed_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(make_config(tmp_path, ROWS).model_dump_json())
    program = (
        "import sys, time, numpy as np; from pathlib import Path; from trainer.config.schema import LaunchConfig;"
        "from trainer.data.workers import Workers;"
        "workers = Workers(LaunchConfig.model_validate_json(Path(sys.argv[1]).read_text()), 2).__enter__();"
        "workers.encode(0, np.arange(100), range(100));"
        "print(*[process.pid for process in workers._processes], flush=True); time.sleep(100)"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.json")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert rank.stdout is not None
    pids = [int(pid) for pid in rank.stdout.readline().split()]
    assert len(pids) == 2
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 20
    while any(start_time(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [start_time(pid) for pid in pids] == [None, None]


def test_auto_leaves_cores_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for ranks, count in (("1", 4), ("8", 2), ("16", 1), ("32", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert worker_count("auto") == count
    assert worker_count(3) == 3
