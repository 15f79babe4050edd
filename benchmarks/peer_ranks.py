"""A rank of a peer of peer_runs.py and peers.py, as torchrun starts it: `torchrun ... peer_ranks.py JOB`.

JOB: {"side": bare|hf|trl, "phase": "resume" or any name, "folder", "steps", "save_at", "micro_batch_size",
"sequence_length", "dtype"}; may have "data", a file in the folder, and "checkpointing". The folder holds the data,
`model` with its tokenizer, and `deepspeed.json`; with "save_at" 0 nothing is saved.
Each rank leaves SIDE-PHASE-RANK.json: {"first_step": unix seconds, "step_seconds", "target_tokens", "losses", "stall",
"memory_bytes"}.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import end_rank, hf_arguments

LEARNING_RATE = 1e-4
RESUMED_STEPS = 2


class Told:
    """What a rank tells."""

    def __init__(self) -> None:
        self.first_step, self.stall = 0.0, 0.0
        self.step_seconds: list[float] = []
        self.target_tokens: list[int] = []
        self.losses: list[float] = []

    def step(self, seconds: float) -> None:
        self.first_step = self.first_step or time.time()
        self.step_seconds.append(seconds)

    def write(self, job: dict[str, Any], rank: int) -> None:
        steps = len(self.step_seconds)
        value = {
            **vars(self),
            "target_tokens": self.target_tokens[:steps],  # a loader may have collated ahead
            "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        (Path(job["folder"]) / f"{job['side']}-{job['phase']}-{rank}.json").write_text(json.dumps(value))


def read_records(job: dict[str, Any]) -> list[dict[str, str]]:
    path = Path(job["folder"]) / job.get("data", "train.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def bare(job: dict[str, Any], told: Told) -> None:
    """A loop as one writes it by hand."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    folder, length, micro = Path(job["folder"]), job["sequence_length"], job["micro_batch_size"]
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    settings = json.loads((folder / "deepspeed.json").read_text())
    partitioning = HfDeepSpeedConfig(settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, job["dtype"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def rows() -> Iterator[tuple[list[int], list[int], list[int]]]:
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for record in read_records(job)[dist.get_rank() :: dist.get_world_size()]:
            prompt = tokenizer(record["question"], add_special_tokens=False)["input_ids"]
            learned = [*tokenizer(record["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            tokens += [tokenizer.bos_token_id, *prompt, *learned]
            labels += [-100] * (1 + len(prompt)) + learned
            positions += range(1 + len(prompt) + len(learned))
            while len(tokens) >= length:
                yield tokens[:length], labels[:length], positions[:length]
                tokens, labels, positions = tokens[length:], labels[length:], positions[length:]

    made, step, last = rows(), 0, job["steps"]
    if job["phase"] == "resume":
        engine.load_checkpoint(str(folder / "bare"))
        step, last = job["save_at"], job["save_at"] + RESUMED_STEPS
        for _ in range(step * micro):
            next(made)
    engine.train()
    while step < last:
        start = time.monotonic()
        batch = [torch.tensor(values) for values in zip(*(next(made) for _ in range(micro)), strict=True)]
        output = engine(input_ids=batch[0], labels=batch[1], position_ids=batch[2], use_cache=False)
        engine.backward(output.loss)
        engine.step()
        step += 1
        told.losses.append(float(output.loss.detach()))
        told.target_tokens.append(int((batch[1][:, 1:] != -100).sum()))
        told.step(time.monotonic() - start)
        if step == job["save_at"] and job["phase"] == "first":
            start = time.monotonic()
            engine.save_checkpoint(str(folder / "bare"))
            told.stall = time.monotonic() - start
    del partitioning


def trainer(job: dict[str, Any], told: Told) -> None:
    """transformers' Trainer or TRL's SFTTrainer."""
    import datasets
    import torch
    import transformers

    folder, resumed, packed = Path(job["folder"]), job["phase"] == "resume", job["side"] == "trl"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")

    def encode(record: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = tokenizer(record["question"])["input_ids"], tokenizer(record["answer"])["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id][: job["sequence_length"]]
        return {"input_ids": ids, "labels": [-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]}

    records = read_records(job)
    # without packing: as many samples as have the tokens of a packed micro-batch
    mean = sum(len(encode(record)["input_ids"]) for record in records[:200]) / 200
    samples = max(round(job["micro_batch_size"] * job["sequence_length"] / mean), 1)
    arguments = hf_arguments(
        json.loads((folder / "deepspeed.json").read_text()),
        output_dir=str(folder / job["side"]),
        per_device_train_batch_size=job["micro_batch_size"] if packed else samples,
        max_steps=job["save_at"] + RESUMED_STEPS if resumed else job["steps"],
        learning_rate=LEARNING_RATE,
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=job.get("checkpointing", False),
        save_strategy="no" if resumed or not job["save_at"] else "steps",
        save_steps=job["save_at"] or 1,
    )

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.monotonic()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.ended = time.monotonic()
            told.step(self.ended - self.start)

        def on_save(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == job["save_at"]:
                told.stall = time.monotonic() - self.ended

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                told.losses.append(logs["loss"])

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, job["dtype"]))
    if packed:
        import trl

        rows = [{"prompt": record["question"], "completion": record["answer"]} for record in records]
        sft = trl.SFTConfig(**arguments, max_length=job["sequence_length"], packing=True, completion_only_loss=True)
        data = datasets.Dataset.from_list(rows)
        made: Any = trl.SFTTrainer(
            model=model, args=sft, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
    else:
        made = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**arguments),
            train_dataset=datasets.Dataset.from_list([encode(record) for record in records]),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
            callbacks=[Clock()],
        )
    collate = made.data_collator

    def counting(samples: Any) -> Any:
        batch = collate(samples)
        told.target_tokens.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    made.data_collator = counting
    checkpoint = str(folder / job["side"] / f"checkpoint-{job['save_at']}")
    made.train(resume_from_checkpoint=checkpoint if resumed else None)


def main() -> None:
    import deepspeed.ops
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as dsft: gloo, nothing compiled at start
    job, told = json.loads(Path(sys.argv[1]).read_text()), Told()
    (bare if job["side"] == "bare" else trainer)(job, told)
    told.write(job, dist.get_rank())
    dist.barrier()
    end_rank()


if __name__ == "__main__":
    main()
