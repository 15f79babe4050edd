"""Whole runs with an adapter: what is trained and stored, resumes at any world size, both kinds of export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import copy_run, figures, four_bits, launch, logs, make_run, make_workspace

from trainer.checkpoint_files import checksum
from trainer.config.schema import LaunchConfig
from trainer.export import export_run
from trainer.failures import StorageError
from trainer.rundir import RunDirectory

ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "modules_to_save": ["model.norm"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer; weights in two files."""
    import transformers

    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(workspace, max_shard_size="40KB")
    assert len(list(workspace.glob("*.safetensors"))) > 1
    return workspace


def lora_run(folder: Path, base: Path, **more: Any) -> RunDirectory:
    model = {"path": str(base), "tokenizer": str(base / "tokenizer.json"), "dtype": "float32", "adapter": ADAPTER}
    return make_run(folder, base, 2, model={**model, **more})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunDirectory:
    run = lora_run(tmp_path_factory.mktemp("runs") / "lora", base)
    assert launch(run, 2) == 0, logs(run)
    return run


def stored(checkpoint: Path) -> set[str]:
    names = set()
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_a_run_learns_and_stores_only_what_it_trains(finished: RunDirectory, base: Path) -> None:
    lines = finished.step_lines()
    assert lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = finished.checkpoints_dir / "step-00000012"
    kinds = {key.partition("/")[0] for key in stored(checkpoint)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    trained = {key.partition("/")[2] for key in stored(checkpoint)}
    assert all("lora_" in name or name == "model.norm.weight" for name in trained)
    state = json.loads((checkpoint / "state.json").read_text())
    assert trained == {name for name, _, is_trained in state["parameters"] if is_trained}
    assert set(state["origin"]["files"]) == {path.name for path in base.glob("*.safetensors")}
    assert set(state["origin"]["parameters"]) == {name for name, _, is_trained in state["parameters"] if not is_trained}


def load(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 90)[None]).logits
    return found


def test_merged_and_by_itself_the_adapter_gives_the_same_model(
    finished: RunDirectory, base: Path, tmp_path: Path
) -> None:
    """peft loads the adapter onto the original; its merge equals the merged export; what is frozen is untouched."""
    import peft

    config = LaunchConfig.model_validate_json(finished.config_path.read_text())
    folder = export_run(finished, config, output=tmp_path / "adapter", adapter="adapter")
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    about = json.loads((folder / "adapter_config.json").read_text())
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(about["target_modules"]) == projections
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (4, 8.0, str(base))
    adapted = peft.PeftModel.from_pretrained(load(base), str(folder)).eval()
    merged = load(finished.export_dir)
    assert not torch.allclose(logits(merged), logits(load(base)), atol=1e-2)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-5, atol=1e-5)
    by_peft = adapted.merge_and_unload().state_dict()  # type: ignore[operator]
    original = load(base).state_dict()
    changed = set()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, by_peft[name], rtol=1e-6, atol=1e-7)
        if not torch.equal(tensor, original[name]):
            changed.add(name)
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds <= projections | {"norm"}
    assert "norm" in kinds
    assert len(changed) == 2 * 7 + 1


def test_resume_is_bit_for_bit(finished: RunDirectory, tmp_path: Path) -> None:
    run = copy_run(finished, tmp_path / "again")
    shutil.rmtree(run.checkpoints_dir / "step-00000012")
    assert launch(run, 2, attempt=2) == 0, logs(run)
    assert "resumed from" in logs(run)
    assert figures(run) == figures(finished)
    for file in sorted(finished.export_dir.glob("*.safetensors")):
        assert (run.export_dir / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("resumes", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_changed_original_is_noticed(resumes: bool, finished: RunDirectory, base: Path, tmp_path: Path) -> None:
    """One weight of the model's files is another: neither a resume nor an export takes it."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    run = copy_run(finished, tmp_path / "run")
    for path in [run.config_path, run.plan_path, *run.checkpoints_dir.glob("*/state.json")]:
        path.write_text(path.read_text().replace(str(base), str(model)))
    for manifest in run.checkpoints_dir.glob("*/manifest.json"):
        entries = json.loads(manifest.read_text())
        state = manifest.parent / "state.json"
        entries["files"]["state.json"] = {"bytes": state.stat().st_size, "xxh3_128": checksum(state)}
        manifest.write_text(json.dumps(entries))
    config = LaunchConfig.model_validate_json(run.config_path.read_text())
    export_run(run, config, output=tmp_path / "unchanged")
    path = next(p for p in model.glob("*.safetensors") if "model.layers.0.mlp.up_proj.weight" in load_file(p))
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StorageError, match=rf"{path.name} has changed, .* put back the model's files"):
        export_run(run, config, output=tmp_path / "changed")
    if resumes:
        shutil.rmtree(run.checkpoints_dir / "step-00000012")
        assert launch(run, 2, attempt=2) != 0
        assert f"{path.name} has changed" in logs(run)
    path.unlink()
    with pytest.raises(StorageError, match="is missing"):
        export_run(run, config, output=tmp_path / "missing")


@pytest.mark.matrix
def test_a_run_in_4_bits(base: Path, tmp_path: Path) -> None:
    """Stores what LoRA does, packs the same at each start, resumes bit for bit and on other numbers of ranks; merged
    export: the adapter over a model that plain transformers has loaded in 4 bits."""
    import peft

    run = lora_run(tmp_path / "qlora", base, adapter={**ADAPTER, "type": "qlora"})
    assert launch(run, 2) == 0, logs(run)
    lines = run.step_lines()
    assert lines[-1]["loss"] < lines[0]["loss"]
    last = run.checkpoints_dir / "step-00000012"
    assert {key.partition("/")[0] for key in stored(last)} == {"master", "exp_avg", "exp_avg_sq"}
    states = [json.loads((path / "state.json").read_text()) for path in sorted(run.checkpoints_dir.glob("step-*"))]
    assert len(states[0]["origin"]["packed"]) == 14
    assert all(state["origin"] == states[0]["origin"] for state in states)

    for ranks in (2, 1, 3):
        again = copy_run(run, tmp_path / f"again{ranks}")
        shutil.rmtree(again.checkpoints_dir / last.name)
        assert launch(again, ranks, attempt=2) == 0, logs(again)
        assert "resumed from" in logs(again)
        if ranks == 2:
            assert figures(again) == figures(run)
        else:
            for found, expected in zip(again.step_lines(), lines, strict=True):
                assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for file in sorted(run.export_dir.glob("*.safetensors")):
            here, there = load_file(again.export_dir / file.name), load_file(file)
            for name, tensor in there.items():
                torch.testing.assert_close(here[name], tensor, rtol=0, atol=0 if ranks == 2 else 1e-5)

    config = LaunchConfig.model_validate_json(run.config_path.read_text())
    folder = export_run(run, config, output=tmp_path / "adapter", adapter="adapter")
    adapted = peft.PeftModel.from_pretrained(load(base, quantization_config=four_bits()), str(folder)).eval()
    merged = load(run.export_dir)
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(load(base)), atol=1e-2)
