"""The launch-ready multi-node configs: each is planned as on a cluster of 80 GB GPUs, and its job script is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.slurm import check_syntax
from slurm.job import Job, render
from trainer.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "slurm"
# As in the config.json of each model on the hub
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen/Qwen3-1.7B": (
        _QWEN3 | dict(zip(_KEYS, (2048, 28, 16, 6144), strict=True)) | {"tie_word_embeddings": True},
        1.7,
    ),
    "Qwen/Qwen3-8B": (_QWEN3 | dict(zip(_KEYS, (4096, 36, 32, 12288), strict=True)), 8.2),
    "Qwen/Qwen3-14B": (_QWEN3 | dict(zip(_KEYS, (5120, 40, 40, 17408), strict=True)), 14.8),
    "Qwen/Qwen3-32B": (_QWEN3 | dict(zip(_KEYS, (5120, 64, 64, 25600), strict=True)), 32.8),
    "meta-llama/Llama-3.1-70B-Instruct": (
        {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | dict(zip(_KEYS, (8192, 80, 64, 28672), strict=True)),
        70.6,
    ),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: str(path.stem))
def test_it_is_planned_and_fits(tmp_path: Path, path: Path) -> None:
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    for name in ("train", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = load_config(tmp_path / "config.json")
    assert config.model.path is not None
    model, billions = MODELS[config.model.path]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").touch()
    command = [sys.executable, "-P", "-m", "launcher", "plan", "config.json", "--json", "--set", "model.path=./model"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    plan = json.loads(done.stdout)
    full = [text for text in plan["problems"] if "more disk" in text]  # this machine's disk is not the cluster's
    assert plan["problems"] == full, done.stderr
    assert plan["model"]["parameters"] / 1e9 == pytest.approx(billions, rel=0.02)
    assert plan["world_size"] == 8 * config.cluster.nodes
    assert path.stem.split("-")[1] == str(config.cluster.nodes)
    assert 0.1 < plan["memory"]["total"] / plan["device_memory"] < 0.95
    assert plan["batch"]["micro_batches_per_rank"] >= 1
    assert config.cluster.backend == "slurm"
    check_syntax(render(Job(config.name, tmp_path / "run", ["dsft"]), config.cluster))
