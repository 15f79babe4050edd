"""From `dsft launch` to sbatch's acceptance on a SLURM cluster: python benchmarks/launch.py [--repeats N]

Config, tokenizer and data are made from a seed. The time holds all that `dsft launch` does on SLURM: plan, checks of
data and masks, `sbatch --test-only`, sbatch. The jobs are held, and cancelled. Prints the median, the slowest, and what
sbatch alone takes. `tests/cluster/test_launch_time.py` runs it on a cluster of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def write_config(folder: Path, partition: str | None) -> Path:
    """A run of two nodes over 20,000 records."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{index}" for index in range(500)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "</s>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with open(folder / "train.jsonl", "w") as file:
        for index in range(20_000):
            text = [words[(index * 7 + step * (index % 5 + 1)) % 500] for step in range(20 + index % 50)]
            print(json.dumps({"prompt": " ".join(text[:4]), "completion": " ".join(text[4:])}), file=file)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    cluster: dict[str, Any] = {"backend": "slurm", "nodes": 2, "time": "1:00:00", "sbatch": {"hold": True}}
    config = {
        "name": "launch",
        "task": {"type": "causal-lm"},
        "model": {"config": {"model_type": "llama", "vocab_size": 512, **sizes}, "tokenizer": "tokenizer.json"},
        "data": {"train": [{"path": "train.jsonl"}], "sequence_length": 512},
        "training": {"global_batch_size": 16, "max_steps": 100},
        "cluster": cluster | ({"partition": partition} if partition else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def measure(folder: Path, repeats: int, partition: str | None) -> dict[str, Any]:
    """Seconds of each launch, and of sbatch alone with the same script."""
    config = write_config(folder, partition)
    names = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state"), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-P", "-m", "launcher", "launch", str(config), "--json"]
    launches, alone = [], []
    for index in range(repeats + 1):
        begin = time.monotonic()
        done = subprocess.run(
            [*command, "--set", f"name=launch-{index}"], env=os.environ | names, stdout=subprocess.PIPE, check=True
        )
        seconds = time.monotonic() - begin
        value = json.loads(done.stdout)
        begin = time.monotonic()
        other = subprocess.run(["sbatch", "--parsable", value["script"]], stdout=subprocess.PIPE, text=True, check=True)
        if index:  # the first one fills the caches of the file system and of the data's index
            launches.append(seconds)
            alone.append(time.monotonic() - begin)
        subprocess.run(["scancel", value["job_id"], other.stdout.strip()], check=True)
    return {
        "median_seconds": round(statistics.median(launches), 3),
        "slowest_seconds": round(max(launches), 3),
        "sbatch_alone_seconds": round(statistics.median(alone), 3),
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--partition")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="launch") as folder:
        print(json.dumps(measure(Path(folder), options.repeats, options.partition)))


if __name__ == "__main__":
    main()
