"""What a user gets wrong ends in exit code 2 with a message that names it, before any rank starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORDS = [{"prompt": f"say {n}", "completion": f"number {n}"} for n in range(40)]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A config that would run; each test breaks one thing of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({token: index for index, token in enumerate(["</s>", *alphabet])}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.save(str(tmp_path / "tokenizer.json"))
    write_records(tmp_path, [json.dumps(record) for record in RECORDS])
    return {
        "name": "bad",
        "output_dir": "runs",
        "task": {"type": "causal-lm"},
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 300,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "tokenizer": "tokenizer.json",
        },
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 64},
        "training": {"global_batch_size": 4, "max_steps": 2},
        "cluster": {"processes_per_node": 2, "environment": {"DS_ACCELERATOR": "cpu"}},
    }


def write_records(folder: Path, lines: list[str]) -> None:
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))


def refused(folder: Path, config: dict[str, Any] | str, *options: str) -> str:
    """Launch; the message of a launch that ended with exit code 2 and has started no rank."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "launch", str(folder / "config.json"), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("rank*.log"))
    return done.stderr


def test_config_errors_are_shown_all_at_once(tmp_path: Path, config: dict[str, Any]) -> None:
    config["training"]["global_batch_sise"] = 4
    config["data"]["sequence_length"] = "long"
    message = refused(tmp_path, config)
    assert "training.global_batch_sise" in message
    assert "global_batch_size" in message
    assert "data.sequence_length" in message
    assert '"long"' in message


def test_empty_data(tmp_path: Path, config: dict[str, Any]) -> None:
    write_records(tmp_path, ["", ""])
    assert "no records" in refused(tmp_path, config)


def test_record_without_the_column(tmp_path: Path, config: dict[str, Any]) -> None:
    write_records(tmp_path, [json.dumps(record) for record in [*RECORDS, {"prompt": "only"}]])
    message = refused(tmp_path, config)
    assert "train.jsonl, line 41" in message
    assert "'completion'" in message


def test_broken_json_names_file_and_line(tmp_path: Path, config: dict[str, Any]) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    write_records(tmp_path, [*lines[:6], lines[6][:-9], *lines[7:]])
    assert "train.jsonl, line 7: not valid JSON" in refused(tmp_path, config)


def test_long_record_where_it_is_an_error(tmp_path: Path, config: dict[str, Any]) -> None:
    write_records(tmp_path, [json.dumps(record) for record in [*RECORDS, {"prompt": "a", "completion": "b" * 99}]])
    config["data"]["on_long"] = "error"
    message = refused(tmp_path, config)
    assert "line 41" in message
    assert "sequence_length" in message


def test_nothing_to_learn(tmp_path: Path, config: dict[str, Any]) -> None:
    write_records(tmp_path, [json.dumps({"prompt": "a", "completion": ""})] * 9)
    assert "leaves a token to learn from" in refused(tmp_path, config)


def test_vocabulary_larger_than_the_models(tmp_path: Path, config: dict[str, Any]) -> None:
    config["model"]["config"]["vocab_size"] = 100
    message = refused(tmp_path, config)
    assert "vocab_size is 100" in message
    assert "257" in message


def test_a_metric_that_is_no_score(tmp_path: Path, config: dict[str, Any]) -> None:
    config["data"]["evaluation"] = [{"path": "train.jsonl", "limit": 9}]
    config["evaluation"] = {"metric": "accuracy"}
    assert "evaluation.metric: there is no 'accuracy'; the scores are loss" in refused(tmp_path, config)


def test_a_model_folder_without_whole_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config["model"].pop("config")))
    config["model"]["path"] = "./model"
    assert "has no weights" in refused(tmp_path, config)
    (tmp_path / "model/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "model.safetensors is not whole" in refused(tmp_path, config)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks weights of model-00001-of-00001.safetensors" in refused(tmp_path, config)
    (tmp_path / "model/attempts").mkdir()
    for folder in ("model", "model/checkpoints", "model/checkpoints/step-00000005"):
        (tmp_path / folder).mkdir(exist_ok=True)
        config["model"]["path"] = f"./{folder}"
        assert f"is of a run of dsft; name its model, {tmp_path}/model/export" in refused(tmp_path, config)


def test_no_tokenizer(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "model.tokenizer" in refused(tmp_path, config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root; CI runs as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_too_small_for_the_checkpoints(tmp_path: Path, config: dict[str, Any], small_disk: Path) -> None:
    message = refused(tmp_path, config, "--set", f"output_dir={small_disk}")
    assert "disk" in message.lower() or "space" in message.lower()
