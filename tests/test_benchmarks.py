"""Each benchmark in small, so that none of them rots; its figures mean nothing here, but they have to be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import math_records  # noqa: E402
from figures import figures  # noqa: E402


def run(name, folder, *arguments):
    """The JSON that a benchmark has written."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--output", str(folder), *map(str, arguments)]
    result = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    value = json.loads((folder / f"{name}.json").read_text())
    assert value["formula"]
    assert value["machine"]["packages"]["torch"]
    assert f"# {name}" in (folder / f"{name}.md").read_text()
    return value


def test_startup(tmp_path):
    small = ["--ranks", 1, "--hidden", 64, "--layers", 1, "--vocabulary", 2048]
    value = run("startup", tmp_path, "--repeats", 1, "--launches", 1, "--warm-up", 0, *small)
    assert 0 < value["help"]["cpu_ratio"] < 0.5
    assert value["plan"]["wall"] > 0
    assert value["first_step"]["ratio"] > 0
    assert value["first_step"]["dsft"][0] < value["first_step"]["events"][0]["finished"]


def test_step_overhead(tmp_path):
    small = ["--hidden", 64, "--layers", 1, "--vocabulary", 2048, "--sequence-length", 128]
    value = run("step_overhead", tmp_path, "--block", 2, "--cycles", 3, *small)
    assert value["batches"] == 6
    assert value["ratio_bare"] > 0
    assert value["ratio_full_logits"] > 0
    # the script refuses loops that do other work; the loss function proper is the same one
    assert value["largest_loss_difference_bare"] < 2e-3


def test_vocabulary_memory(tmp_path):
    small = ["--hidden", 32, "--layers", 1, "--vocabulary", 32000, "--sequence-length", 256, "--sequences", 1]
    value = run("vocabulary_memory", tmp_path, "--dtype", "float32", "--labelled", 0.5, *small)
    assert 0 < value["ratios"]["0.5"] < 1.2  # it refuses losses and gradients that differ


@pytest.mark.matrix
def test_offload_memory(tmp_path):
    small = ["--hidden", 256, "--layers", 2, "--vocabulary", 4000, "--steps", 4]
    value = run("offload_memory", tmp_path, "--disk", tmp_path, "--places", "cpu", "nvme", "nvme, weights too", *small)
    host, states, weights = value["runs"]  # it refuses losses that differ
    assert host["files"] == 0 < states["files"] <= weights["files"]
    assert host["anonymous"] > states["anonymous"]


@pytest.mark.matrix
def test_load_memory(tmp_path):
    value = run("load_memory", tmp_path, "--ranks", 2, "--hidden", 512, "--layers", 4, "--vocabulary", 8000)
    first = value["runs"][0]
    assert [told["rank"] for told in first["per_rank"]] == [0, 1]
    for told in first["per_rank"]:
        assert 0.49 < told["partition"] / value["model_bytes"] < 0.55  # the file has a header
        assert told["peak_anonymous"] >= 0.9 * told["partition"]


@pytest.mark.matrix
def test_export_memory(tmp_path):
    value = run(
        "export_memory", tmp_path, "--hidden", 256, "--layers", 2, "--vocabulary", 4000, "--shard-gib", 4, 0.001
    )
    one, several = value["runs"]
    assert len(one["files"]) == 1 < len(several["files"])
    assert one["peak"] > one["before"]


@pytest.mark.matrix
def test_peers(tmp_path):
    small = ["--hidden", 64, "--layers", 1, "--vocabulary", 2048, "--steps", 3, "--warm-up", 1, "--rounds", 1]
    value = run("peers", tmp_path, "--sides", "dsft", "hf", *small)
    (told,) = value["rounds"]["hf"]
    assert len(told["step_seconds"]) == 3
    assert value["ratios"]["hf"][0] > 0


