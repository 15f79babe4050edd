"""The engine against a plain PyTorch loop, at 1, 2 and 3 ranks, and its checkpoints across world sizes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_loops import STEPS, assert_same, case, figures, make_model, peft_model, plain_loop, run_ranks
from training_runs import four_bits

from trainer.checkpoint_files import differences
from trainer.config.trained import AdapterConfig
from trainer.planning.model_facts import facts_of_config

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"sub_group_size": 1500}  # of a rank's states: several, as where it has more than 1e9 parameters
ADAFACTOR = {"type": "adafactor", "betas": (0.9, 0.999), "learning_rate": 3e-3}
UNFREEZE = [{"match": ["layers:1", "*embed*"], "from_step": 3}, {"match": ["layers:0"], "from_step": 4}]
FROZEN = ("layers:0", "model.embed_tokens")
LORA = {"rank": 3, "alpha": 6.0, "modules_to_save": ["model.norm"]}
QLORA = {**LORA, "type": "qlora"}
GROUPS = {
    "groups": [
        {"match": ["*.mlp"], "learning_rate": 1e-3, "weight_decay": 0.3},
        {"match": ["layers:1"], "learning_rate_factor": 2.0},
        {"match": ["model.norm", "*.up_proj"], "weight_decay": 0.2},
    ],
    "layer_decay": 0.6,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 24, 40)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradients_equal_a_plain_loop(world_size: int, model_folder: Path, tmp_path: Path) -> None:
    cases = [case(f"stage{stage}-micro{micro}", stage, micro) for stage, micro in ((3, 1), (3, 2), (2, 2), (1, 1))]
    cases.append(case("stage3-micro5", 3, 5, zero=PARTS))
    cases.append(case("files", 3, 2, offload=True, nvme={"parameters": True}, zero=OFFLOADED))
    cases.append(case("selective", 3, 2, model={"gradient_checkpointing": "selective"}))
    cases.append(case("offloaded", 3, 2, model={"gradient_checkpointing": {"every": 2}, "activation_offload": True}))
    cases.append(case("frozen", 3, 2, freeze=FROZEN))
    cases.append(case("fused", 3, 2, fused_loss=True, zero=PARTS))
    cases.append(case("probed", 3, 2, probe=True))
    cases.append(case("lora", 3, 2, adapter=LORA))
    cases.append(case("qlora", 3, 2, adapter=QLORA))
    cases.append(case("groups", 3, 2, optimizer=GROUPS, zero=PARTS))
    cases.append(case("adafactor", 3, 2, optimizer=ADAFACTOR, zero=PARTS))
    cases.append(case("unfreezing", 3, 2, unfreeze=UNFREEZE))
    cases.append(case("average", 3, 2, ema_decay=0.7))
    results = run_ranks(world_size, {"model": str(model_folder), "cases": cases}, tmp_path)
    expected = plain_loop(model_folder)
    special = {
        "frozen": plain_loop(model_folder, FROZEN),
        "lora": plain_loop(model_folder, prepare=peft_model),
        "qlora": plain_loop(model_folder, prepare=peft_model, quantization_config=four_bits()),
        "groups": plain_loop(model_folder, optimizer_options=GROUPS),
        "adafactor": plain_loop(model_folder, optimizer_options=ADAFACTOR),
        "unfreezing": plain_loop(model_folder, unfreeze=UNFREEZE),
    }
    for other in special.values():
        assert other[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-6)
    special["average"] = plain_loop(model_folder, ema_decay=0.7)
    for name, found in results.items():
        assert_same(found, special.get(name, expected), 1e-6)
    about = json.loads((model_folder / "config.json").read_text())
    planned = facts_of_config(about, adapter=AdapterConfig.model_validate(QLORA), dtype="float32")
    # ZeRO-3 pads each of the 14 matrices
    assert results["qlora"][-1]["intact"]
    assert results["qlora"][-1]["packed_bytes"] == pytest.approx(planned.packed_parameters / 2 / world_size, rel=0.02)
    gathered = [results[name][-1]["gathered"] for name in ("stage3-micro2", "probed")]
    assert gathered[0] == gathered[1] > 0  # a probe teaches ZeRO-3 nothing


@pytest.mark.matrix
def test_compiled_layers_equal_a_plain_loop(model_folder: Path, tmp_path: Path) -> None:
    """Inductor's programs on two ranks; a few minutes of C++ compiler."""
    cases = [
        case(
            f"compiled-{index}",
            3,
            2,
            model={"compile": True, "gradient_checkpointing": recompute},
        )
        for index, recompute in enumerate((True, False, "selective"))
    ]
    results = run_ranks(2, {"model": str(model_folder), "cases": cases}, tmp_path)
    expected = plain_loop(model_folder)
    for found in results.values():
        assert_same(found, expected, 1e-6)
        assert found[-1]["compiled"] > 0


