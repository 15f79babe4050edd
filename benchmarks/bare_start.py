"""The peer of startup.py: a plain DeepSpeed ZeRO-3 script, up to its first optimizer step.

    torchrun --nproc-per-node 2 bare_start.py JOB.json

As one writes it by hand: no checks, no checkpoints, no logs; records are tokenised when their batch is made and packed
into full sequences, so that the step has as many tokens as dsft's.
JOB.json: data, tokenizer, model, dtype, sequence_length, micro_batch_size, micro_batches_per_rank, deepspeed. Rank 0
prints the time of its first step.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import DataLoader, IterableDataset
from transformers.integrations import HfDeepSpeedConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # without this DeepSpeed compiles or loads a shared-memory all-reduce; dsft goes without it as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    records = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]

    length = job["sequence_length"]

    def rows():
        """Records one after another, cut into full sequences: the plain way of packing."""
        tokens, labels, positions = [], [], []
        for record in records[dist.get_rank() :: dist.get_world_size()]:
            prompt = tokenizer(record["question"], add_special_tokens=False)["input_ids"]
            answer = tokenizer(record["answer"], add_special_tokens=False)["input_ids"]
            learned = [*answer, tokenizer.eos_token_id]
            tokens += [tokenizer.bos_token_id, *prompt, *learned]
            labels += [-100] * (1 + len(prompt)) + learned
            positions += range(2 + len(prompt) + len(answer))
            while len(tokens) >= length:
                yield tokens[:length], labels[:length], positions[:length]
                tokens, labels, positions = tokens[length:], labels[length:], positions[length:]

    def collate(batch):
        names = ("input_ids", "labels", "position_ids")
        return {name: torch.tensor(values) for name, values in zip(names, zip(*batch, strict=True), strict=True)}

    partitioning = HfDeepSpeedConfig(job["deepspeed"])  # transformers partitions models while it lives
    settings = dict(job["model"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # the script does its own accumulation in micro-batches, as DeepSpeed's config says
    settings = job["deepspeed"] | {"gradient_accumulation_steps": job["micro_batches_per_rank"]}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    class Rows(IterableDataset):
        def __iter__(self):
            return rows()

    loader = DataLoader(Rows(), batch_size=job["micro_batch_size"], collate_fn=collate)
    engine.train()
    for batch in itertools.islice(loader, job["micro_batches_per_rank"]):
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
    if dist.get_rank() == 0:
        print(json.dumps({"first_step": time.time(), "loss": loss.item(), "steps": engine.global_steps}))
    dist.barrier()
    del partitioning
    sys.stdout.flush()
    os._exit(0)  # gloo's destructors abort now and then; the step has been made by then


if __name__ == "__main__":
    main()
