"""Memory of a step with a large vocabulary: `python benchmarks/vocabulary_memory.py` (limit: 0.70 of full logits).

One process a side trains a small Llama with a 128k vocabulary for a step on the same packed batch, in bf16:

- dsft: the head at labelled positions alone, cross-entropy in blocks (`LanguageModelLoss`);
- full logits: transformers' own loss (`labels=`), which is what a plain loop and HF's Trainer run.

Peak resident memory above what the process held before the step; the losses and the gradients' norms have to agree
(1e-5 with `--dtype float32`, half a percent in bf16, where transformers rounds the gradient of the logits otherwise).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, Peak, command_line, environment, llama, status, told_by, write_result
from hf_tasks import whole_labels

LIMIT = 0.70
SIDES = ("dsft", "dsft, fused", "full_logits")


def side(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One step of one side, in this process."""
    import numpy as np
    import torch
    import transformers

    from trainer.data.sample import PackedSequence, Sample
    from trainer.forward import LanguageModelLoss, collate

    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = llama(options.hidden, options.layers, options.vocabulary)
    config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    random = np.random.default_rng(0)

    def sequence(length: int) -> PackedSequence:
        learned = np.arange(length) >= round(length * (1 - options.labelled[0]))
        return PackedSequence((Sample(random.integers(0, options.vocabulary, length).astype(np.int32), learned),))

    objective = LanguageModelLoss(model, 0, "sdpa", torch.device("cpu"), fused=name == "dsft, fused")

    def step(sequences: list[PackedSequence]) -> float:
        if name.startswith("dsft"):
            loss, _ = objective(model, sequences)
        else:
            made = collate(sequences, 0, False, torch.device("cpu"))
            inputs = {"input_ids": made.input_ids, "position_ids": made.position_ids, "use_cache": False}
            loss = model(**inputs, labels=whole_labels(made), num_items_in_batch=torch.tensor(1)).loss
        loss.backward()
        return float(loss.detach())

    step([sequence(16)])  # kernels, and memory for the gradients
    for parameter in model.parameters():
        parameter.grad.zero_()
    batch = [sequence(options.sequence_length) for _ in range(options.sequences)]
    before = status("VmRSS")
    with Peak("VmRSS") as peak:
        loss = step(batch)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    return {"bytes": peak.bytes - before, "loss": loss, "grad_norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--labelled", type=float, nargs="+", default=[0.6, 1.0], help="shares of tokens with a label")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(side(options.side, options)))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="dsft-vocabulary-") as scratch:
        for labelled in options.labelled:
            for name in SIDES:
                command = [sys.executable, *sys.argv, "--labelled", str(labelled), "--side", name]
                found[f"{name} {labelled}"] = told_by(command, environment(Path(scratch)))
    rows = [["tokens with a label", *SIDES, "ratio", "ratio, fused", "limit"]]
    ratios = {}
    tolerance = 1e-5 if options.dtype == "float32" else 5e-3
    for labelled in options.labelled:
        plain, fused, theirs = (found[f"{name} {labelled}"] for name in SIDES)
        for key in ("loss", "grad_norm"):
            for ours in (plain, fused):
                if not math.isclose(ours[key], theirs[key], rel_tol=tolerance):
                    raise SystemExit(f"{key} differs: {ours[key]} and {theirs[key]}")
        ratios[str(labelled)] = plain["bytes"] / theirs["bytes"]
        ratios[f"{labelled}, fused"] = fused["bytes"] / theirs["bytes"]
        cells = [f"{value['bytes'] / 2**20:.0f} MiB" for value in (plain, fused, theirs)]
        shown = [f"{ratios[key]:.2f}" for key in (str(labelled), f"{labelled}, fused")]
        rows.append([f"{labelled:.0%}", *cells, *shown, str(LIMIT)])
    value = {
        "command": command_line("vocabulary_memory"),
        "formula": "peak resident memory during the step minus that before it",
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "side")},
        "limit": LIMIT,
        "sides": found,
        "ratios": ratios,
    }
    write_result(options.output, "vocabulary_memory", value, rows)


if __name__ == "__main__":
    main()
