"""How long training stands still for a checkpoint: dsft's Saver against DeepSpeed's save_checkpoint, same engine.

    torchrun --standalone --nproc-per-node=2 benchmarks/checkpoint_stall.py [--hidden 512] [--layers 8] [--saves 5]

Both save the same ZeRO-3 bf16 engine in turn, in the same process; the first save of each is left out. dsft's stall
is the staging copy; its background writing (to publication) is given besides, and ends before DeepSpeed's turn. Rank 0
writes benchmarks/results/checkpoint_stall.json: seconds, the slowest rank's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.checkpoint import Saver
from trainer.checkpoint_files import Retention
from trainer.config.schema import DeepSpeedConfig, ModelConfig, OptimizerConfig
from trainer.engine import Engine, init_distributed
from trainer.model import build_model, build_optimizer, quiet_libraries
from trainer.planning.deepspeed_config import deepspeed_config
from trainer.rundir import RunDirectory, write_json

RESULTS = Path(__file__).parent / "results" / "checkpoint_stall.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = init_distributed(device, 600.0)
    quiet_libraries()
    arguments = {"model_type": "llama", "hidden_size": options.hidden, "intermediate_size": 3 * options.hidden}
    arguments |= {"num_hidden_layers": options.layers, "num_attention_heads": 8, "vocab_size": 8000}
    config = deepspeed_config(DeepSpeedConfig(), "bfloat16", 1, 1, 1.0)
    model = build_model(
        ModelConfig(config=arguments, tokenizer="none"), transformers.AutoModelForCausalLM, config, "sdpa", 0
    )
    engine = Engine(model, build_optimizer(model, OptimizerConfig()), config)
    elements = sum(int(p.ds_numel) for p in engine.model.parameters())  # type: ignore[attr-defined]
    ids = torch.randint(0, 8000, (1, 64), device=place)

    def step() -> None:
        engine.backward(engine.forward(input_ids=ids, labels=ids).loss)
        engine.step(1e-4)

    name = [str(options.folder or tempfile.mkdtemp())]
    dist.broadcast_object_list(name)
    folder = Path(name[0])
    saver = Saver(RunDirectory(folder / "dsft"), engine, Retention(1), lambda *_, **__: None)

    def slowest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64, device=place)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    stalls, writes, peers = [], [], []
    for turn in range(1, options.saves + 2):
        step()
        dist.barrier()
        stalls.append(slowest(saver.save(turn, {"data": {}})))
        saver.wait()
        assert saver.error is None, saver.error
        writes.append(slowest(saver.seconds))
        step()
        dist.barrier()
        start = time.monotonic()
        engine._engine.save_checkpoint(str(folder / "deepspeed"), tag=f"step-{turn}")
        peers.append(slowest(time.monotonic() - start))
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "deepspeed")
        dist.barrier()
    if dist.get_rank() == 0:
        ours, theirs = statistics.median(stalls[1:]), statistics.median(peers[1:])
        result = {
            "parameters": elements,
            "bytes": 12 * elements,
            "ranks": dist.get_world_size(),
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
            "dsft_stall_seconds": stalls[1:],
            "dsft_written_seconds": writes[1:],
            "deepspeed_save_checkpoint_seconds": peers[1:],
            "median_ratio": ours / theirs,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, result, indent=2)
        print(json.dumps(result))
        if options.folder is None:
            shutil.rmtree(folder)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's destructors abort now and then


if __name__ == "__main__":
    main()
