"""Whole runs beside HF Trainer with the same recipe: `python benchmarks/task_scores.py cola --model MODEL --data DATA`.

dsft runs by `dsft launch` at one rank; at the same time HF Trainer in one process, with its own order of the data,
dropout, heads and losses. Both start from the same pretrained weights and are scored by the same code. Each seed is a
pair of runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import RESULTS, command_line, launch, write_result
from hf_tasks import collator_of, example_of, samples_in_order_of_files, scores_of

_COLA = {"column_names": ["source", "label", "mark", "sentence"], "quoting": False}
_CONLL = {"format": "conll", "column_names": ["tokens", "tags"]}
_SQUAD = {"format": "squad"}
_KINDS = ("corporation", "creative-work", "group", "location", "person", "product")
# files below --data: one to train on, others to score; the learning recipe is that of both sides
RECIPES: dict[str, dict[str, Any]] = {
    "sst2": {
        "task": {"type": "text-classification"},
        "train": "train.tsv",
        "scored": {"dev": "dev.tsv", "test": "test.tsv"},
        "source": {"column_names": ["sentence", "label"], "quoting": False},
        "metrics": ["accuracy"],
        "length": 128,
        "recipe": {"learning_rate": 5e-5, "batch": 32, "epochs": 2},
    },
    "cola": {
        "task": {"type": "text-classification", "metrics": ["matthews", "accuracy"]},
        "train": "in_domain_train.tsv",
        "scored": {"in_domain": "in_domain_dev.tsv", "out_of_domain": "out_of_domain_dev.tsv"},
        "source": _COLA,
        "metrics": ["matthews", "accuracy"],
        "length": 128,
        "recipe": {"learning_rate": 5e-5, "batch": 32, "epochs": 2},
    },
    "wnut17": {
        # the tags of all parts: those of the sixty per cent to train on lack one
        "task": {"type": "token-classification", "labels": ["O", *(f"{p}-{k}" for k in _KINDS for p in "BI")]},
        "train": "wnut17train.conll",
        "scored": {"dev": "emerging.dev.conll", "test": "emerging.test.annotated"},
        "source": _CONLL,
        "metrics": ["f1", "precision", "recall"],
        "length": 128,
        "recipe": {"learning_rate": 2e-4, "batch": 16, "epochs": 4},
    },
    "squad-v2": {
        "task": {
            "type": "question-answering",
            "unanswerable": True,
            "doc_stride": 48,
            "max_question_tokens": 32,
        },
        "train": "train.json",
        "scored": {"test": "test.json"},
        "source": _SQUAD,
        "metrics": ["f1", "exact_match", "best_f1", "has_answer_f1", "no_answer_f1"],
        "length": 192,
        "recipe": {"learning_rate": 2e-4, "batch": 16, "epochs": 2},
    },
}


def split_articles(source: Path, folder: Path, held_out: int) -> None:
    """train.json and test.json of a SQuAD file: its last articles are held out."""
    value = json.loads(source.read_text())
    articles = value["data"]
    for name, part in (("train", articles[:-held_out]), ("test", articles[-held_out:])):
        (folder / f"{name}.json").write_text(json.dumps({**value, "data": part}))


def make_config(options: argparse.Namespace, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    recipe = RECIPES[options.name]
    learning = recipe["recipe"] | {"epochs": options.epochs or recipe["recipe"]["epochs"]}
    train = {"path": str(data / recipe["train"]), **recipe["source"]}
    return {
        "name": f"{options.name}-{seed}",
        "output_dir": str(folder / "runs"),
        "task": recipe["task"],
        "model": {"path": options.model, "dtype": "float32", "gradient_checkpointing": False},
        "data": {
            "train": [train | ({"limit": options.limit} if options.limit else {})],
            "evaluation": [
                {"path": str(data / file), "name": name, **recipe["source"]} for name, file in recipe["scored"].items()
            ],
            "sequence_length": recipe["length"],
            "seed": seed,
        },
        "training": {
            "global_batch_size": learning["batch"],
            "micro_batch_size": learning["batch"],
            "epochs": learning["epochs"],
            "optimizer": {"learning_rate": learning["learning_rate"], "weight_decay": 0.01},
            "schedule": {"type": "linear", "warmup_steps": 0},
            "seed": seed,
        },
        "checkpoint": {"interval_steps": None},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"backend": "local", "processes_per_node": 1, "environment": {"DS_ACCELERATOR": "cpu"}},
    }


def train_dsft(made: dict[str, Any], folder: Path) -> dict[str, float]:
    lines = (launch(made, folder) / "metrics.jsonl").read_text().splitlines()
    scores: dict[str, float] = json.loads(lines[-1])["evaluation"]
    return scores


def train_hf(config: Any, task: Any, samples: dict[str, list[Any]], seed: int, folder: Path) -> dict[str, float]:
    """Scores of HF Trainer's model as ``set/metric``."""
    import torch
    import transformers

    training = config.training
    torch.manual_seed(seed)
    model_config = transformers.AutoConfig.from_pretrained(config.model.path)
    task.configure(model_config)
    auto = getattr(transformers, task.auto_class)
    model = auto.from_pretrained(config.model.path, config=model_config, dtype=torch.float32)
    transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / "hf"),
            per_device_train_batch_size=training.global_batch_size,
            num_train_epochs=training.epochs,
            learning_rate=training.optimizer.learning_rate,
            weight_decay=training.optimizer.weight_decay,
            lr_scheduler_type="linear",
            warmup_steps=training.schedule.warmup_steps,
            max_grad_norm=training.max_grad_norm,
            seed=seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[example_of(sample, task) for sample in samples["train"]],
        data_collator=collator_of(task, transformers.AutoTokenizer.from_pretrained(config.model.path)),
    ).train()
    return {
        f"{name}/{metric}": value
        for name, scored in samples.items()
        if name != "train"
        for metric, value in scores_of(model, task, scored).items()
    }


