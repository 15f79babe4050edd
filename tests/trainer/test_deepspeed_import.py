"""Checkpoints of plain DeepSpeed, written by two real ranks, become folders that a run can start from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_program
import pytest
import torch
from safetensors.torch import load_file
from training_runs import rank_environment

from trainer.deepspeed_import import import_checkpoint
from trainer.failures import UserError


def trained(folder: Path, stage: int, *more: str) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [deepspeed_program.__file__, str(folder), str(stage), *more]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "model" / "tokenizer.json").write_text("{}")
    return folder


def imported(folder: Path, checkpoint: Path, *more: str) -> tuple[int, Any, str]:
    """(exit code, the report, what it says on stderr)."""
    command = [sys.executable, "-m", "launcher", "checkpoint", "import", str(checkpoint), "--json"]
    command += ["--model", str(folder / "model"), "--output", str(folder / "out"), *more]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def assert_the_weights(folder: Path) -> None:
    """The masters in fp32, whose roundings are what DeepSpeed's ranks had in bfloat16; all of it under its name."""
    from transformers import LlamaForCausalLM

    expected = load_file(folder / "expected.safetensors")
    before = load_file(folder / "model" / "model.safetensors")
    found = dict(LlamaForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].bfloat16().float(), tensor), name
    assert not torch.equal(found["model.norm.weight"], before["model.norm.weight"])
    assert (folder / "out" / "tokenizer.json").is_file()


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_zero_3_with_frozen_weights(tmp_path: Path) -> None:
    folder = trained(tmp_path, 3, "frozen")
    code, report, said = imported(folder, folder / "checkpoint")
    assert code == 0, said
    assert report["parameters"] == 16872
    assert_the_weights(folder)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            import_checkpoint(folder / "checkpoint", str(folder / "model"), folder / "out", "float32")

    refused("out is there already")
    shutil.rmtree(folder / "out")
    path = folder / "model" / "config.json"
    config = path.read_text()
    path.write_text(config.replace('"intermediate_size": 41', '"intermediate_size": 42'))
    refused(r"is of another model: .* is \[24, 41\] there and \[24, 42\] in --model")
    path.write_text(config)
    # a file that would run code when it is read
    path = next((folder / "checkpoint" / "global_step2").glob("*rank_1*_optim_states.pt"))
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": Evil(tmp_path / "run")}, path)
    refused("cannot be read: Weights only load failed")
    assert not (tmp_path / "run").exists()
    assert not (folder / "out").exists()


@pytest.mark.matrix
@pytest.mark.parametrize(("stage", "more"), [(1, ()), (2, ("frozen",))])
def test_other_stages(stage: int, more: tuple[str, ...], tmp_path: Path) -> None:
    folder = trained(tmp_path, stage, *more)
    code, _, said = imported(folder, folder / "checkpoint", "--dtype", "float32", "--tag", "global_step2")
    assert code == 0, said
    assert_the_weights(folder)


@pytest.mark.matrix
@pytest.mark.parametrize("frozen", [False, True])
def test_universal(frozen: bool, tmp_path: Path) -> None:
    """DeepSpeed's own conversion, which loses frozen weights."""
    folder = trained(tmp_path, 3, *["frozen"] * frozen)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += [
        "--input_folder",
        str(folder / "checkpoint" / "global_step2"),
        "--output_folder",
        str(folder / "universal"),
    ]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, env=rank_environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    code, _, said = imported(folder, folder / "universal")
    if frozen:
        assert (code, "lacks model.layers.0.mlp.down_proj.weight (3 in all)" in said) == (2, True), said
    else:
        assert code == 0, said
        assert_the_weights(folder)
