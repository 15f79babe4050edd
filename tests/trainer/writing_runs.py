"""Small runs of tasks that write text: their data, tokenizers and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.facts import gather_facts
from launcher.plan import make_plan
from trainer.config.schema import LaunchConfig
from trainer.rundir import RunDirectory, write_json

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("nulla", "unum", "duo", "tria", "quattuor", "quinque", "sex", "septem", "octo", "novem")


def pair(n: int) -> tuple[str, str]:
    """A sentence of four to six words, and its translation word by word."""
    digits = [int(d) for d in str(7919 * n + 104729)][: 4 + n % 3]
    return " ".join(NUMBERS[d] for d in digits), " ".join(WORDS[d] for d in digits)


def make_texts(folder: Path) -> Path:
    """Pairs as records, and a SentencePiece tokenizer trained on them."""
    import sentencepiece

    pairs = [pair(n) for n in range(240)]
    (folder / "corpus.txt").write_text("".join(f"{text}\n" for both in pairs for text in both))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=44,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    for name, chosen in (("train", pairs), ("test", pairs[::23])):
        lines = [json.dumps({"source": source, "target": target}) for source, target in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_run(folder: Path, texts: Path, ranks: int, generation: Any, **more: Any) -> RunDirectory:
    """A run of a small BART that translates, as the launcher leaves it."""
    values: dict[str, Any] = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "task": {"type": "translation", "generation": generation, "metrics": ["bleu", "chrf", "exact_match"]},
        "model": {
            "config": {
                "model_type": "bart",
                "vocab_size": 48,
                "d_model": 48,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "dropout": 0.0,
                "max_position_embeddings": 64,
                "init_std": 0.1,
                "pad_token_id": 0,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "decoder_start_token_id": 0,
                "forced_eos_token_id": None,
            },
            "tokenizer": str(texts / "pieces.model"),
            "dtype": "float32",
        },
        "data": {
            "train": [{"path": str(texts / "train.jsonl")}],
            "evaluation": [{"path": str(texts / "test.jsonl")}],
            "sequence_length": 32,
            "window_documents": 40,
        },
        "training": {
            "global_batch_size": 12,
            "micro_batch_size": 3,
            "max_steps": 48,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"type": "linear", "warmup_steps": 3},
        },
        "checkpoint": {"interval_steps": None},
        "evaluation": {"interval_steps": 24},
        "logging": {"tensorboard": False},
        "cluster": {"processes_per_node": ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
    }
    for path, value in more.items():
        section, _, key = path.partition("__")
        values[section] = {**values[section], key: value} if key else value
    config = LaunchConfig.model_validate(values)
    run = RunDirectory(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(run.config_path, config.model_dump(mode="json"))
    write_json(run.plan_path, make_plan(config, gather_facts(config)).to_json())
    return run


def make_programs(folder: Path) -> Path:
    """A tokenizer of bytes, and problems in HumanEval's layout that a small model can learn."""
    from training_runs import make_workspace

    make_workspace(folder)
    lines = []
    for n in range(40):
        body, value = (("    return x + 1\n", n + 1), ("    return x * 2\n", 2 * n))[n % 2]
        lines.append(
            json.dumps(
                {
                    "task_id": f"Own/{n}",
                    "prompt": f"def {('add', 'two')[n % 2]}(x):\n",
                    "canonical_solution": body,
                    "test": f"def check(candidate):\n    assert candidate({n}) == {value}\n",
                    "entry_point": ("add", "two")[n % 2],
                }
            )
        )
    (folder / "programs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "problems.jsonl").write_text("\n".join(lines[:5]) + "\n")
    return folder


def make_code_run(folder: Path, programs: Path, ranks: int, generation: Any, **more: Any) -> RunDirectory:
    """A run of a small Llama that learns these programs, which are run at evaluation."""
    model = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "eos_token_id": 1,
    }
    values: dict[str, Any] = {
        "task": {
            "type": "causal-lm",
            "generation": generation,
            "metrics": ["exact_match"],
            "code_execution": {"enabled": True, "pass_at": [1]},
        },
        "model": {"config": model, "tokenizer": str(programs / "tokenizer.json"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(programs / "programs.jsonl")}],
            "evaluation": [{"path": str(programs / "problems.jsonl")}],
            "sequence_length": 64,
            "window_documents": 20,
        },
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 60,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"type": "linear", "warmup_steps": 3},
        },
        "export": {"enabled": False},
        "evaluation": {"interval_steps": 1000},
    }
    return make_run(folder, programs, ranks, generation, **{**values, **more})