@pytest.mark.matrix
def test_generative_scores(tmp_path):
    (tmp_path / "gsm8k-test").mkdir()
    records = math_records(600)
    (tmp_path / "gsm8k-test" / "test.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    value = run("generative_scores", tmp_path, "--data", tmp_path, "--task", "gsm8k", "--steps", 30)
    told = value["tasks"]["gsm8k"]
    assert told["untrained"]["loss"] > told["baselines"]["unigrams"]["loss"] > told["baselines"]["bigrams"]["loss"] > 0
    assert told["beaten"]["unigrams"]
    assert len(told["runs"]["2"]["losses"]) == 30


def test_data_memory(tmp_path):
    value = run("data_memory", tmp_path, "--megabytes", 1, 10, "--batches", 5)
    assert value["runs"][1]["records"] >= 3 * value["runs"][0]["records"]
    assert 0.5 < value["ratio"] < 1.5


def test_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "none")  # layers that are to be compiled run as they are: half a minute less
    value = run("gpu", tmp_path, "--small", "--overlap", "--data", "instructions", "--examples", 0)
    ours, rounded, theirs, padded, saving = value["runs"].values()
    assert {len(run["losses"]) for run in (ours, rounded, theirs, saving)} == {6}
    assert ours["targets"] == theirs["targets"]
    assert 0.3 < ours["learned"] == theirs["learned"] < 0.9
    assert len(saving["stalls"]) == 1
    assert saving["losses"] == ours["losses"]
    # the same samples, one by one in whole micro-batches, learned as well
    assert 0.5 < sum(padded["tokens"]) / sum(ours["tokens"]) <= 1
    assert padded["losses"][0] == pytest.approx(ours["losses"][0], rel=0.05)
    # the same sequences in the same order from the same kind of weights
    assert value["curve_distance"] < 0.05
    assert rounded["losses"] == pytest.approx(ours["losses"], rel=0.05)
    assert rounded["losses"] != ours["losses"]
    assert value["ratio"] > 0
    assert ours["planned"] > 0


def test_attention_kernels(tmp_path):
    found = run("attention_kernels", tmp_path, "--small")["kernels"]
    ran = {name: result["error"] for name, result in found.items() if "error" in result}
    assert {name.partition(";")[0] for name in ran} >= {"varlen, torch's FlashAttention 2", "SDPA, one mask"}
    assert max(ran.values()) < 1e-5
    assert "does not support backward on CPU" in found["flex attention; mixed"]["problem"]


def test_scale(tmp_path):
    value = run("scale", tmp_path, "--sizes", 64, 512, "--processes", 2, 8)
    small, large = (value["pieces"][str(size)] for size in (64, 512))
    # files that a rank opens to load do not depend on the number of ranks, nor what all of them write in a second
    assert large["files opened to load at 3/4 of the ranks"] <= 3
    assert large["heartbeats a second, all ranks"] == 256
    assert large["plan.json bytes"] < 8 * small["plan.json bytes"]
    # connections of a rank: of a full mesh as many as there are ranks, else a handful
    mesh, needed = (value["groups"][mode]["8"]["sockets"] for mode in ("full mesh", "as needed"))
    assert mesh >= 4 * 7
    assert needed < mesh / 2


@pytest.mark.matrix
def test_plan_error(tmp_path):
    value = run("plan_error", tmp_path, "--cases", 6)
    (told,) = value["runs"]
    assert abs(told["error"]) < 1
    assert told["per_rank"][0]["resident"] > told["per_rank"][0]["peak"] > 0


@pytest.mark.matrix
def test_peer_runs(tmp_path):
    small = ["--hidden", 64, "--layers", 1, "--vocabulary", 2048, "--steps", 6, "--save-at", 3, "--warm-up", 1]
    value = run("peer_runs", tmp_path, "--sides", "dsft", "bare", "hf", *small)
    assert list(value["table"]) == ["dsft", "bare", "hf"]
    for row in value["table"].values():
        assert all(figure > 0 for figure in row.values())


def test_figures():
    for path, text in figures().items():
        assert path.read_text() == text, "run benchmarks/figures.py: results have changed"
