"""Prepared data trains in the very same order as streamed data: the same digests, everywhere; other data is refused."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_streams import Exchange

from launcher.cli import main
from trainer.config.loading import load_config
from trainer.config.schema import LaunchConfig
from trainer.data import prepared
from trainer.data.stream import BatchStream, build_training_stream
from trainer.data.workers import Workers
from trainer.failures import DataError
from trainer.lease import acquire
from trainer.prepare import prepare
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer
from trainer.tokenizer_training import train_sentencepiece

WORDS = ["cat", "sat", "mat", "rain", "hill", "stone", "grey", "Grüße", "\n", "wall"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, with long, empty and bad records among them; a tokenizer; a config."""
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), words))

    qa = [{"prompt": text(n % 9), "completion": text(n % 23)} for n in range(150)] + [{"prompt": "a", "completion": 3}]
    (folder / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in qa) + "not JSON\n")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in range(1, 90)))
    train_sentencepiece([text(40) for _ in range(50)], 300, folder / "t.model")
    config = {
        "name": "p",
        "task": {"type": "causal-lm"},
        "model": {"config": {"model_type": "llama", "vocab_size": 300}, "tokenizer": "t.model"},
        "data": {
            "train": [{"path": "qa.jsonl", "weight": 2.0}, {"path": "text.jsonl", "weight": 1.0}],
            "sequence_length": 48,
            "window_documents": 20,
            "on_bad_record": "skip",
            "workers": 0,
        },
        "training": {"global_batch_size": 6, "epochs": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(prepared, "BATCH_DOCUMENTS", 32)  # several batches and shards of small data
        patch.setattr(prepared, "SHARD_BATCHES", 2)
        patch.setattr(prepared, "_OPEN", 2)
        yield


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    report = prepare(load_config(data / "config.json"), data / "done", 2)
    assert report["documents"] == 241
    assert len(list((data / "done").glob("source0-*.arrow"))) == 3
    return data / "done"


def run(config: LaunchConfig, world_size: int, state: dict[str, Any] | None = None, limit: int | None = None) -> Any:
    """((digest, sequences, tokens, targets) of each global batch, its state, counts); ranks are threads."""
    exchange = Exchange(world_size)
    results: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        task = get_task(config, load_tokenizer(config.model))
        stream: BatchStream = build_training_stream(
            config,
            task,
            rank=rank,
            world_size=world_size,
            micro_batch_size=2,
            gather=exchange.gather_of(rank),
            state=state,
            limit=limit,
        )
        results[rank] = (list(stream), stream.counts())

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lists = [batches for batches, _ in results]
    told = [
        (sum(b.digest for b in of) % (1 << 63), of[0].sequences, of[0].tokens, of[0].target_tokens)
        for of in zip(*lists, strict=True)
    ]
    return told, [batch.state for batch in lists[0]], results[0][1]


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 5),
    window=st.integers(3, 60),
    packing=st.booleans(),
    cut=st.integers(1, 6),
    times=st.sampled_from(["null", "1.5", "repeat"]),
)
def test_prepared_is_streamed_at_any_number_of_ranks_and_after_a_resume(
    data: Path, folder: Path, seed: int, window: int, packing: bool, cut: int, times: str
) -> None:
    changes = [f"data.seed={seed}", f"data.window_documents={window}", f"data.packing={json.dumps(packing)}"]
    changes.append(f"data.train.1.epochs={times}")
    streamed = load_config(data / "config.json", changes)
    from_folder = load_config(data / "config.json", [*changes, "data.prepared=done"])
    assert from_folder.data.prepared == str(folder)
    expected, states, counts = run(streamed, 1)
    assert counts["bad"] == 4
    assert counts["split"] > 0
    for world_size in (1, 2, 3):
        assert run(from_folder, world_size)[::2] == (expected, counts)
    assert run(from_folder, 2, states[cut - 1])[0] == expected[cut:], "prepared goes on where streamed has stopped"
    assert run(streamed, 3, run(from_folder, 2, limit=cut)[1][-1])[0] == expected[cut:]


def test_nothing_is_tokenised_again(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(data / "config.json", ["data.prepared=done", "data.workers=2"])

    def fail(*_: Any) -> None:
        raise AssertionError("tokenised")

    expected = run(load_config(data / "config.json"), 1)[0]
    monkeypatch.setattr("trainer.data.encoding.SourceEncoder.encode", fail)
    monkeypatch.setattr(Workers, "__enter__", fail)
    assert run(config, 1)[0] == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.sequence_length=32", r"another data\.sequence_length \(48 then, 32 now\)"),
        ("data.on_long=truncate", r"another data\.on_long \(split then, truncate now\)"),
        ("data.train.1.limit=5", r"another data\.train\.1 "),
        ("data.train.0.path=text.jsonl", r"another data\.train\.0 \(files\) \(other content\)"),
        ("model.tokenizer=other.model", r"another model\.tokenizer \(other content\)"),
        ("data.prepared=empty", r"nothing is prepared in .*empty: run `dsft prepare`"),
    ],
)
def test_prepared_from_something_else_is_refused(data: Path, folder: Path, change: str, told: str) -> None:
    if "other.model" in change:
        train_sentencepiece(["other words entirely " * 30, "so that pieces differ"], 280, data / "other.model")
    config = load_config(data / "config.json", ["data.prepared=done", change])
    with pytest.raises(DataError, match=told):
        build_training_stream(
            config,
            get_task(config, load_tokenizer(config.model)),
            rank=0,
            world_size=1,
            micro_batch_size=1,
            gather=list,
        )


def test_verb_prepares_once_and_a_torn_file_is_refused(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = data / "by-verb"
    command = ["prepare", str(data / "config.json"), "--output", str(target), "--processes", "1"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kept"] is False
    assert main(command) == 0
    assert "already prepared" in capfd.readouterr().out
    assert main([*command, "--set", "data.sequence_length=16"]) == 2
    assert "with another data.sequence_length (48 then, 16 now)" in capfd.readouterr().err
    checked = ["data", str(data / "config.json"), "--set", f"data.prepared={target}"]
    assert main(checked) == 0
    shard = next(target.glob("source1-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9])
    assert main(checked) == 2
    assert "is missing or not whole" in capfd.readouterr().out.replace("\n", " ")


def test_two_do_not_prepare_one_folder_at_once(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(data / "config.json"), "--output", str(tmp_path), "--processes", "1"]
    with acquire(tmp_path / "lock"):
        assert main(command) == 75
        told = capfd.readouterr().err
        assert f"{tmp_path}: another `dsft prepare` is writing here: process {os.getpid()}" in told
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert main(command) == 0
    with acquire(tmp_path / "lock"):  # nothing is left to write
        assert main(command) == 0


def test_other_tasks_are_refused(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change = ["--set", 'task={"type": "text-classification"}']
    assert main(["prepare", str(data / "config.json"), *change]) == 2
    assert "only causal-lm can be prepared" in capfd.readouterr().err
