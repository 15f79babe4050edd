"""dsft's losses beside HF Trainer's: `python benchmarks/task_parity.py --model FOLDER --data FILE` (limit: 1e-5).

The same pretrained weights with the same new head, dropout 0, the same optimizer and schedule. HF Trainer is fed with
dsft's batches, taken out of its stream one by one; dsft runs by `dsft launch`, with ZeRO-3, at each number of ranks.
`--task` is text-classification, token-classification or question-answering.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, command_line, launch, write_result
from hf_tasks import collator_of, example_of, samples_in_order_of_training

LIMIT = 1e-5
# windows of a question with its context that overlap a little, so that some have no answer in them
_OPTIONS = {"question-answering": {"unanswerable": True, "doc_stride": 16, "max_question_tokens": 32}}
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout")


def make_config(options: argparse.Namespace, folder: Path, ranks: int) -> dict[str, Any]:
    source: dict[str, Any] = {"path": str(options.data.absolute())}
    if options.format:
        source |= {"format": options.format}
    if options.column_names:
        source |= {"column_names": options.column_names}
        source |= {} if options.format else {"quoting": False}
    return {
        "name": f"ranks{ranks}",
        "output_dir": str(folder / "runs"),
        "task": {"type": options.task, **_OPTIONS.get(options.task, {})},
        "model": {"path": str(folder / "start"), "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": [source], "sequence_length": options.sequence_length},
        "training": {
            "global_batch_size": options.batch,
            "micro_batch_size": options.batch // (2 * ranks),
            "max_steps": options.steps,
            "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.01},
            "schedule": {"type": "linear", "warmup_steps": options.steps // 10},
        },
        "checkpoint": {"interval_steps": None},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"backend": "local", "processes_per_node": ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
    }


def write_start(model: str, task: Any, folder: Path) -> None:
    """The pretrained model with a new head, without dropout."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    task.configure(config)
    torch.manual_seed(0)
    made = getattr(transformers, task.auto_class).from_pretrained(model, config=config, dtype=torch.float32)
    made.save_pretrained(folder)
    task.tokenizer.save(folder)


def train_hf(config: Any, task: Any, start: Path, folder: Path) -> list[float]:
    """The losses of HF Trainer in one process, on the batches of dsft's stream."""
    import torch
    import transformers

    from trainer.schedule import learning_rate

    training = config.training
    examples = [example_of(sample, task) for sample in samples_in_order_of_training(config, task)]
    # alone, since the loss of transformers' heads for question answering takes in the padding of a batch
    rows = 1 if config.task.type == "question-answering" else training.global_batch_size
    accumulated = training.global_batch_size // rows
    model = getattr(transformers, task.auto_class).from_pretrained(start, dtype=torch.float32)
    losses: list[float] = []
    parts: list[float] = []

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            def factor(done: int) -> float:
                return learning_rate(training, done + 1, 0.0) / training.optimizer.learning_rate

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            parts.append(float(loss))
            if len(parts) == accumulated:
                losses.append(sum(parts))
                parts.clear()
            return loss

    InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            max_steps=training.max_steps,
            learning_rate=training.optimizer.learning_rate,
            weight_decay=training.optimizer.weight_decay,
            max_grad_norm=training.max_grad_norm,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=examples,
        data_collator=collator_of(task, transformers.AutoTokenizer.from_pretrained(start)),
    ).train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of an encoder")
    parser.add_argument("--data", type=Path, required=True, help="a file of records of the task")
    parser.add_argument(
        "--task",
        default="text-classification",
        choices=("text-classification", "token-classification", "question-answering"),
    )
    parser.add_argument("--format", help="of the file, where its name does not tell")
    parser.add_argument("--column-names", nargs="+", default=[], help="of a file without a header")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    from trainer.config.schema import LaunchConfig
    from trainer.model import quiet_libraries
    from trainer.tasks import get_task
    from trainer.tokenizer import load_tokenizer

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="dsft-parity-") as name:
        folder = Path(name)
        made = make_config(options, folder, 1)
        model = {**made["model"], "path": options.model}
        config = LaunchConfig.model_validate({**made, "model": model})
        task = get_task(config, load_tokenizer(config.model))
        write_start(options.model, task, folder / "start")
        expected = train_hf(task.config, task, folder / "start", folder / "hf")
        losses = {"hf": expected}
        for ranks in options.ranks:
            run = launch(make_config(options, folder, ranks), folder)
            lines = (run / "metrics.jsonl").read_text().splitlines()
            losses[str(ranks)] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    differences = {
        str(ranks): max(abs(a - b) for a, b in zip(losses[str(ranks)], expected, strict=True))
        for ranks in options.ranks
    }
    rows = [["ranks", "steps", "first loss", "last loss", "HF Trainer's last", "largest difference", "limit"]]
    for ranks, difference in differences.items():
        ends = [f"{value:.6f}" for value in (losses[ranks][0], losses[ranks][-1], expected[-1])]
        rows.append([ranks, str(options.steps), *ends, f"{difference:.2g}", f"{LIMIT:g}"])
    value = {
        "command": command_line("task_parity"),
        "formula": "largest |dsft's loss - HF Trainer's| of a step",
        "limit": LIMIT,
        "differences": differences,
        "losses": losses,
    }
    write_result(options.output, f"task_parity_{options.task.replace('-', '_')}", value, rows)
    if max(differences.values()) > LIMIT:
        raise SystemExit(f"losses differ by more than {LIMIT:g}: {differences}")


if __name__ == "__main__":
    main()