@pytest.mark.matrix
@pytest.mark.parametrize(("world_size", "relative"), [(1, 1e-5), (2, 1e-5), (3, 5e-3)])
def test_products_in_8_bits_equal_torchaos_in_a_plain_loop(world_size: int, relative: float, tmp_path: Path) -> None:
    """With the one recipe that rounds each token by itself: the others depend on the cut into micro-batches.

    Its scales are powers of two: gradients that are three times as large, until ranks have averaged them, are rounded
    elsewhere.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def in_8_bits(model: Any) -> Any:
        config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
        return convert_to_float8_training(model, module_filter_fn=lambda _, name: name != "lm_head", config=config)

    folder = make_model(tmp_path / "model", 32, 48)
    options = {"compile": True, "fp8": "rowwise_with_gw_hp"}
    cases = [
        case(f"fp8-{index}", 3, 2, model={**options, "gradient_checkpointing": recompute})
        for index, recompute in enumerate((True, False))
    ]
    results = run_ranks(world_size, {"model": str(folder), "cases": cases}, tmp_path / "ranks")
    plain, expected = plain_loop(folder), plain_loop(folder, prepare=in_8_bits)
    for found in results.values():
        assert found[-1]["compiled"] > 0
        assert_same(found, expected, relative)
    assert plain[-1]["grad_norm"] != pytest.approx(expected[-1]["grad_norm"], rel=1e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_adapters_equal_a_plain_loop(world_size: int, model_folder: Path, tmp_path: Path) -> None:
    cases = [
        case("lora-stage1", 1, 2, adapter=LORA),
        case("lora-stage2", 2, 2, adapter=LORA),
        case("lora-persistent", 3, 2, adapter=LORA, persistence_threshold=100_000),
        case("dora", 3, 2, adapter={**LORA, "use_dora": True}),
        case("qlora-persistent", 3, 2, adapter=QLORA, persistence_threshold=100_000),
        case("qlora-kept", 3, 2, adapter=QLORA, model={"gradient_checkpointing": False}, zero=HELD_BRIEFLY),
        case("qlora-selective", 3, 2, adapter=QLORA, model={"gradient_checkpointing": "selective"}),
        case("qlora-offloaded", 3, 2, adapter=QLORA, model={"activation_offload": True}),
    ]
    results = run_ranks(world_size, {"model": str(model_folder), "cases": cases}, tmp_path)
    lora = plain_loop(model_folder, prepare=peft_model)
    dora = plain_loop(model_folder, prepare=functools.partial(peft_model, use_dora=True))
    assert dora[-1]["loss"] != pytest.approx(lora[-1]["loss"], rel=1e-6)
    qlora = plain_loop(model_folder, prepare=peft_model, quantization_config=four_bits())
    for name, found in results.items():
        assert_same(found, {"dora": dora, "qlora": qlora}.get(name.partition("-")[0], lora), 1e-6)
        assert found[-1].get("intact", True)


USUAL: dict[str, dict[str, Any]] = {
    "stage3": {"stage": 3, "zero": PARTS},
    "persistent": {"stage": 3, "persistence_threshold": 100_000},
    "frozen": {"stage": 3, "freeze": FROZEN},
    "lora": {"stage": 3, "adapter": LORA},
    "groups": {"stage": 3, "optimizer": GROUPS},
    "adafactor": {"stage": 3, "optimizer": ADAFACTOR, "zero": PARTS},
    "unfreezing": {
        "stage": 3,
        "unfreeze": [{"match": ["layers:1"], "from_step": 2}, {"match": ["*embed*"], "from_step": 5}],
    },
    "average": {"stage": 3, "ema_decay": 0.7, "zero": PARTS},
    "stage2": {"stage": 2},
    "stage1": {"stage": 1},
    "bfloat16": {"stage": 3, "dtype": "bfloat16"},
    "offload": {"stage": 3, "dtype": "bfloat16", "offload": True, "nvme": {}},
}
OFFLOADED = {"offload_param": {"device": "cpu", "pin_memory": True}}
FURTHER: dict[str, dict[str, Any]] = {
    "offload-memory": {"stage": 3, "dtype": "bfloat16", "offload": True},
    "parameters": {"stage": 3, "dtype": "bfloat16", "offload": True, "zero": OFFLOADED, "freeze": FROZEN},
    "dora": {"stage": 3, "adapter": {**LORA, "use_dora": True}},
    "lora-bfloat16": {"stage": 3, "dtype": "bfloat16", "adapter": LORA},
    "lora-offload": {"stage": 3, "dtype": "bfloat16", "offload": True, "adapter": LORA},
    "lora-persistent": {"stage": 3, "persistence_threshold": 100_000, "adapter": LORA},
    "qlora": {"stage": 3, "adapter": QLORA},
    "qlora-bfloat16": {"stage": 3, "dtype": "bfloat16", "adapter": QLORA},
    "qlora-offload": {"stage": 3, "dtype": "bfloat16", "offload": True, "zero": OFFLOADED, "adapter": QLORA},
    "qlora-persistent": {"stage": 3, "persistence_threshold": 100_000, "adapter": QLORA},
    "lora-stage2": {"stage": 2, "adapter": LORA},
    "groups-stage2": {"stage": 2, "optimizer": GROUPS},
    "groups-stage1": {"stage": 1, "optimizer": GROUPS},
    "unfreezing-stage2": {"stage": 2, "unfreeze": UNFREEZE, "ema_decay": 0.5},
    "adafactor-lora": {"stage": 3, "adapter": LORA, "optimizer": ADAFACTOR},
    "all-offload": {
        "stage": 3,
        "dtype": "bfloat16",
        "offload": True,
        "optimizer": {**ADAFACTOR, **GROUPS},
        "unfreeze": UNFREEZE,
        "ema_decay": 0.5,
    },
}


IN_FILES: dict[str, dict[str, Any]] = {
    "average": {"optimizer": GROUPS, "ema_decay": 0.5, "unfreeze": UNFREEZE, "zero": PARTS},
    "lora": {"adapter": LORA, "zero": OFFLOADED},
}
FURTHER_IN_FILES: dict[str, dict[str, Any]] = {
    "adafactor": {"optimizer": ADAFACTOR},
    "frozen": {"freeze": FROZEN, "persistence_threshold": 100, "zero": OFFLOADED},
    "bfloat16": {"dtype": "bfloat16", "zero": OFFLOADED},
    "qlora": {"adapter": QLORA, "zero": OFFLOADED},
}


@pytest.mark.matrix
@pytest.mark.parametrize("variants", [IN_FILES, FURTHER_IN_FILES], ids=["usual", "further"])
def test_states_in_files_have_the_bits_of_those_in_host_memory(
    variants: dict[str, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    """Losses, checkpoints, what follows from these, there and back; without offload and at 3 ranks up to rounding."""
    cases, elsewhere = [], []
    for name, options in variants.items():
        host = {**case(name, 3, 1), "offload": True, **options}
        files = {**host, "nvme": {"parameters": options.get("zero") == OFFLOADED}}
        device = {**case(name, 3, 1), **options, "zero": {}}
        run = {kind: str(tmp_path / "runs" / f"{name}-{kind}") for kind in ("host", "files", "device")}
        later = {"steps": (3, STEPS)}
        for kind, place in {"host": host, "files": files, "device": device}.items():
            cases.append({**place, "name": f"{name}-{kind}-begun", "steps": (1, 2), "save": run[kind]})
            cases.append({**place, "name": f"{name}-{kind}", **later, "load": run["files"]})
        cases.append({**files, "name": f"{name}-back", **later, "load": run["device"]})
        for kind, place in {"files": files, "device": device}.items():
            elsewhere.append({**place, "name": f"{name}-{kind}", **later, "load": run["files"]})
    order = sorted(cases, key=lambda made: "load" in made)
    found = run_ranks(2, {"model": str(model_folder), "cases": order}, tmp_path / "2")
    there = run_ranks(3, {"model": str(model_folder), "cases": elsewhere}, tmp_path / "3")
    for name, options in variants.items():
        assert figures(found[f"{name}-files-begun"]) == figures(found[f"{name}-host-begun"])
        assert figures(found[f"{name}-files"]) == figures(found[f"{name}-host"])
        saved = [tmp_path / "runs" / f"{name}-{kind}/checkpoints/step-00000002" for kind in ("host", "files")]
        assert list(differences(*saved)) == []
        close = 1e-3 if options.get("dtype") == "bfloat16" else 1e-6
        for other in (found[f"{name}-device"], found[f"{name}-back"], there[f"{name}-files"], there[f"{name}-device"]):
            assert_same(other, found[f"{name}-files"], close)


HELD_BRIEFLY = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}  # gathered again in each backward pass
SECOND_COPY = {"zero_hpz_partition_size": 2, **HELD_BRIEFLY}


@pytest.mark.matrix
def test_a_second_copy_in_each_node_follows_a_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    """hpZ on four ranks as two nodes of two: as without it, and a resume is equal bit for bit."""
    kinds: dict[str, dict[str, Any]] = {
        "float32": {},
        "frozen": {"dtype": "bfloat16", "freeze": FROZEN, "persistence_threshold": 100},
    }
    cases = []
    for name, options in kinds.items():
        copied = {**case(name, 3, 1), **options, "zero": SECOND_COPY}
        run = str(tmp_path / "runs" / name)
        cases.append({**copied, "name": f"{name}-plain", "zero": HELD_BRIEFLY})
        cases.append({**copied, "name": f"{name}-whole"})
        cases.append({**copied, "name": f"{name}-saving", "steps": (1, 2), "save": run})
        cases.append({**copied, "name": f"{name}-continued", "steps": (3, STEPS), "load": run})
        cases[-1]["probe_first"] = True  # makes copies of weights that the checkpoint then replaces
    results = run_ranks(4, {"model": str(model_folder), "cases": cases}, tmp_path)
    for name in kinds:
        assert figures(results[f"{name}-whole"]) == figures(results[f"{name}-plain"])
        assert figures(results[f"{name}-continued"]) == figures(results[f"{name}-whole"])[2:]
        assert results[f"{name}-whole"][-1]["copies"] > 0 == results[f"{name}-plain"][-1]["copies"]


@pytest.mark.parametrize("variants", [USUAL, pytest.param(FURTHER, marks=pytest.mark.matrix)], ids=["usual", "further"])
def test_a_checkpoint_loads_at_any_world_size(
    variants: dict[str, dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    """Saved at 3 ranks after step 3; steps 4-6 at 3 ranks are equal bit for bit, at 1 and 2 ranks up to rounding, at
    another stage of ZeRO as well."""
    others = {"stage3": 2, "stage2": 3}

    def cases(kind: str, steps: tuple[int, int], world_size: int) -> list[dict[str, Any]]:
        made = []
        for name, options in variants.items():
            run = str(tmp_path / "runs" / name)
            options = {**options, "load": run} if kind == "continued" else dict(options)
            options |= {"save": run} if kind == "saving" else {}
            made.append({**case(f"{name}:{kind}", 3, 1, steps), **options})
            if kind == "continued" and world_size < 3 and name in others:
                made.append({**made[-1], "name": f"{name}:other", "stage": others[name], "zero": {}})
        return made

    job = {"model": str(model_folder)}
    first = cases("whole", (1, 6), 3) + cases("saving", (1, 3), 3) + cases("continued", (4, 6), 3)
    found = run_ranks(3, {**job, "cases": first}, tmp_path / "3")
    for name in variants:
        assert figures(found[f"{name}:continued"]) == figures(found[f"{name}:whole"][3:]), name
    for world_size in (2, 1):
        job["cases"] = cases("continued", (4, 6), world_size)
        for key, continued in run_ranks(world_size, job, tmp_path / str(world_size)).items():
            name = key.partition(":")[0]
            # bfloat16 rounds by up to 2^-9 of a value
            close = 2e-3 if variants[name].get("dtype") == "bfloat16" else 1e-6
            assert_same(continued, found[f"{name}:whole"][3:], close)


def test_a_start_brings_no_compiler_along() -> None:
    """torch's takes seconds to import, and few runs use it; ZeRO imports Muon's kernels, which it would compile."""
    program = """
import sys, trainer.train
trainer.train.init_distributed("cpu", 60.0)
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
print(*(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor")))
"""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | alone, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [""]), done.stdout + done.stderr
