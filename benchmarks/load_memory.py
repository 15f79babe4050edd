"""What loading a pretrained model under zero.Init takes of memory: `python benchmarks/load_memory.py`.

A random Llama is saved as a Hugging Face folder in bf16. Each rank then loads it with `trainer.model.build_model`, as
a run does, and tells how far its memory grew while loading (peak) and after it (held), as multiples of the model's size
on disk. The last row is `from_pretrained` without ZeRO in one process.

peak = VmHWM after - VmRSS before, the high-water mark being reset before: it counts the mapped file as well, which one
rank reads. "anonymous" is the peak of RssAnon, sampled every 2 ms: memory that the system cannot take back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    Peak,
    command_line,
    end_rank,
    environment,
    llama,
    run_ranks,
    save_llama,
    status,
    write_result,
)


def rank_program(model_dir: Path, zero: bool) -> None:
    """One rank: loads, and writes its figures to MODEL_DIR/../rankN.json."""
    import torch.distributed as dist
    import transformers

    from trainer.config.schema import DeepSpeedConfig, ModelConfig
    from trainer.engine import init_distributed
    from trainer.model import build_model
    from trainer.planning.deepspeed_config import deepspeed_config

    init_distributed("cpu", 600.0)
    config = ModelConfig(path=str(model_dir))
    settings = deepspeed_config(DeepSpeedConfig(zero_stage=3 if zero else 1), "bfloat16", 1, 1, 1.0)
    _ = transformers.AutoModelForCausalLM  # its import is not the model's memory
    from transformers.models.llama import modeling_llama  # noqa: F401

    dist.barrier()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, anonymous = status("VmRSS"), status("RssAnon")
    start = time.monotonic()
    with Peak() as peak:
        model: Any = build_model(config, transformers.AutoModelForCausalLM, settings, None, 0)
        dist.barrier()
    seconds = time.monotonic() - start
    if not zero:  # its weights are mapped: nothing is in memory before it is read
        for parameter in model.parameters():
            parameter.max()
    high = status("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is held, without what the allocator keeps for later
    told = {
        "rank": dist.get_rank(),
        "seconds": seconds,
        "peak": high - before,
        "peak_anonymous": peak.bytes - anonymous,
        "held_anonymous": status("RssAnon") - anonymous,
        "partition": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
        if zero
        else sum(p.numel() * p.element_size() for p in model.parameters()),
        "largest_parameter": max(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) * 2,
    }
    (model_dir.parent / f"rank{told['rank']}.json").write_text(json.dumps(told))
    dist.barrier()
    end_rank()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rank_program:
        rank_program(options.rank_program, not options.plain)
        return
    runs = []
    with tempfile.TemporaryDirectory(prefix="dsft-load-") as name:
        folder = Path(name)
        save_llama(folder / "model", llama(options.hidden, options.layers, options.vocabulary), "bfloat16")
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        script = str(ROOT / "benchmarks" / "load_memory.py")
        for ranks, plain in [*((count, False) for count in options.ranks), (1, True)]:
            arguments = [script, "--rank-program", str(folder / "model"), *(["--plain"] if plain else [])]
            run_ranks(ranks, arguments, environment(folder), folder)
            told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
            runs.append({"ranks": ranks, "zero": not plain, "per_rank": told})
    rows = [["loading", "rank", "partition", "peak", "peak, anonymous", "held, anonymous", "largest parameter"]]
    for run in runs:
        for told in run["per_rank"]:
            label = f"zero.Init, {run['ranks']} rank(s)" if run["zero"] else "no ZeRO, 1 process"
            names = ("partition", "peak", "peak_anonymous", "held_anonymous", "largest_parameter")
            rows.append([label, str(told["rank"]), *(f"{told[name] / size:.2f}" for name in names)])
    value = {
        "command": command_line("load_memory"),
        "formula": f"growth of a rank's memory while loading / bytes of the model's bf16 file ({size / 2**20:.0f} MiB)",
        "settings": {"hidden": options.hidden, "layers": options.layers, "vocabulary": options.vocabulary},
        "model_bytes": size,
        "runs": runs,
    }
    write_result(options.output, "load_memory", value, rows)


if __name__ == "__main__":
    main()
