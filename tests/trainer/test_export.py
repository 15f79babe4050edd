"""Exports: plain transformers reads them, names and tied weights are right, memory is bounded, errors are clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_state import PlainState, save_rank
from safetensors.torch import load_file, save_file

from trainer import export_weights
from trainer.checkpoint_files import folder_name
from trainer.config.schema import LaunchConfig
from trainer.export import _model_card
from trainer.export_weights import Weights
from trainer.failures import StorageError
from trainer.parameters import persistent_buffers
from trainer.rundir import RunDirectory

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "experts": {"model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def make_model(name: str) -> Any:
    import transformers

    arguments = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    arguments |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, **MODELS[name]}
    config = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config)


def checkpoint_of(model: Any, path: Path) -> Path:
    """Written as by two ranks."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if "norm" in name}
    trained = {name: p.detach() for name, p in model.named_parameters() if name not in frozen}
    for rank in (1, 0):
        assert save_rank(path, PlainState(rank, 2, trained, frozen, dict(persistent_buffers(model))), 1) is None
    return path / "checkpoints" / folder_name(1)


def weights_of(model: Any, folder: Path, dtype: torch.dtype) -> Weights:
    with torch.device("meta"):
        meta = type(model)(model.config)
    return Weights(folder, meta, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_what_transformers_itself_would_save(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(name)
    source = checkpoint_of(model, tmp_path / "run")
    model.to(dtype).save_pretrained(tmp_path / "expected")
    export = tmp_path / "export"
    export.mkdir()
    model.config.save_pretrained(export)
    weights = weights_of(model, source, dtype)
    weights.write(export, 3000)
    weights.check(export, False)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert {p.name for p in export.glob("*.safetensors")} == set(index["weight_map"].values())
    found = {key: tensor for p in export.glob("*.safetensors") for key, tensor in load_file(p).items()}
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == dtype


@pytest.mark.parametrize("chunk", [7, 100])
def test_chunks_of_any_size_give_the_same_file(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    weights = weights_of(model, checkpoint_of(model, tmp_path / "run"), torch.float32)
    monkeypatch.setattr(export_weights, "_CHUNK", chunk)
    monkeypatch.setattr(export_weights, "_LOGITS_BYTES", 0)
    weights.entries = weights.entries[-3:]
    weights.write(tmp_path, 1 << 30)
    weights.check(tmp_path, False)
    whole = dict(model.named_parameters())
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, whole[name])


def test_a_wrong_element_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.config.save_pretrained(tmp_path)
    weights = weights_of(model, checkpoint_of(model, tmp_path / "run"), torch.float32)
    weights.write(tmp_path, 1 << 30)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][3, 5] += 0.1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StorageError, match=r"lm_head\.weight was not written"):
        weights.check(tmp_path, False)


def test_logits_of_the_reloaded_model_are_compared(tmp_path: Path) -> None:
    """Every element is as written, but the config reads them differently."""
    model = make_model("llama")
    weights = weights_of(model, checkpoint_of(model, tmp_path / "run"), torch.float32)
    weights.write(tmp_path, 1 << 30)
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    model.config.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="does not take the export"):
        weights.check(tmp_path, False)


def test_the_card_of_a_model_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    values = {
        "name": "card",
        "task": {"type": "causal-lm"},
        "model": {"config": {"model_type": "llama"}, "tokenizer": "/t/small.model"},
        "data": {"train": [{"path": "/d/a.jsonl"}], "sequence_length": 64},
        "training": {"global_batch_size": 4, "max_steps": 6},
        "cluster": {"environment": {"PLACE": "here"}},
        "resilience": {"notify": [{"webhook": "https://hooks.example/services/T0/B0/XYZ"}]},
    }
    card = _model_card(RunDirectory(tmp_path), LaunchConfig.model_validate(values), 6)
    assert '"global_batch_size": 4' in card
    assert "hooks.example" not in card
    assert "PLACE" not in card
