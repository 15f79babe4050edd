"""Adapters in exports, for all kinds of layers and heads: peft agrees with what is merged, and loads what is alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from plain_state import PlainState, save_rank
from safetensors.torch import load_file

from trainer import export_weights
from trainer.adapters import add_adapter
from trainer.checkpoint_files import folder_name
from trainer.config.trained import AdapterConfig
from trainer.export_adapter import short_names, write_config
from trainer.export_weights import Weights
from trainer.failures import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
CAUSAL, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", CAUSAL, {}),
    "dora": ("llama", CAUSAL, {"use_dora": True, "targets": ("q_proj", "layers:1")}),
    "saved": ("llama", CAUSAL, {"modules_to_save": ("model.norm", "lm_head")}),
    "transposed": ("gpt2", CAUSAL, {"modules_to_save": ("*.ln_f",)}),
    "classifier": ("bert", CLASSES, {"targets": ("query", "encoder.layer.1.output.dense")}),
    "nested head": ("roberta", CLASSES, {}),
}


def make_model(name: str) -> tuple[Any, Any, AdapterConfig]:
    """(the model as it was, with an adapter whose every parameter has learned something, the adapter's config)"""
    model_type, auto_class, options = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **SIZES, num_labels=3, pad_token_id=1)
    adapter = AdapterConfig(rank=3, alpha=5.0, **options)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(getattr(transformers, auto_class).from_config(config).eval())
    add_adapter(models[1], adapter, 0)
    with torch.no_grad():
        for parameter in models[1].parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    return models[0], models[1], adapter


def checkpoint_of(model: Any, path: Path) -> Path:
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for rank in (1, 0):
        assert save_rank(path, PlainState(rank, 2, trained, frozen), 1) is None
    return path / "checkpoints" / folder_name(1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(2, 14)[None]).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_both_exports_are_the_model_that_was_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, trained, adapter = make_model(name)
    monkeypatch.setattr(export_weights, "_CHUNK", 100)  # several blocks of rows
    source = checkpoint_of(trained, tmp_path / "run")
    original.save_pretrained(tmp_path / "base")
    with torch.device("meta"):
        meta = type(original)(original.config)

    merged = tmp_path / "merged"
    merged.mkdir()
    weights = Weights(source, meta, torch.float32, adapter)
    weights.write(merged, 1 << 30)
    original.config.save_pretrained(merged)
    weights.check(merged, False)
    loaded = type(original).from_pretrained(merged).eval()
    assert not torch.allclose(logits(trained), logits(original), atol=1e-2)
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=1e-4, atol=1e-5)

    alone = tmp_path / "alone"
    alone.mkdir()
    weights = Weights(source, meta, torch.float32, adapter, alone=True)
    weights.write(alone, 1 << 30)
    write_config(alone, meta, adapter, weights.trained_whole, str(tmp_path / "base"), CASES[name][1])
    weights.check(alone, False, (str(tmp_path / "base"), torch.float32))
    stored = load_file(alone / "adapter_model.safetensors")
    assert sum(map(torch.Tensor.numel, stored.values())) == sum(
        p.numel() for p in trained.parameters() if p.requires_grad
    )
    adapted = peft.PeftModel.from_pretrained(type(original).from_pretrained(tmp_path / "base"), str(alone)).eval()
    torch.testing.assert_close(logits(adapted), logits(trained), rtol=1e-5, atol=1e-5)
    by_peft = adapted.merge_and_unload().state_dict()  # type: ignore[operator]
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, by_peft[key], rtol=1e-5, atol=1e-6)


def test_a_merge_in_bf16_rounds_once(tmp_path: Path) -> None:
    _, trained, adapter = make_model("llama")
    weights = Weights(checkpoint_of(trained, tmp_path), make_model("llama")[0].to("meta"), torch.bfloat16, adapter)
    entry = next(entry for entry in weights.entries if entry.name == "model.layers.0.mlp.up_proj.weight")
    module = trained.model.layers[0].mlp.up_proj
    exact = module.base_layer.weight.double() + 5 / 3 * (
        module.lora_B.default.weight.double() @ module.lora_A.default.weight.double()
    )
    found = torch.cat(list(weights.chunks(entry))).view(entry.shape)
    assert found.dtype == torch.bfloat16
    assert float(((found.double() - exact.detach()).abs() / exact.detach().abs()).max()) <= 2**-8 * (1 + 1e-3)
    assert math.prod(entry.shape) == found.numel()


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    original, _, adapter = make_model("llama")
    with pytest.raises(UserError, match="--adapter merge"):
        write_config(tmp_path, original, adapter, (), None, CAUSAL)
    original.config.tie_word_embeddings = True
    with pytest.raises(UserError, match="is tied to the head"):
        write_config(tmp_path, original, adapter, ("model.embed_tokens.weight",), "/m", CAUSAL)


def test_targets_are_named_briefly_where_that_means_the_same() -> None:
    linear = ["a.0.q", "a.1.q", "a.0.dense", "pooler.dense"]
    assert short_names(["a.0.q", "a.1.q"], linear) == ["q"]
    assert short_names(["a.0.q", "a.0.dense"], linear) == ["a.0.dense", "a.0.q"]
