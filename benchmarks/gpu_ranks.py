"""The rank programs of gpu.py: dsft's own trainer, and transformers' Trainer on the very same sequences."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import PROCESS_SECONDS, end_rank, hf_arguments
from gpu_variants import LEARNING_RATE, Variant


def dsft_rank(run_dir: Path) -> dict[str, Any]:
    """dsft's own trainer."""
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    trainer = Trainer(RunDirectory(run_dir), 1)
    trainer.save_last = lambda: None  # type: ignore[method-assign]  # 100 GB to disk say nothing of a step
    trainer.run_to_end()
    lines = trainer.run.step_lines()
    names = (("seconds", "step_seconds"), ("losses", "loss"), ("tokens", "tokens"), ("targets", "target_tokens"))
    events = trainer.run.merged_events()
    stalls = [event["stall_seconds"] for event in events if event["event"] == "checkpoint_started"]
    return {key: [line[name] for line in lines] for key, name in names} | ({"stalls": stalls} if stalls else {})


def rows_by_length(rows: Sequence[Any], steps: int, tokens: int) -> tuple[list[Any], int, int]:
    """(single samples for transformers to pad, those of a micro-batch, micro-batches of a step).

    As many tokens a step as before, and in a micro-batch, of the longest samples, at most ``tokens``; those of a step
    are put in order of their lengths, so that hardly anything is padding (as `group_by_length`).
    """
    from trainer.data.sample import PackedSequence

    singles = [PackedSequence((sample,)) for row in rows for sample in row.samples]
    micro = min(tokens // max(row.length for row in singles), len(singles) // steps)
    parts = max(round(len(singles) / steps / micro), 1)
    chosen = []
    for step in range(min(steps, len(singles) // (micro * parts))):
        part = singles[step * micro * parts :][: micro * parts]
        chosen += sorted(part, key=lambda row: row.length)
    return chosen, micro, parts


def hf_rank(run_dir: Path, variant: Variant) -> dict[str, Any]:
    """transformers' Trainer on the sequences of dsft's stream, in their order (unless ``variant`` has them padded)."""
    import deepspeed.ops
    import numpy as np
    import torch
    import transformers
    from hf_tasks import training_batches, whole_labels
    from transformers.utils import is_flash_attn_2_available

    from trainer.config.schema import LaunchConfig
    from trainer.forward import collate
    from trainer.tasks import get_task, task_tokenizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = LaunchConfig.model_validate_json((run_dir / "config.json").read_text())
    plan = json.loads((run_dir / "plan.json").read_text())
    task = get_task(config, task_tokenizer(config))
    total = config.training.global_batch_size
    # its micro-batches are equally large: the largest of those that fit, by the plan
    micro = next(size for size in range(plan["batch"]["micro_batch_size"], 0, -1) if total % size == 0)
    batches = training_batches(config, task)
    rows = [sequence for batch in batches for part in batch.micro_batches for sequence in part.sequences]
    parts = total // micro
    if variant.padded:
        steps = config.training.max_steps or 1
        rows, micro, parts = rows_by_length(rows, steps, micro * config.data.sequence_length)
    steps_rows = [rows[at : at + micro * parts] for at in range(0, len(rows), micro * parts)]
    tokens = [sum(row.length for row in step) for step in steps_rows]
    targets = [sum(row.target_tokens for row in step) for step in steps_rows]

    def collated(sequences: Any) -> dict[str, Any]:
        made = collate(sequences, 0, False, torch.device("cpu"))
        batch = {"input_ids": made.input_ids, "labels": whole_labels(made)}
        packed = any(len(sequence.samples) > 1 for sequence in sequences)
        # without them transformers need not look for samples in a row, and takes the plain causal kernel
        return batch | ({"position_ids": made.position_ids} if packed else {})

    cpu = plan["device"] == "cpu"
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.start)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(len(rows)))

    settings = hf_arguments(
        plan["deepspeed"],
        output_dir=str(run_dir / "hf"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=parts,
        max_steps=len(tokens),
        learning_rate=LEARNING_RATE,
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        gradient_checkpointing=plan["recompute"] is True,
        remove_unused_columns=False,
    )
    arguments = transformers.TrainingArguments(**settings | (variant.hf or {}))
    kind, device = transformers.AutoModelForCausalLM, torch.device(plan["device"])
    chosen = {
        "dtype": torch.bfloat16,
        "attn_implementation": variant.attention or ("flash_attention_2" if is_flash_attn_2_available() else None),
    }
    if config.model.path is not None:
        model = kind.from_pretrained(config.model.path, **chosen)
    else:
        with device:  # ZeRO-3 cuts what is drawn at once
            model = kind.from_config(transformers.AutoConfig.for_model(**config.model.config or {}), **chosen)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=np.arange(len(rows)),
        data_collator=lambda of: collated([rows[int(index)] for index in of]),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "losses": losses, "tokens": tokens, "targets": targets, "micro_batch_size": micro}


def rank_program(run_dir: Path, variant: Variant) -> None:
    """The one rank: imports what it needs, waits till the file ``go`` is there, leaves ``result.json``."""
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed as dist
    import transformers.trainer  # noqa: F401

    import trainer.train  # noqa: F401

    deadline = time.monotonic() + PROCESS_SECONDS
    while not (run_dir / "go").exists():
        if time.monotonic() > deadline:
            raise SystemExit("no turn came")
        time.sleep(0.05)
    began = time.monotonic()
    found = dsft_rank(run_dir) if variant.side == "dsft" else hf_rank(run_dir, variant)
    found["whole_seconds"] = time.monotonic() - began
    if torch.cuda.is_available():
        found |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        found["device"] = torch.cuda.get_device_name()
    (run_dir / "result.json").write_text(json.dumps(found))
    dist.barrier()
    end_rank()