def result_name(options: argparse.Namespace) -> str:
    return f"task_scores_{options.name.replace('-', '_')}"


def write_scores(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The result so far."""
    recipe = RECIPES[options.name]
    rows = [["score", "dsft (mean of seeds)", "HF Trainer", "dsft, each seed", "HF, each seed"]]
    for score in (f"{part}/{metric}" for part in recipe["scored"] for metric in recipe["metrics"]):
        sides = [[run[score] for run in found["scores"][side]] for side in ("dsft", "hf")]
        each = [", ".join(f"{value:.3f}" for value in side) for side in sides]
        rows.append([score, *(f"{statistics.fmean(side):.3f}" for side in sides), *each])
    value = {"command": command_line("task_scores"), "formula": "the task's scores after the last step", **found}
    write_result(options.output, result_name(options), value, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--model", required=True, help="Hugging Face folder of an encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files; squad-v2: a SQuAD file")
    parser.add_argument("--held-out", type=int, default=2, help="squad-v2: articles at the end to score")
    parser.add_argument("--epochs", type=float, help="other than the recipe's")
    parser.add_argument("--limit", type=int, help="records to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--add", action="store_true", help="to the seeds of the result that is there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    import torch

    from trainer.config.schema import LaunchConfig
    from trainer.model import quiet_libraries
    from trainer.tasks import get_task
    from trainer.tokenizer import load_tokenizer

    quiet_libraries()
    torch.set_num_threads(1)
    recipe = RECIPES[options.name]
    earlier: dict[str, Any] = {"scores": {"dsft": [], "hf": []}, "seeds": []}
    if options.add:
        earlier = json.loads((options.output / f"{result_name(options)}.json").read_text())
    found, seeds = earlier["scores"], earlier["seeds"]
    with tempfile.TemporaryDirectory(prefix="dsft-scores-") as name:
        folder = Path(name)
        data = options.data.absolute()
        if data.is_file():
            split_articles(data, folder, options.held_out)
            data = folder
        config = LaunchConfig.model_validate(make_config(options, data, folder, options.seeds[0]))
        task = get_task(config, load_tokenizer(config.model))
        samples = {"train": samples_in_order_of_files(config, task, config.data.train)}
        for source in config.data.evaluation:
            assert source.name is not None
            samples[source.name] = samples_in_order_of_files(config, task, [source])
        assert config.training.epochs is not None
        steps = int(config.training.epochs * -(-len(samples["train"]) // config.training.global_batch_size))
        learned = recipe["recipe"] | ({"epochs": options.epochs} if options.epochs else {})
        learned |= {"schedule": "linear, warm-up over a tenth", "weight_decay": 0.01, "dtype": "float32", "ranks": 1}
        told = {"recipe": learned, "steps": steps, "samples": {part: len(of) for part, of in samples.items()}}
        if options.add and told != {key: earlier[key] for key in told}:
            raise SystemExit(f"the result that is there has another recipe than {told}")
        for seed in options.seeds:
            made = make_config(options, data, folder, seed)
            made["training"]["schedule"]["warmup_steps"] = steps // 10
            with ThreadPoolExecutor() as pool:  # a process and this one, of one thread each
                ours = pool.submit(train_dsft, made, folder)
                found["hf"].append(train_hf(LaunchConfig.model_validate(made), task, samples, seed, folder))
                found["dsft"].append(ours.result())
            seeds.append(seed)
            write_scores(options, {**told, "seeds": seeds, "scores": found})


if __name__ == "__main__":
    main()
