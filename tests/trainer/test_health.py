"""Nodes that are not fit: what nvidia-smi and the site's own check say, and what the agent makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.verdict import Snapshot, classify
from trainer.devices import compute_deterministically, take_gpu
from trainer.failures import UserError
from trainer.failures import classify as class_of
from trainer.health import UnfitNodeError, check_node, gpu_problems
from trainer.rundir import RunDirectory, write_json


def test_gpus_are_counted_and_their_memory_is_asked_for() -> None:
    """nvidia-smi's csv,noheader,nounits: A100 and H100 count errors, others say [N/A]."""
    rows = "00000000:3B:00.0, 0\n00000000:5E:00.0, 0\n"
    assert list(gpu_problems("0, 0\n1, 0\n", rows, 2)) == []
    assert list(gpu_problems("0, [N/A]\n1, [N/A]\n", "", 2)) == []
    assert list(gpu_problems("0, 0\n", rows, 2)) == ["nvidia-smi sees 1 working GPU(s), 2 ranks need one each"]
    lost = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost."
    assert "sees 1 working" in next(gpu_problems(f"{lost}\n1, 0\n", "", 2))
    assert list(gpu_problems("0, 0\n1, 3\n", "", 2)) == [
        "GPU 1 has had 3 uncorrectable memory error(s) since it was reset"
    ]
    assert "00000000:5E:00.0 could not remap" in next(
        gpu_problems("0, 0\n1, 0\n", rows.replace("E:00.0, 0", "E:00.0, 1"), 2)
    )


def test_a_gpu_that_torch_cannot_use_is_told_from_a_torch_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.version.cuda:
        assert take_gpu(0) == torch.device("cuda", 0)
        with pytest.raises(UnfitNodeError, match=r"sees \d+ GPU\(s\), a rank wants number 99"):
            take_gpu(99)
        return
    with pytest.raises(UserError, match=r"is a build without CUDA.*cluster.gpus_per_node=0"):
        take_gpu(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UnfitNodeError, match="cannot use GPU 0: Torch not compiled"):
        take_gpu(0)


def test_flash_attention_is_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    try:
        compute_deterministically()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ.pop("FLASH_ATTENTION_DETERMINISTIC") == "1"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("said", "failure_class"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be", "out_of_memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out_of_memory"),
        ("CUDA error: uncorrectable ECC error encountered", "node"),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "node"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "node"),
        ("CUDA error: device-side assert triggered", "unknown"),
        ("The size of tensor a (3) must match the size of tensor b (4)", "unknown"),
    ],
)
def test_errors_of_a_gpu_have_their_class(said: str, failure_class: str) -> None:
    assert class_of(RuntimeError(said)) == failure_class


def test_a_site_check_has_the_last_word_within_its_time() -> None:
    def run(*code: str, seconds: float = 30.0) -> None:
        cluster = {"health_check": [*code], "health_check_seconds": seconds}
        check_node({"cluster": cluster}, "cpu", 2)

    run("true")
    run("sh", "-c", "setsid sleep 30 & printf '\\377'", seconds=5.0)  # what it leaves behind does not count
    with pytest.raises(UnfitNodeError, match="ended with exit code 3: the fan is off"):
        run("sh", "-c", "echo checking; echo the fan is off; exit 3")
    with pytest.raises(UnfitNodeError, match="did not end within 1 s"):
        run("sh", "-c", "sleep 30 & sleep 30", seconds=1.0)
    with pytest.raises(UnfitNodeError, match="cannot be run: /no/such/check"):
        run("/no/such/check")


def test_the_agent_of_an_unfit_node_starts_no_rank(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.config_path, {"cluster": {"health_check": ["sh", "-c", "echo too hot; exit 1"]}})
    command = [sys.executable, "-P", "-m", "trainer.agent", "--run-dir", str(tmp_path), "--attempt", "1", "--"]
    code = subprocess.run([*command, "--nproc-per-node", "1"], timeout=300).returncode
    assert code == 75
    (report,) = run.agent_reports(1)
    verdict = classify(Snapshot({report["node"]: code}, [report]))
    assert (verdict.failure_class, verdict.node, verdict.unfit) == ("node", report["node"], True)
    assert "too hot" in verdict.message
    assert not list((tmp_path / "attempts/0001/logs").glob("*/rank*"))
    assert json.loads(json.dumps(verdict.to_json()))["unfit"] is True
