"""A rank of the engine tests: trains a tiny model on fixed batches, as torchrun starts it.

    torchrun ... engine_program.py JOB.json

JOB: {"model": folder, "output": folder, "cases": [{"name", "stage", "dtype", "micro_batch_size", "steps", ...}]}.
"steps": [first, last]; "load", "save": run folders; "probe": see Engine.probe. Rank 0 writes OUTPUT/NAME.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import checkpoint, collectives, four_bit, slices
from trainer.checkpoint_files import Retention
from trainer.config.schema import ModelConfig, OptimizerConfig
from trainer.config.trained import Unfreeze
from trainer.data.sample import PackedSequence, Sample
from trainer.engine import Engine, gathered, in_files, init_distributed
from trainer.file_memory import FileMemory
from trainer.forward import LanguageModelLoss
from trainer.model import build_model, build_optimizer
from trainer.rundir import RunDirectory

GLOBAL_BATCH_SIZE = 5  # sequences: not divisible by 2 or 3 ranks
VOCABULARY = 61
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1)
MAX_GRAD_NORM = 0.5
TIMEOUT_SECONDS = 300.0


def global_batch(step: int) -> list[PackedSequence]:
    """The sequences of a step: packs of one to three samples of differing lengths, some without any target."""
    random = np.random.default_rng([7, step])
    sequences = []
    for _ in range(GLOBAL_BATCH_SIZE):
        samples = []
        for _ in range(random.integers(1, 4)):
            length = int(random.integers(2, 14))
            targets = random.random(length) < 0.6
            targets[0] = False
            samples.append(Sample(random.integers(0, VOCABULARY, length).astype(np.int32), targets))
        sequences.append(PackedSequence(tuple(samples)))
    return sequences


def target_tokens(sequences: list[PackedSequence]) -> int:
    return sum(int(sample.targets.sum()) for sequence in sequences for sample in sequence.samples)


def deepspeed_config(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    micro = case["micro_batch_size"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": -(-GLOBAL_BATCH_SIZE // (micro * world_size)),
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": case["stage"],
            "overlap_comm": False,
            "stage3_param_persistence_threshold": case.get("persistence_threshold", 0),
            "memory_efficient_linear": not case.get("model", {}).get("compile"),
            **case.get("zero", {}),
        },
    }
    if case.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        config["zero_force_ds_cpu_optimizer"] = False
    if case["dtype"] == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["communication_data_type"] = "fp32"
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def count_gathers(model: torch.nn.Module) -> list[int]:
    """A list that gets an entry, the number of parameters, for every gathering of parameters from now on."""
    found: list[int] = []

    def counting(gather: Any) -> Any:
        def counted(parameters: list[Any], **options: Any) -> Any:
            found.append(len(parameters))
            return gather(parameters, **options)

        return counted

    for parameter in model.parameters():
        if hasattr(parameter, "all_gather_coalesced"):
            parameter.all_gather_coalesced = counting(parameter.all_gather_coalesced)  # type: ignore[attr-defined]
    return found


def optimizer_of(case: dict[str, Any]) -> OptimizerConfig:
    return OptimizerConfig.model_validate({**OPTIMIZER.model_dump(), **case.get("optimizer", {})})


def unfreeze_of(case: dict[str, Any]) -> list[Unfreeze]:
    return [Unfreeze.model_validate(rule) for rule in case.get("unfreeze", ())]


def run_case(case: dict[str, Any], model_folder: str, output: Path, group: Any) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = deepspeed_config(case, world_size)
    model_config = ModelConfig(
        path=model_folder,
        dtype=case["dtype"],
        freeze=tuple(case.get("freeze", ())),
        adapter=case.get("adapter"),
        **case.get("model", {}),
    )
    optimizer = optimizer_of(case)
    import deepspeed.utils.groups
    import transformers

    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's: one engine a process, it thinks
    memory = FileMemory(output, **case["nvme"]) if "nvme" in case else None
    with in_files(memory):
        model = build_model(model_config, transformers.AutoModelForCausalLM, config, "sdpa", seed=0)
    loss = LanguageModelLoss(model, None, "sdpa", torch.device("cpu"), fused=case.get("fused_loss", False))
    engine = Engine(model, build_optimizer(model, optimizer, unfreeze_of(case)), config, case.get("ema_decay"), memory)
    groups = torch.distributed.distributed_c10d._world.pg_map  # DeepSpeed's own as well
    limits = {each._get_backend(torch.device("cpu")).options._timeout.total_seconds() for each in groups}
    assert limits == {TIMEOUT_SECONDS}
    if case.get("probe_first"):
        loss.check_sight(engine)
    if case.get("load"):
        source = RunDirectory(Path(case["load"]))
        slices.load(source.checkpoints_dir / checkpoint.folder_name(case["steps"][0] - 1), engine)
    if model_config.compile:
        loss.row_length = 64
    engine.train()
    gathers = count_gathers(engine.model)
    if case.get("probe"):
        loss.check_sight(engine)
    micro = case["micro_batch_size"]
    count = config["gradient_accumulation_steps"]
    results = []
    for step in range(case["steps"][0], case["steps"][1] + 1):
        gathers.clear()
        sequences = global_batch(step)
        targets = target_tokens(sequences)
        share = averaged = 0.0
        engine.begin_step(step)
        mine = [sequences[i * micro : (i + 1) * micro] for i in range(rank, count * world_size, world_size)]
        for part in mine:
            micro_loss, _ = loss(engine.forward, part)
            copies = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in engine.model.parameters())
            engine.backward(micro_loss * world_size / targets)
            share += float(micro_loss.detach())
        outcome = engine.step(OPTIMIZER.learning_rate)
        line = {"step": step, "grad_norm": outcome.grad_norm, "gathered": sum(gathers), "copies": copies}
        line["loss"] = collectives.sum_step(group, share, 0, 0)[0] / targets
        if engine.keeps_average:
            engine.eval()
            with torch.no_grad(), engine.averaged():
                averaged = sum(float(loss(engine.forward, part)[0]) for part in mine)
            engine.train()
            line["averaged_loss"] = collectives.sum_step(group, averaged, 0, 0)[0] / targets
        results.append(line)
    if case.get("save"):
        saver = checkpoint.Saver(RunDirectory(Path(case["save"])), engine, Retention(2), lambda *_, **__: None)
        saver.save(case["steps"][1], {"data": {}, "progress": 0.0})
        saver.wait()
        assert not collectives.any_rank(group, saver.error is not None), saver.error
    if model_config.compile:
        results[-1]["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if packed := list(four_bit.packed_layers(engine.model).values()):
        weights: list[Any] = [layer.weight for layer in packed]
        results[-1]["packed_bytes"] = sum(weight.ds_tensor.nbytes for weight in weights)
        with gathered(weights):  # as they are after training
            results[-1]["intact"] = all(four_bit.digest(x.weight.data, x.state) == x.digest for x in packed)
    if rank == 0:
        (output / f"{case['name']}.json").write_text(json.dumps(results))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    init_distributed("cpu", TIMEOUT_SECONDS)
    group = collectives.new_group(TIMEOUT_SECONDS)
    for case in job["cases"]:
        run_case(case, job["model"], Path(job["output"]), group)
    sys.stdout.flush()
    os._exit(0)  # gloo's destructors abort now and then


if __name__ == "__main__":
    main()
