"""Jobs of `engine_program`, and what they ought to give: the same training in a plain PyTorch loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine_program as program
import pytest
import torch
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.config.schema import ModelConfig, OptimizerConfig
from trainer.data.sample import Sample
from trainer.model import build_optimizer, choose_trained
from trainer.selection import select

STEPS = 4


def make_model(folder: Path, hidden_size: int, intermediate_size: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=program.VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_ranks(world_size: int, job: dict[str, Any], folder: Path) -> dict[str, list[dict[str, float]]]:
    """Run the cases of a job at a world size; their results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "output": str(folder)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, program.__file__, str(path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {case["name"]: json.loads((folder / f"{case['name']}.json").read_text()) for case in job["cases"]}


def peft_model(model: Any, **more: Any) -> Any:
    """As peft itself makes it."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **more)
    torch.manual_seed(0)
    made = peft.get_peft_model(model, config)
    made.base_model.model.model.norm.weight.requires_grad_(True)
    return made


def plain_loop(
    model_folder: Path,
    frozen: tuple[str, ...] = (),
    prepare: Callable[[Any], Any] = lambda model: model,
    optimizer_options: dict[str, Any] | None = None,
    unfreeze: Sequence[dict[str, Any]] = (),
    ema_decay: float | None = None,
    steps: int = STEPS,
    **loading: Any,
) -> list[dict[str, float]]:
    """One process, one sample at a time, no packing, no DeepSpeed: what the figures ought to be."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa", **loading
    )
    choose_trained(model, ModelConfig(path=str(model_folder), freeze=frozen), 0)
    model = prepare(model)
    model.train()
    optimizer = plain_optimizer(model, program.optimizer_of({"optimizer": optimizer_options or {}}))
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    starts = {name: rule["from_step"] for rule in unfreeze for name in select(list(names), rule["match"], "")}
    averaged = None
    if ema_decay:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
        averaged.update_parameters(model)  # the first one copies
    results = []
    for step in range(1, steps + 1):
        for name, parameter in names.items():
            parameter.requires_grad_(step >= starts.get(name, 1))
        sequences = program.global_batch(step)
        targets = program.target_tokens(sequences)
        samples = [sample for sequence in sequences for sample in sequence.samples]
        total = 0.0
        for sample in samples:
            loss = plain_loss(model, sample)
            (loss / targets).backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), program.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        results.append({"step": step, "loss": total / targets, "grad_norm": float(norm)})
        if averaged:
            averaged.update_parameters(model)
            with torch.no_grad():
                of_average = sum(float(plain_loss(averaged, sample)) for sample in samples)
            results[-1]["averaged_loss"] = of_average / targets
    return results


def plain_loss(model: Any, sample: Sample) -> torch.Tensor:
    ids = torch.from_numpy(sample.tokens.astype("int64"))
    labels = torch.where(torch.from_numpy(sample.targets), ids, -100)
    logits = model(input_ids=ids[None]).logits[0]
    return functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def plain_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own, in the same groups."""
    made = build_optimizer(model, config)
    if config.type == "adafactor":
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in made.param_groups]
        return torch.optim.Adafactor(groups)
    return made


def case(name: str, stage: int, micro: int, steps: tuple[int, int] = (1, STEPS), **more: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, "dtype": "float32", "micro_batch_size": micro, "steps": steps, **more}


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]], relative: float) -> None:
    assert [figure for line in found for figure in numbers(line)] == pytest.approx(
        [figure for line in expected for figure in numbers(line)], rel=relative
    )


def numbers(line: dict[str, float]) -> list[float]:
    return [line[name] for name in ("step", "loss", "grad_norm", "averaged_loss") if name in line]


def figures(lines: list[dict[str, float]]) -> list[list[float]]:
    return [numbers(line) for line in lines]
