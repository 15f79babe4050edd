"""Configs and facts for tests of planning and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.facts import Facts, adapted_facts, facts_of_model
from launcher.gpus import Gpu
from trainer.config.schema import LaunchConfig

GIB = 1 << 30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def complete() -> dict[str, Any]:
    """The config that the documentation shows whole, with its data beside it."""
    source = {"path": "data/test.json", "format": "jsonl", "columns": {"prompt": "question", "completion": "answer"}}
    return {
        "name": "gsm8k-sft",
        "output_dir": "runs",
        "task": {"type": "causal-lm"},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 320,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": 1000,
                "max_position_embeddings": 1024,
            },
            "tokenizer": "data/test_model.model",
            "dtype": "bfloat16",
            "attention": "auto",
            "gradient_checkpointing": True,
            "freeze": ["model.layers.0"],
        },
        "data": {
            "train": [{**source, "weight": 1.0}],
            "evaluation": [{**source, "limit": 100}],
            "sequence_length": 512,
            "packing": True,
            "seed": 17,
        },
        "training": {
            "global_batch_size": 32,
            "micro_batch_size": "auto",
            "max_steps": 200,
            "optimizer": {"type": "adamw", "learning_rate": 5e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]},
            "schedule": {"type": "cosine", "warmup_steps": 20, "final_ratio": 0.1},
            "max_grad_norm": 1.0,
        },
        "deepspeed": {"zero_stage": 3, "offload_optimizer": "none", "config": {}},
        "checkpoint": {"interval_steps": 50, "keep_last": 2},
        "evaluation": {"interval_steps": 50},
        "logging": {"interval_steps": 1, "tensorboard": True},
        "cluster": {"backend": "local", "nodes": 1, "processes_per_node": 2},
        "resilience": {"max_restarts": 3, "hang_timeout_seconds": "auto"},
    }


def write(path: Path, config: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def runnable(folder: Path, **sections: Any) -> Path:
    """A config file whose data and tokenizer files exist; `sections` replace sections."""
    write(folder / "data/test.json", '{"question": "1 + 1?", "answer": "2"}\n')
    write(folder / "data/test_model.model", "as far as planning looks")
    return write(folder / "config.json", {**complete(), **sections})


def facts_of(config: LaunchConfig, gpus: tuple[Gpu, ...] = (), memory: int = 64 * GIB, cores: int = 8) -> Facts:
    """A machine made up for a test, with the real facts of the config's model."""
    return Facts(
        "node", gpus, cores, memory, memory, 1000 * GIB, facts_of_model(config, config.model), adapted_facts(config)
    )
