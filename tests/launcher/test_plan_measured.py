"""The plan of the runs in benchmarks/results/gpu_*.json beside the peaks that were measured in them, on a real GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from config_samples import facts_of

from launcher.gpus import Gpu
from launcher.plan import make_plan
from trainer.config.loading import load_config

ROOT = Path(__file__).parent.parent.parent
GPUS = {"NVIDIA H200": 143771 << 20}  # MiB, as nvidia-smi reports them
RESULTS = [
    (path.stem, name, run)
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu_*.json"))
    for name, run in json.loads(path.read_text())["runs"].items()
    if "peak" in run and not name.startswith("HF")
]


@pytest.mark.parametrize(("result", "name", "run"), RESULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_measured_peaks_are_within_ten_percent(result, name, run, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_variants

    model = next(model for model in gpu_variants.MODELS if f"_{model.replace('.', '_')}_" in result)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "tokenizer").mkdir()
    value = gpu_variants.config_of(model, tmp_path / "text.jsonl", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    config = load_config(path, [*run["sets"], f"training.micro_batch_size={run['micro_batch_size']}"])
    here = replace(facts_of(config, (Gpu(run["device"], GPUS[run["device"]]),), memory=126 << 30), liger=True)
    memory = make_plan(config, here).memory
    assert memory is not None
    assert abs((memory.total - memory.overhead) / run["peak"] - 1) <= 0.1
    # what the plan chooses by itself is what has been measured: it fits
    if not name.startswith("fp8"):  # was planned larger than it is
        assert make_plan(load_config(path, run["sets"]), here).batch.micro_batch_size <= run["micro_batch_size"]
