"""Exports a checkpoint as a Hugging Face model folder, parameter by parameter.

Peak memory is one shard of the export plus one parameter: the slices of a checkpoint are read where they lie, joined,
cast and written; the model itself is never built (only its structure, on the meta device).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer import checkpoint
from trainer.checkpoint_files import damage, published
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.engine import Shard
from trainer.failures import UserError
from trainer.model import DTYPES
from trainer.rundir import RunDirectory, write_json
from trainer.tokenizer import load_tokenizer

_WEIGHTS = "model"


def export_run(run: RunDirectory, config: LaunchConfig, step: int | None = None, dtype: str | None = None) -> Path:
    """Write ``export/`` from a checkpoint (the newest one by default); returns the folder.

    The folder appears by one rename, whole; an older export is replaced.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    source = published(run, step)
    found = damage(source)
    if found:
        raise UserError(f"the checkpoint is damaged: {found}; export another step ({run.published_checkpoints()})")

    target = run.export_dir
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    chosen = dtype or (config.model.dtype if config.export.dtype == "auto" else config.export.dtype)
    state = json.loads((source / "state.json").read_text())
    _write_weights(source, state, partial, DTYPES[chosen], int(config.export.max_shard_size_gib * 2**30))
    _write_model_config(config.model, partial, chosen)
    load_tokenizer(config.model).save(partial)
    (partial / "README.md").write_text(_model_card(run, config, int(state["step"])), encoding="utf-8")
    if target.exists():
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(target)
    return target


def whole_parameters(folder: Path, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of a checkpoint, one at a time: fp32 masters, frozen ones as they are."""
    slices = checkpoint.Slices(folder, state)
    frozen_dtype = None
    for name, shape, trained in state["parameters"]:
        numel = math.prod(shape)
        key = f"{'master' if trained else 'frozen'}/{name}"
        if not trained and frozen_dtype is None:
            frozen_dtype = slices.dtype(key)
        whole = torch.empty(numel, dtype=torch.float32 if trained else frozen_dtype)
        slices.read_into(key, Shard(name, numel, 0, numel, {}), whole)
        yield name, whole.view(shape)


def _write_weights(source: Path, state: dict[str, Any], target: Path, dtype: torch.dtype, max_bytes: int) -> None:
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        path = target / f"{_WEIGHTS}-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending, size = {}, 0

    for name, tensor in whole_parameters(source, state):
        tensor = tensor.to(dtype)
        if pending and size + tensor.nbytes > max_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(target / f"{_WEIGHTS}.safetensors")
        return
    weight_map = {}
    for index, (path, names) in enumerate(shards, 1):
        file = f"{_WEIGHTS}-{index:05d}-of-{len(shards):05d}.safetensors"
        path.rename(target / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(
        target / f"{_WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_model_config(config: ModelConfig, target: Path, dtype: str) -> None:
    import transformers

    if config.config is not None:
        arguments = dict(config.config)
        model_config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    else:
        model_config = transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    model_config.architectures = [type(model).__name__]
    model_config.dtype = dtype
    model_config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)


def _model_card(run: RunDirectory, config: LaunchConfig, step: int) -> str:
    scores = run.evaluation_lines()
    origin = config.model.path or f"random weights ({(config.model.config or {}).get('model_type')})"
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
        *(f"- training data: {source.path}" for source in config.data.train),
        "",
    ]
    if scores:
        lines += ["| step | " + " | ".join(scores[-1]["evaluation"]) + " |"]
        lines += ["| --- |" + " --- |" * len(scores[-1]["evaluation"])]
        for line in scores:
            lines.append(f"| {line['step']} | " + " | ".join(f"{v:.6g}" for v in line["evaluation"].values()) + " |")
        lines.append("")
    body = config.model_dump_json(indent=2, exclude={"cluster"})
    return "\n".join([*lines, "## Configuration", "", "```json", body, "```", ""])


def main() -> None:
    """`python -P -m trainer.export --run-dir DIR [--step N] [--dtype D]`, as `dsft export` runs it."""
    parser = argparse.ArgumentParser(description="Export a checkpoint as a Hugging Face folder")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--step", type=int)
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    arguments = parser.parse_args()
    run = RunDirectory(arguments.run_dir)
    config = LaunchConfig.model_validate_json(run.config_path.read_text())
    print(export_run(run, config, arguments.step, arguments.dtype))


if __name__ == "__main__":
    main()
