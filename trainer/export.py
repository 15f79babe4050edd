"""Exports a checkpoint as a Hugging Face model folder: structure, weights, tokenizer, model card."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint_files import damage, folder_name, published
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.export_adapter import write_config
from trainer.export_weights import Weights
from trainer.failures import DsftError, StorageError, UserError, in_words
from trainer.hub import offline_if_unreachable
from trainer.model import DTYPES, load_model_config, quiet_libraries
from trainer.rundir import EXPORT_ABOUT, RunDirectory, sync, write_json
from trainer.tasks import get_task, task_tokenizer
from trainer.tasks.base import BaseTask
from trainer.vocabulary import wanted_vocabulary

_ROOM_BYTES = 100 << 20  # tokenizer, configs


def export_run(
    run: RunDirectory,
    config: LaunchConfig,
    step: int | None = None,
    dtype: str | None = None,
    output: Path | None = None,
    adapter: str | None = None,
) -> Path:
    """Write a checkpoint (the newest one by default) as a Hugging Face folder and check it; returns the folder.

    The folder appears by one rename, whole, checked and on disk; an older export of the run is replaced, other folders
    are not.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``output`` is in use.
        StorageError: no room on the disk, or what was written is not what the checkpoint holds.
    """
    source = published(run, step)
    found = damage(source)
    if found:
        others = [str(other) for other in run.published_checkpoints() if folder_name(other) != source.name]
        advice = f"take another one, by --step: {', '.join(others)}" if others else "there is no other one"
        raise UserError(f"the checkpoint is damaged: {found}; {advice}")
    target = run.export_dir if output is None else output.absolute()
    if output is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target} is there already: choose a folder that is not, or is empty")

    alone = (adapter or config.export.adapter) == "adapter"
    if alone and config.model.adapter is None:
        raise UserError("--adapter adapter: this run has no `model.adapter`; leave it out to export the whole model")
    if alone and getattr(config.task, "head", None) is not None:
        raise UserError("--adapter adapter: an adapter's folder cannot hold the layers of `task.head`; leave it out")
    chosen = dtype or config.export.dtype
    if chosen == "auto":
        chosen = "float32" if alone else config.model.dtype
    tokenizer = task_tokenizer(config)
    task = get_task(config, tokenizer)
    model = _meta_model(config.model, task)
    if model.can_generate():
        task.configure_generation(model.generation_config)
    weights = Weights(source, model, DTYPES[chosen], config.model.adapter, alone)
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = weights.total_bytes + _ROOM_BYTES, shutil.disk_usage(target.parent).free
    if needed > free:
        raise StorageError(
            f"the export wants {needed / 1e9:.3g} GB free and {free / 1e9:.3g} GB are free in {target.parent}: "
            "free some, or give `dsft export` another --output"
        )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights.write(partial, int(config.export.max_shard_size_gib * 2**30))
    if alone:
        assert config.model.adapter is not None
        trained = weights.trained_whole
        write_config(partial, model, config.model.adapter, trained, config.model.path, task.auto_class)
    else:
        _save_configs(model, task, partial, chosen)
    tokenizer.save(partial)
    task.save(partial)
    (partial / "README.md").write_text(_model_card(run, config, int(weights.state["step"])), encoding="utf-8")
    about = task.config.model_dump(mode="json", include={"name", "task", "model", "data", "training"})
    write_json(partial / EXPORT_ABOUT, {"step": int(weights.state["step"]), "config": about})
    base = (config.model.path, DTYPES[config.model.dtype]) if alone and config.model.path else None
    weights.check(partial, config.model.trust_remote_code, base, task.example())
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    sync(target.parent)
    return target


def _save_configs(model: Any, task: BaseTask, folder: Path, dtype: str) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _meta_model(config: ModelConfig, task: BaseTask) -> Any:
    """The model's structure, without memory for its weights."""
    model_config = load_model_config(config)
    task.configure(model_config)
    if (size := wanted_vocabulary(config, model_config)) is not None:
        model_config.get_text_config().vocab_size = size
    with torch.device("meta"):
        return task.auto.from_config(model_config, trust_remote_code=config.trust_remote_code)


def _model_card(run: RunDirectory, config: LaunchConfig, step: int) -> str:
    scores = run.evaluation_lines()
    origin = config.model.path or f"random weights ({(config.model.config or {}).get('model_type')})"
    four_bits = config.model.adapter is not None and config.model.adapter.type == "qlora"
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {config.model.path}"] if config.model.path and not Path(config.model.path).exists() else []),
        "tags: [dsft]",
        "---",
        "",
        f"# {config.name}",
        "",
        f"Fine-tuned with dsft: task `{config.task.type}`, {step} optimizer steps, global batch size "
        f"{config.training.global_batch_size} sequences of up to {config.data.sequence_length} tokens.",
        "",
        f"- starts from: {origin}",
        *(["- trained over these weights in 4 bits (NF4, scales in 8 bits)"] if four_bits else []),
        *(f"- training data: {source.path}" for source in config.data.train),
        "",
    ]
    if scores:
        lines += ["| step | " + " | ".join(scores[-1]["evaluation"]) + " |"]
        lines += ["| --- |" + " --- |" * len(scores[-1]["evaluation"])]
        for line in scores:
            lines.append(f"| {line['step']} | " + " | ".join(f"{v:.6g}" for v in line["evaluation"].values()) + " |")
        lines.append("")
    # what decides the result; the rest (where it ran, who was told) is not for everybody
    body = config.model_dump_json(indent=2, include={"name", "task", "model", "data", "training", "evaluation"})
    return "\n".join([*lines, "## Configuration", "", "```json", body, "```", ""])


def main() -> None:
    """`python -P -m trainer.export --run-dir DIR [--step N] [--dtype D] [--adapter A]`, as `dsft export` runs it."""
    parser = argparse.ArgumentParser(description="Export a checkpoint as a Hugging Face folder")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--adapter", choices=("merge", "adapter"))
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_dir)
    config = LaunchConfig.model_validate_json(run.config_path.read_text())
    quiet_libraries()
    try:
        if problem := offline_if_unreachable(config):
            raise UserError(problem)
        print(export_run(run, config, arguments.step, arguments.dtype, arguments.output, arguments.adapter))
    except (DsftError, OSError) as error:
        told = in_words(error)
        print(f"error: {told}", file=sys.stderr)
        sys.exit(told.exit_code)


if __name__ == "__main__":
    main()
