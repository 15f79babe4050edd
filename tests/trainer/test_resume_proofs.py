"""The same run goes on: to the last bit at the same number of ranks, up to rounding at another, for twenty steps.

What is compared after a resume: masters and moments of every parameter, dropout masks, batch digests, losses, gradient
norms. Whole runs of the trainer; those of one number of ranks share a process group, to save start-up time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recording_worker
import torch
from training_runs import figures, logs, make_run, rank_environment

from trainer.checkpoint_files import differences, folder_name
from trainer.parameters import Shard
from trainer.rundir import RunDirectory
from trainer.slices import Slices

CUT, END = 4, 24
MODEL = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_dropout": 0.1,
}
GROUPS = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "groups": [
        {"match": ["*.mlp"], "learning_rate": 5e-4, "weight_decay": 0.3},
        {"match": ["layers:1"], "learning_rate_factor": 2.0},
        {"match": ["model.norm"], "weight_decay": 0.2},
    ],
}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.1, "modules_to_save": ["model.norm"]}
WHOLE_SLICES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# model, deepspeed and optimizer of each; by default small parameters are persistent
Variant = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    "persistent": ({}, {}, {}),
    "partitioned": ({}, {"config": WHOLE_SLICES}, {}),
    "groups": ({}, {"config": WHOLE_SLICES}, GROUPS),
    "frozen": ({"freeze": ["layers:0", "model.embed_tokens"]}, {"config": WHOLE_SLICES}, {}),
    "lora": ({"adapter": LORA}, {}, {}),
    "offload": ({}, {"offload_optimizer": "cpu"}, {}),
    "files": ({}, {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": "/var/tmp"}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {"config": WHOLE_SLICES}, {}),
}


def planned(folder: Path, workspace: Path, variant: str, ranks: int) -> RunDirectory:
    """The run directory of a variant, planned for a number of ranks; what has been trained in it stays."""
    model, deepspeed, optimizer = VARIANTS[variant]
    return make_run(
        folder / variant,
        workspace,
        ranks,
        {
            "config": MODEL,
            "tokenizer": str(workspace / "tokenizer.json"),
            "dtype": "float32",
            "attention": "eager",  # whose dropout can be watched
            "gradient_checkpointing": False,
            **model,
        },
        {
            "deepspeed": deepspeed,
            "checkpoint": {"interval_steps": CUT, "keep_last": 9},
            "evaluation": {},
            "export": {"enabled": False},
        },
        max_steps=END,
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.1, **optimizer},
    )


def train(runs: list[RunDirectory], ranks: int, attempt: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    for run in runs:
        run.attempt_dir(attempt).mkdir(parents=True, exist_ok=True)
    command += [recording_worker.__file__, str(attempt), *(str(run.path) for run in runs)]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, timeout=1500)
    assert done.returncode == 0, "".join(map(logs, runs))[-6000:] + done.stderr.decode()[-2000:]


def continued(whole: dict[str, RunDirectory], folder: Path, workspace: Path, ranks: int) -> dict[str, RunDirectory]:
    """Copies that know of the first steps alone, trained to their end at a number of ranks."""
    runs = {}
    for name, run in whole.items():
        copy = planned(folder, workspace, name, ranks)
        shutil.copytree(run.checkpoints_dir / folder_name(CUT), copy.checkpoints_dir / folder_name(CUT))
        runs[name] = copy
    train(list(runs.values()), ranks, 2)
    return runs


def masks(run: RunDirectory) -> dict[str, str]:
    """Of the steps after the cut, over all ranks."""
    found: dict[str, str] = {}
    for path in run.path.glob("masks*.json"):
        found |= json.loads(path.read_text())
    return {place: digest for place, digest in found.items() if int(place.partition("/")[0]) > CUT}


def tensors(run: RunDirectory) -> dict[str, torch.Tensor]:
    """Masters and moments of the last checkpoint."""
    folder = run.checkpoints_dir / folder_name(END)
    state = json.loads((folder / "state.json").read_text())
    slices = Slices(folder, state)
    found = {}
    for name, shape, trained in state["parameters"]:
        for kind in ("master", "exp_avg", "exp_avg_sq") if trained else ():
            found[f"{kind}/{name}"] = whole = torch.empty(torch.Size(shape).numel())
            slices.read_into(f"{kind}/{name}", Shard(name, whole.numel(), 0, whole.numel(), {}), whole)
    return found


def assert_the_same_bits(found: RunDirectory, whole: RunDirectory) -> None:
    assert figures(found) == figures(whole, CUT + 1)
    assert len(figures(found)) == END - CUT
    assert masks(found) == masks(whole)
    # files of slices by their checksums; and everything in state.json, as the position in the data
    ends = [run.checkpoints_dir / folder_name(END) for run in (found, whole)]
    assert list(differences(*ends)) == []


def assert_the_same_batches(found: RunDirectory, whole: RunDirectory) -> tuple[float, float]:
    """And masks; the largest relative differences of a loss, and of the weights or moments of a parameter."""
    assert masks(found) == masks(whole)
    losses = 0.0
    for line, other in zip(figures(found), figures(whole, CUT + 1), strict=True):
        assert (line[0], *line[3:]) == (other[0], *other[3:])
        losses = max(losses, abs(line[1] - other[1]) / abs(other[1]))
    here, there = tensors(found), tensors(whole)
    assert here.keys() == there.keys()
    weights = max(float((here[key] - there[key]).norm() / there[key].norm().clamp_min(1e-12)) for key in there)
    return losses, weights


def prove(names: list[str], folder: Path, workspace: Path, steps: list[tuple[int, tuple[int, ...]]]) -> None:
    """``steps``: (ranks of the uninterrupted run, those at which it is continued)."""
    problems = []
    for ranks, others in steps:
        whole = {name: planned(folder / f"whole{ranks}", workspace, name, ranks) for name in names}
        train(list(whole.values()), ranks, 1)
        for name, run in whole.items():
            drawn = masks(run)
            assert len(drawn) == len(set(drawn.values())) == 3 * (END - CUT), f"{name}: no dropout to compare"
        for other in others:
            for name, run in continued(whole, folder / f"{ranks}to{other}", workspace, other).items():
                if other == ranks:
                    assert_the_same_bits(run, whole[name])
                    continue
                tolerance, of_weights = (1e-3, 5e-2) if name.startswith("bfloat16") else (1e-6, 1e-5)
                off, weights = assert_the_same_batches(run, whole[name])
                told = f"{ranks} -> {other} {name}: losses differ by {off:.1e}, weights and moments by {weights:.1e}"
                print(told, flush=True)
                if off > tolerance or weights > of_weights:
                    problems.append(told)
    assert not problems


def test_three_ranks_go_on_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    """Sums of two ranks commute, and would hide errors of order; other numbers and variants are in the test below."""
    prove(["groups", "lora"], tmp_path, workspace, [(3, (3,))])


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_variant_at_every_number_of_ranks(workspace: Path, tmp_path: Path) -> None:
    prove(list(VARIANTS), tmp_path, workspace, [(2, (2, 1, 3, 4)), (3, (3,))])
