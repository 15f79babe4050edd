"""Bounds of a step's time, and plans for several numbers of nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_samples import facts_of

from launcher.cli import main
from launcher.plan import make_plan
from trainer.config.loading import load_config
from trainer.planning.throughput import EFFICIENCY, device, step_time

EIGHT_GPUS: dict[str, Any] = {
    "flops_per_token": 48e9,
    "tokens_per_rank": 4096.0,
    "recompute": False,
    "peak_flops": 1e15,
    "parameters": 8_000_000_000,
    "trainable": 8_000_000_000,
    "stage": 3,
    "parameter_bytes": 2,
    "gradient_bytes": 4,
    "micro_batches": 1,
    "nodes": 1,
    "gpus_per_node": 8,
    "link": 450e9,
    "network": None,
}


def test_a_step_is_computed_and_communicated() -> None:
    found = step_time(**EIGHT_GPUS)
    assert found is not None
    assert found.compute_seconds == pytest.approx(48e9 * 4096 / (EFFICIENCY * 1e15))
    # two gathers of 2 bytes and a reduction of 4 bytes a parameter, seven eighths of it through each rank
    assert found.communication_seconds == pytest.approx(8e9 * (2 * 2 + 4) * 7 / 8 / 450e9)
    assert found.least == max(found.compute_seconds, found.communication_seconds)
    assert found.most == found.compute_seconds + found.communication_seconds


@pytest.mark.parametrize(
    ("change", "compute", "communication"),
    [
        ({"recompute": True}, 4 / 3, 1.0),
        ({"micro_batches": 4}, 1.0, 4.0),
        ({"stage": 2}, 1.0, 6 / 8),
        ({"trainable": 0}, 1.0, 1 / 2),
        ({"peak_flops": 5e14}, 2.0, 1.0),
        ({"nodes": 2, "network": 8 * 45e9}, 1.0, 10.0 * (15 / 16) / (7 / 8)),
        ({"nodes": 2, "network": 8e15}, 1.0, (15 / 16) / (7 / 8)),
    ],
)
def test_what_changes_it(change: dict[str, Any], compute: float, communication: float) -> None:
    before, after = step_time(**EIGHT_GPUS), step_time(**{**EIGHT_GPUS, **change})
    assert before is not None
    assert after is not None
    assert after.compute_seconds / before.compute_seconds == pytest.approx(compute)
    assert after.communication_seconds / before.communication_seconds == pytest.approx(communication)


def test_an_unknown_network_gives_no_figure() -> None:
    assert step_time(**{**EIGHT_GPUS, "nodes": 2}) is None


def test_devices_by_name() -> None:
    found = [device(name) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA L40S", "abacus", None)]
    assert [item.link if item else None for item in found] == [64e9, 450e9, 32e9, None, None]


def config(folder: Path, **cluster: Any) -> Path:
    value = {
        "name": "l",
        "task": {"type": "causal-lm"},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
            },
            "tokenizer": str(folder),
            "gradient_checkpointing": True,
        },
        "data": {"train": [{"path": str(folder)}], "sequence_length": 4096},
        "training": {"global_batch_size": 64, "max_steps": 100},
        "cluster": {"backend": "slurm", "gpus_per_node": 8, "gpu_model": "H100", "network_gigabits": 3200, **cluster},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(value))
    return path


def test_numbers_of_nodes_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config(tmp_path)), "--nodes", "1,4,16", "--json"]) == 0
    one, four, sixteen = json.loads(capsys.readouterr().out)
    assert [one["nodes"], four["nodes"], sixteen["nodes"]] == [1, 4, 16]
    assert one["plan"]["step_time"]["compute_seconds"] == pytest.approx(
        4 * four["plan"]["step_time"]["compute_seconds"]
    )
    assert sixteen["plan"] is None
    assert "128 ranks" in sixteen["problem"]
    assert main(["plan", str(config(tmp_path)), "--nodes", "1,16"]) == 0
    shown = capsys.readouterr().out
    assert "node-hours" in shown
    assert "16 node(s): training.global_batch_size is 64" in shown


def test_memory_of_nodes_that_cannot_be_seen_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config(tmp_path, gpus_per_node=1, nodes=1))]) == 2
    assert "does not fit the memory" in capsys.readouterr().err


@pytest.mark.parametrize("nodes", ["0", "a", "1,,2", ""])
def test_bad_counts(tmp_path: Path, nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["plan", str(config(tmp_path)), "--nodes", nodes])
    assert error.value.code == 2
    assert "node counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gigabits", "setting", "copies"),
    [(100, "auto", True), (100, False, False), (6400, "auto", False), (6400, True, True), (None, "auto", False)],
)
def test_second_copies_are_taken_where_the_network_holds_steps_up(
    gigabits: int | None, setting: bool | str, copies: bool, tmp_path: Path
) -> None:
    told = load_config(config(tmp_path, nodes=4, network_gigabits=gigabits), [f"deepspeed.hpz={json.dumps(setting)}"])
    plan = make_plan(told, facts_of(told))
    assert plan.deepspeed["zero_optimization"].get("zero_hpz_partition_size", 1) == (8 if copies else 1)
    if setting == "auto":
        assert ("hpZ" in plan.communication.reason) is copies


def test_gathering_within_the_node_takes_a_quarter_off_the_network() -> None:
    """2 + 4 of 2 + 2 + 4 bytes a parameter cross it; 2 go over the link, here no slower than nothing."""
    options: dict[str, Any] = {"flops_per_token": 1.0, "tokens_per_rank": 1.0, "recompute": 0.0, "peak_flops": 1e15}
    options |= {"parameters": 10**9, "trainable": 10**9, "stage": 3, "parameter_bytes": 2, "gradient_bytes": 4}
    options |= {"micro_batches": 1, "nodes": 4, "gpus_per_node": 8, "network": 12.5e9}
    without, with_copies = (step_time(**options, link=1e18, hpz=hpz) for hpz in (False, True))
    assert without is not None
    assert with_copies is not None
    assert with_copies.communication_seconds == pytest.approx(0.75 * without.communication_seconds)
