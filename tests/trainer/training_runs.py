"""Small whole runs of the trainer, for the tests of its parts that need one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launcher.facts import gather_facts
from launcher.plan import make_plan
from trainer.config.schema import LaunchConfig
from trainer.rundir import RunDirectory, write_json

STEPS = 12


def make_workspace(folder: Path) -> Path:
    """A tokenizer of bytes, and records whose completion follows from the prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    fast = Tokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>", "<pad>"])
    fast.save(str(folder / "tokenizer.json"))
    records = [{"prompt": f"{n} + {n % 7} = ", "completion": f"{n + n % 7}." + " yes" * (n % 5)} for n in range(150)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[::11]))
    return folder


def four_bits() -> Any:
    """For transformers to load a model as the paper on QLoRA has it."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def make_run(
    folder: Path,
    workspace: Path,
    ranks: int,
    model: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
    **training: Any,
) -> RunDirectory:
    """A run directory with config and plan, as the launcher leaves it.

    ``model`` instead of a small random one; ``sections`` instead of those here; ``training`` over what it is here.
    """
    config = LaunchConfig.model_validate(
        {
            "name": folder.name,
            "output_dir": str(folder.parent),
            "task": {"type": "causal-lm"},
            "model": model
            or {
                "config": {
                    "model_type": "llama",
                    "vocab_size": 260,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "attention_dropout": 0.1,  # its masks must be remade on resume
                    "tie_word_embeddings": True,
                },
                "tokenizer": str(workspace / "tokenizer.json"),
                "dtype": "float32",
                "freeze": ["model.layers.0.mlp"],
            },
            "data": {
                "train": [{"path": str(workspace / "train.jsonl")}],
                "evaluation": [{"path": str(workspace / "test.jsonl")}],
                "sequence_length": 64,
                "window_documents": 40,
            },
            "training": {
                "global_batch_size": 6,
                "micro_batch_size": 2,
                "max_steps": STEPS,
                "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1},
                "schedule": {"type": "cosine", "warmup_steps": 3},
                **training,
            },
            "checkpoint": {"interval_steps": 4, "keep_last": 3},
            "evaluation": {"interval_steps": 8},
            "export": {"max_shard_size_gib": 3e-5},
            "logging": {"tensorboard": False},
            "cluster": {"processes_per_node": ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
            **(sections or {}),
        }
    )
    run = RunDirectory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(run.config_path, config.model_dump(mode="json"))
    write_json(run.plan_path, make_plan(config, gather_facts(config)).to_json())
    return run


def launch(
    run: RunDirectory, ranks: int, attempt: int = 1, worker: tuple[str, ...] = ("-m", "trainer.worker"), **more: str
) -> int:
    """torchrun, as in the plan; the exit code. ``more`` are environment variables."""
    run.attempt_dir(attempt).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = ["--run-dir", str(run.path), "--attempt", str(attempt)]
    command += [*worker, *arguments]
    return subprocess.run(command, env=rank_environment(**more), capture_output=True, timeout=600).returncode


def launch_and_kill(run: RunDirectory, ranks: int, hold: str) -> None:
    """Start a run that stands still in the middle of a save (see `holding_worker`), and kill all of it."""
    run.attempt_dir(1).mkdir(parents=True, exist_ok=True)
    program = str(Path(__file__).with_name("holding_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", program]
    command += ["--run-dir", str(run.path), "--attempt", "1"]
    agent = subprocess.Popen(
        command, env=rank_environment(HOLD=hold), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not (run.path / "held").exists():
            assert agent.poll() is None, logs(run)
            assert time.monotonic() < deadline, logs(run)
            time.sleep(0.02)
        workers = children(agent.pid)
        assert len(workers) == ranks
        for pid in (*workers, agent.pid):
            os.kill(pid, signal.SIGKILL)
    finally:
        agent.kill()
        agent.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_environment(**more: str) -> dict[str, str]:
    """Of ranks that find this checkout and its tests; ``more`` goes over it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}


def copy_run(source: RunDirectory, target: Path) -> RunDirectory:
    shutil.copytree(source.path, target)
    shutil.rmtree(target / "export")
    return RunDirectory(target)


def figures(run: RunDirectory, first: int = 1) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "batch_digest", "target_tokens")
    return [tuple(line[key] for key in keys) for line in run.step_lines() if line["step"] >= first]


def logs(run: RunDirectory) -> str:
    return "".join(path.read_text() for path in sorted((run.path / "attempts").rglob("rank*.log")))
