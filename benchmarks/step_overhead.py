"""What dsft's training loop costs a step: `python benchmarks/step_overhead.py` (limit: 3 % over a bare DeepSpeed loop).

One torchrun job holds three copies of one model under ZeRO-3 with the same DeepSpeed JSON, and trains them on the very
same batches in turn, a block of steps each (dsft, bare, bare with HF's loss, dsft, ...):

- dsft: the real `Trainer.run_to_end`, with data, metrics, TensorBoard, collectives and stop polling. Its data thread
  stands still while the others run, so that the tokenising it does is paid in its own blocks.
- bare: forward, backward and step on ready tensors, and the loss read once a step; the same loss function, the head of
  the language model only at labelled positions.
- full logits: the same loop with the model's own loss (`labels=`), as a plain script has it.

Ratios are medians over cycles of a cycle's seconds for dsft / the other's. The losses of dsft and bare have to agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    command_line,
    end_rank,
    environment,
    llama,
    plan_run,
    quick_dtype,
    run_ranks,
    write_data,
    write_result,
)

LIMIT = 1.03
LEARNING_RATE = 1e-4


def rank_program(run_dir: Path, block: int, cycles: int) -> None:
    """One rank: trains the three in turn; rank 0 prints {"cycles": [...], "losses": {...}, ...}."""
    import torch
    import torch.distributed as dist
    import transformers
    from hf_tasks import whole_labels

    from trainer.data.stream import BatchStream, GlobalBatch
    from trainer.engine import Engine
    from trainer.forward import collate
    from trainer.loss import LabelledPositions, cross_entropy_sum
    from trainer.model import build_model
    from trainer.rundir import RunDirectory
    from trainer.train import Trainer

    may_make = threading.Event()
    made_outside = 0
    make_batches = BatchStream._batches

    def gated(stream: BatchStream) -> Iterator[GlobalBatch]:
        nonlocal made_outside
        batches = make_batches(stream)
        while True:
            may_make.wait()
            batch = next(batches, None)
            if batch is None:
                return
            made_outside += not may_make.is_set()
            yield batch

    BatchStream._batches = gated  # type: ignore[method-assign]

    class Bare:
        """A loop by hand, on a copy of the model."""

        def __init__(self, trainer: Trainer, full_logits: bool) -> None:
            self.full_logits, self.device = full_logits, trainer.device
            model: Any = build_model(
                trainer.config.model,
                transformers.AutoModelForCausalLM,
                trainer.plan["deepspeed"],
                None,
                trainer.config.training.seed,
            )
            self.head = LabelledPositions(model)
            parameters = [p for p in model.parameters() if p.requires_grad]
            betas = trainer.config.training.optimizer.betas
            optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=betas, weight_decay=0.0, fused=True)
            self.engine = Engine(model, optimizer, trainer.plan["deepspeed"])._engine
            self.losses: list[float] = []

        def ready(self, batch: GlobalBatch) -> list[dict[str, Any]]:
            """Tensors of this rank's micro-batches, outside the timing."""
            found = []
            for micro in batch.micro_batches:
                made = collate(micro.sequences, 2, False, self.device)
                inputs = {"input_ids": made.input_ids, "position_ids": made.position_ids, "use_cache": False}
                if self.full_logits:
                    inputs["labels"] = whole_labels(made)
                    inputs["num_items_in_batch"] = torch.tensor(batch.target_tokens)
                found.append({"inputs": inputs, "made": made, "targets": batch.target_tokens})
            return found

        def step(self, micros: list[dict[str, Any]]) -> None:
            total = 0.0
            for micro in micros:
                if self.full_logits:
                    loss = self.engine(**micro["inputs"]).loss
                else:
                    with self.head.only(micro["made"].positions):
                        logits = self.engine(**micro["inputs"]).logits
                    loss = cross_entropy_sum(logits, micro["made"].labels) / micro["targets"]
                self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
                if not self.engine.is_gradient_accumulation_boundary():
                    self.engine.step()
                total += loss.detach()
            self.engine.step()
            self.losses.append(float(total))

    class Paired(Trainer):
        """dsft's trainer; between two of its blocks the bare loops train on the same batches."""

        def remaining_batches(self) -> Iterator[GlobalBatch]:
            self.bare = {"bare": Bare(self, False), "full_logits": Bare(self, True)}
            self.cycles: list[dict[str, float]] = []
            batches = super().remaining_batches()
            for cycle in range(cycles):
                dist.barrier()
                kept = []
                may_make.set()
                start = time.monotonic()
                for _ in range(block):
                    kept.append(next(batches))
                    yield kept[-1]
                found = {"dsft": time.monotonic() - start}
                may_make.clear()
                for name in ("bare", "full_logits") if cycle % 2 else ("full_logits", "bare"):
                    loop = self.bare[name]
                    ready = [loop.ready(batch) for batch in kept]
                    loop.engine.train()
                    dist.barrier()
                    start = time.monotonic()
                    for micros in ready:
                        loop.step(micros)
                    found[name] = time.monotonic() - start
                self.cycles.append(found)
            may_make.set()

    trainer = Paired(RunDirectory(run_dir), 1)
    trainer.run_to_end()
    losses = {name: torch.tensor(loop.losses, dtype=torch.float64) for name, loop in trainer.bare.items()}
    for values in losses.values():
        dist.all_reduce(values)
    if trainer.is_main:
        lines = trainer.run.step_lines()
        told = {
            "cycles": trainer.cycles,
            "losses": {"dsft": [line["loss"] for line in lines], **{n: v.tolist() for n, v in losses.items()}},
            "target_tokens": sum(line["target_tokens"] for line in lines),
            "tokens": sum(line["tokens"] for line in lines),
            "batches": len(lines),
            "batches_finished_outside_dsft_blocks": made_outside,
        }
        (run_dir / "told.json").write_text(json.dumps(told))
    dist.barrier()
    end_rank()


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """A run directory as the launcher leaves it."""
    from trainer.config.schema import LaunchConfig

    made = write_data(folder, 4000, min(2000, options.vocabulary))
    steps = options.block * options.cycles
    config = LaunchConfig.model_validate(
        {
            "name": "step_overhead",
            "output_dir": str(folder),
            "task": {"type": "causal-lm"},
            "model": {
                "config": llama(options.hidden, options.layers, options.vocabulary),
                "tokenizer": str(made["tokenizer"]),
                "dtype": quick_dtype(),
            },
            "data": {
                "train": [{"path": str(made["data"]), "columns": {"prompt": "question", "completion": "answer"}}],
                "sequence_length": options.sequence_length,
            },
            "training": {
                "global_batch_size": options.global_batch_size,
                "micro_batch_size": options.micro_batch_size,
                "max_steps": steps,
                "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.0},
                "schedule": {"type": "constant", "warmup_steps": 0},
            },
            "checkpoint": {"interval_steps": None},
            "export": {"enabled": False},
            "cluster": {"processes_per_node": options.ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
        }
    )
    return plan_run(folder / "step_overhead", config)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the job; cycles without the first one, which warms up, and the ratios."""
    run_dir = make_run(folder, options)
    script = str(ROOT / "benchmarks" / "step_overhead.py")
    arguments = ["--rank-program", str(run_dir), "--block", str(options.block), "--cycles", str(options.cycles)]
    run_ranks(options.ranks, [script, *arguments], environment(folder), folder)
    told: dict[str, Any] = json.loads((run_dir / "told.json").read_text())
    for name, tolerance in (("bare", 2e-3), ("full_logits", 2e-2)):
        pairs = zip(told["losses"]["dsft"], told["losses"][name], strict=True)
        worst = max(abs(a - b) / a for a, b in pairs)
        told[f"largest_loss_difference_{name}"] = worst
        if worst > tolerance:
            raise SystemExit(f"the losses of dsft and {name} differ by {worst:.1e}: they do not do the same work")
    cycles = told["cycles"][1:]
    told["step_seconds"] = {
        name: statistics.median(cycle[name] for cycle in cycles) / options.block for name in cycles[0]
    }
    for name in ("bare", "full_logits"):
        ratios = [cycle["dsft"] / cycle[name] for cycle in cycles]
        told[f"ratio_{name}"] = statistics.median(ratios)
        told[f"ratios_{name}"] = ratios
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--block", type=int, default=4, help="steps in a row")
    parser.add_argument("--cycles", type=int, default=13, help="blocks of each; the first one warms up")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program, options.block, options.cycles)
        return
    with tempfile.TemporaryDirectory(prefix="dsft-step-") as name:
        told = measure(Path(name), options)
    seconds = {name: f"{value * 1000:.0f} ms" for name, value in told["step_seconds"].items()}
    rows = [["dsft against", "dsft", "peer", "ratio", "limit"]]
    for name, label in (("bare", "same loss function"), ("full_logits", "HF's loss on all logits")):
        rows.append([f"bare loop, {label}", seconds["dsft"], seconds[name], f"{told[f'ratio_{name}']:.3f}", str(LIMIT)])
    value = {
        "command": command_line("step_overhead"),
        "formula": "ratio = median over cycles of a block's seconds, dsft / bare; "
        f"{told['target_tokens'] / told['tokens']:.2f} of the tokens carry a label",
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "rank_program")},
        "limit": LIMIT,
        **told,
    }
    write_result(options.output, "step_overhead", value, rows)


if __name__ == "__main__":
    main()
