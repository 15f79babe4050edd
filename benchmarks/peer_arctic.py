"""A rank of ArcticTraining for peer_runs.py, in an environment of its own: `torchrun ... peer_arctic.py JOB`.

Its SFT trainer on a recipe with the settings of the others, its steps timed; JOB and results are as in peer_ranks.py.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


def main() -> None:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import torch
    import torch.distributed as dist
    from arctic_training import entrypoint
    from arctic_training.optimizer import adam_factory
    from arctic_training.trainer import sft_trainer

    job = json.loads(Path(sys.argv[1]).read_text())
    folder, resumed = Path(job["folder"]), job["phase"] == "resume"
    settings = json.loads((folder / "deepspeed.json").read_text())
    recipe = {
        "type": "sft",
        "skip_validation": True,
        "micro_batch_size": job["micro_batch_size"],
        "exit_iteration": job["steps"] + (2 if resumed else 0),  # it saves where it ends, too
        "model": {"name_or_path": str(folder / "model"), "attn_implementation": "sdpa", "dtype": DTYPES[job["dtype"]]},
        "data": {
            "sources": [
                {
                    "type": "huggingface_instruct",
                    "name_or_path": str(folder / "arrow"),
                    "role_mapping": {"user": "question", "assistant": "answer"},
                }
            ],
            "max_length": job["sequence_length"],
            "num_proc": 1,
            "dl_num_workers": 1,  # it keeps its workers, so that none is not allowed
            "cache_dir": str(folder / "arctic-cache"),
        },
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.0},
        "scheduler": {"name": "constant"},
        "deepspeed": {"zero_optimization": settings["zero_optimization"], "bf16": settings["bf16"]},
        "logger": {"output_dir": str(folder / "arctic-logs")},
        "checkpoint": [
            {
                "type": "deepspeed",
                "output_dir": str(folder / "arctic"),
                "auto_resume": True,
                "save_every_n_steps": 0 if resumed else job["save_at"],
            }
        ],
        "train_log_metrics_path": str(folder / "arctic-metrics.jsonl"),
    }
    path = folder / f"arctic-{job['phase']}-{os.environ['RANK']}.yml"
    path.write_text(json.dumps(recipe))  # YAML contains JSON

    told: dict[str, Any] = {"first_step": 0.0, "step_seconds": [], "target_tokens": [], "losses": [], "stall": 0.0}
    plain_step, plain_checkpoint = sft_trainer.SFTTrainer.step, sft_trainer.SFTTrainer.checkpoint
    saving = [0.0]

    def checkpoint(self: Any) -> None:
        start = time.monotonic()
        plain_checkpoint(self)
        saving[0] = time.monotonic() - start
        told["stall"] = max(told["stall"], saving[0])

    def step(self: Any, batch: dict[str, Any]) -> None:
        start = time.monotonic()
        plain_step(self, batch)
        told["first_step"] = told["first_step"] or time.time()
        told["step_seconds"].append(time.monotonic() - start - saving[0])
        told["target_tokens"].append(int((batch["labels"][:, 1:] != -100).sum()))

    class TorchAdam(adam_factory.FusedAdamOptimizerFactory):
        name = "torch_adam"

        def create_optimizer(self, model: Any, optimizer_config: Any) -> Any:
            groups = self.get_optimizer_grouped_params(model, optimizer_config.weight_decay)
            return torch.optim.AdamW(groups, lr=optimizer_config.learning_rate, fused=True)

    # DeepSpeed's own Adam would be compiled with g++ at the first start, and the others use torch's
    adam_factory.FusedAdamOptimizerFactory.create_optimizer = TorchAdam.create_optimizer
    sft_trainer.SFTTrainer.step, sft_trainer.SFTTrainer.checkpoint = step, checkpoint
    sys.argv = ["arctic_training", "--config", str(path)]
    dist.destroy_process_group = lambda *_, **__: None
    entrypoint.launch()
    told["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"arctic-{job['phase']}-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructors abort now and then


if __name__ == "__main__":
    main()
