"""A way to the Hugging Face hub, and none."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, models

from trainer import hub
from trainer.check import check
from trainer.config.loading import load_config
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.data.sources import find_files
from trainer.failures import DataError
from trainer.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, an empty cache, and what a test sets is undone."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_QUICK_SECONDS", 0.01)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield
    os.environ.pop("HF_HUB_OFFLINE", None)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port where nobody listens: the hub."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    return address


@pytest.fixture
def config(tmp_path: Path) -> LaunchConfig:
    value = {"name": "a", "task": {"type": "causal-lm"}, "model": {"path": "some/model"}}
    value["data"] = {"train": [{"path": "a.jsonl"}], "sequence_length": 8}
    value["training"] = {"global_batch_size": 1, "max_steps": 1}
    (tmp_path / "config.json").write_text(json.dumps(value))
    return load_config(tmp_path / "config.json")


def test_what_is_neither_cached_nor_to_be_had_is_told_at_once(config: LaunchConfig, closed: str) -> None:
    report = check(config)
    assert (report["ok"], report["class"]) == (False, "user")
    (error,) = report["errors"]
    assert error.startswith("model.path: some/model is not in this machine's Hugging Face cache")
    assert f"({closed.removeprefix('http://')}: Connection refused)" in error
    assert not constants.HF_HUB_OFFLINE


def test_what_is_cached_is_taken_from_there(config: LaunchConfig, closed: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models--some--model"
    (folder / "snapshots" / "1").mkdir(parents=True)
    (folder / "snapshots" / "1" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1")
    assert hub.offline_if_unreachable(config) is None
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_data_of_the_hub_are_not_waited_for(config: LaunchConfig, closed: str) -> None:
    value = config.model_dump(mode="json")
    value["model"] = {"config": {"model_type": "llama"}, "tokenizer": str(Path(__file__))}
    value["data"]["train"] = [{"path": "hf://datasets/org/name/a.jsonl"}]
    assert hub.offline_if_unreachable(LaunchConfig.model_validate(value)) is None
    with pytest.raises(DataError, match="offline mode is enabled"):
        find_files(value["data"]["train"][0]["path"])


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTP_PROXY"])
def test_a_way_to_the_hub_changes_nothing(
    config: LaunchConfig, closed: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")  # which only the proxy would find
        monkeypatch.setenv(variable, f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.offline_if_unreachable(config) is None
    assert not constants.HF_HUB_OFFLINE


def test_a_user_who_decides_is_not_asked(config: LaunchConfig, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.offline_if_unreachable(config) is None


def test_a_tokenizer_of_the_cache_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache/models--some--model"
    (folder / "snapshots/1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1")
    fast = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    fast.save(str(folder / "snapshots/1/tokenizer.json"))
    (folder / "snapshots/1/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(ModelConfig(path="some/model"))
    assert (tokenizer.encode_batch(["b"])[0].tolist(), tokenizer.eos_id) == ([1], 2)
    assert tokenizer.backend.to_str() == fast.to_str(), "as tasks with encoders need it"
