"""Words to learn from, and a study of them that takes seconds a trial, for tests of `dsft tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

KEY = "training.optimizer.learning_rate"


def write_words(folder: Path) -> None:
    """A word-level tokenizer, and arithmetic over words."""
    words = [f"w{index}" for index in range(60)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with open(folder / "train.jsonl", "w") as file:
        for index in range(300):
            drawn = [words[(index * 7 + step * (index % 5 + 1)) % 60] for step in range(8 + index % 13)]
            print(json.dumps({"prompt": " ".join(drawn[:4]), "completion": " ".join(drawn[4:])}), file=file)


def write_inputs(folder: Path, **tune: Any) -> Path:
    """Words, and a config of a study of them; returns the config's path."""
    write_words(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "name": "words",
        "task": {"type": "causal-lm"},
        "model": {
            "config": {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 64, **sizes},
            "tokenizer": "tokenizer.json",
            "dtype": "float32",
        },
        "data": {
            "train": [{"path": "train.jsonl"}],
            "evaluation": [{"path": "train.jsonl", "limit": 40}],
            "sequence_length": 32,
            "workers": 0,
        },
        "training": {"global_batch_size": 8, "micro_batch_size": 8, "max_steps": 60},
        "checkpoint": {"interval_steps": 10},
        "evaluation": {"interval_steps": 20},
        "logging": {"tensorboard": False},
        "tune": {"sampler": "grid", "space": {KEY: {"type": "categorical", "choices": [1e-4, 3e-2]}}, **tune},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"
