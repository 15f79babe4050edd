"""QLoRA's packed layers without ranks: what is packed, what is refused, what exports hold, and what the plan says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from plain_state import PlainState, save_rank
from pydantic import ValidationError
from training_runs import four_bits

from trainer.adapters import add_adapter, plain_name
from trainer.checkpoint_files import checksum, folder_name
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.export_adapter import write_config
from trainer.export_weights import Weights
from trainer.failures import StorageError, UserError
from trainer.four_bit import Linear4bit, digest, pack, packed_layers, packing, unpack
from trainer.origin import Origin, origin_of
from trainer.planning.memory import scale_bytes, unpacking_bytes
from trainer.planning.model_facts import facts_of_config
from trainer.slices import Slices, load_slices

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
QLORA = AdapterConfig(type="qlora", rank=3, alpha=5.0)


def make_model(model_type: str = "llama", **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **more)
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_a_layer_is_what_its_four_bits_stand_for() -> None:
    torch.manual_seed(0)
    usual = torch.nn.Linear(32, 48)
    layer = Linear4bit.__new__(Linear4bit)
    layer.set_up(32, 48)
    layer._load_from_state_dict(usual.state_dict(), "")
    assert layer.weight.shape == (32 * 48 // 8, 1)  # eight to a float32
    stood_for = unpack(*pack(usual.weight.detach()))
    assert 0 < float((stood_for - usual.weight).detach().abs().max()) < 0.2 * float(usual.weight.detach().abs().max())
    inputs = torch.randn(2, 5, 32, requires_grad=True)
    wanted = torch.nn.functional.linear(inputs, stood_for, usual.bias)
    found = layer(inputs)
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, slope)[0] for y in (found, wanted)))
    assert layer.stands_for(usual.weight.detach())
    assert not layer.stands_for(usual.weight.detach() + 1e-3)


def test_the_plan_knows_the_bytes_of_scales_and_of_an_unpacked_matrix() -> None:
    config = {"model_type": "llama", **SIZES, "hidden_size": 512, "intermediate_size": 1024}
    plain, packed = (facts_of_config(config, adapter=AdapterConfig(type=kind)) for kind in ("lora", "qlora"))
    matrices = 2 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert packed.packed_parameters == matrices
    assert (packed.parameters, packed.trainable_parameters) == (plain.parameters, plain.trainable_parameters)
    assert (plain.held_elements or 0) - (packed.held_elements or 0) == matrices - matrices // 4
    assert packed.largest_packed == 512 * 1024
    weights, state = pack(torch.randn(512, 1024).bfloat16())
    assert weights.nbytes == 512 * 1024 // 2
    of_one = state.absmax.nbytes + state.state2.absmax.nbytes
    assert scale_bytes(packed) == pytest.approx(of_one * matrices / (512 * 1024))
    assert unpacking_bytes(packed, 2) >= unpack(weights, state).nbytes + 4 * state.absmax.numel()


@pytest.mark.parametrize("targets", [("*.mlp.*",), "auto"])
def test_only_the_targets_are_packed_as_the_model_is_made(targets: Any) -> None:
    with packing(make_model, QLORA.model_copy(update={"targets": targets})):
        made = make_model()
    kinds = {name.split(".")[-2] for name in packed_layers(made)}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert kinds == (mlp if targets != "auto" else mlp | {f"{name}_proj" for name in "qkvo"})
    assert len(packed_layers(made)) == 2 * len(kinds)
    assert type(make_model().model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_what_cannot_be_packed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"packs torch\.nn\.Linear itself, not transformer\.h\.0\."):
        packing(lambda: make_model("gpt2"), QLORA)
    with pytest.raises(UserError, match="5 x 5 cannot be packed"), packing(torch_layers, QLORA):
        torch_layers()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        packing(make_model, QLORA)


def torch_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(5, 5)]))


def test_configs_that_qlora_does_not_go_with() -> None:
    with pytest.raises(ValidationError, match="use it with lora"):
        AdapterConfig(type="qlora", use_dora=True)
    adapter = {"type": "qlora"}
    with pytest.raises(ValidationError, match="pretrained weights"):
        ModelConfig.model_validate({"config": {"model_type": "llama"}, "tokenizer": "/t", "adapter": adapter})
    with pytest.raises(ValidationError, match="leave one of them out"):
        ModelConfig.model_validate({"path": "/m", "compile": True, "adapter": adapter})
    with pytest.raises(ValidationError, match=r"qlora needs deepspeed\.zero_stage 3"):
        LaunchConfig.model_validate(
            {
                "name": "n",
                "task": {"type": "causal-lm"},
                "model": {"path": "/m", "adapter": adapter},
                "data": {"train": [{"path": "/d.jsonl"}], "sequence_length": 8},
                "training": {"max_steps": 1, "global_batch_size": 1},
                "deepspeed": {"zero_stage": 2},
            }
        )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        # there is no dropout; in evaluation bitsandbytes works in bf16 on CPUs that have it, and not in all shapes
        found: torch.Tensor = model.train()(input_ids=torch.arange(2, 14)[None]).logits
    return found


def loaded(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


def test_both_exports_are_the_model_that_was_trained(tmp_path: Path) -> None:
    """The adapter over a base that transformers has loaded in 4 bits, and merged into what these stand for."""
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    trained = loaded(base, quantization_config=four_bits())
    add_adapter(trained, QLORA, 0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    parameters = dict(trained.named_parameters())
    frozen = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
    packed = {}
    for name, parameter in parameters.items():
        if state := getattr(parameter, "quant_state", None):
            packed[name] = (tuple(state.shape), digest(parameter.data, state))
    assert len(packed) == 14
    file = base / "model.safetensors"
    keys = {name: (file.name, plain_name(name)) for name in frozen}
    origin = Origin(base, {file.name: checksum(file)}, keys, torch.float32, packed)
    others = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
    for rank in (1, 0):
        assert save_rank(tmp_path, PlainState(rank, 2, others, frozen, origin=origin), 1) is None
    source = tmp_path / "checkpoints" / folder_name(1)

    with torch.device("meta"):
        meta = make_model()
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    for folder in (merged, alone):
        folder.mkdir()
        weights = Weights(source, meta, torch.float32, QLORA, alone=folder == alone)
        weights.write(folder, 1 << 30)
        if folder == alone:
            write_config(folder, meta, QLORA, (), str(base), "AutoModelForCausalLM")
        meta.config.save_pretrained(folder)
        weights.check(folder, False, (str(base), torch.float32) if folder == alone else None)
    assert not torch.allclose(logits(trained), logits(loaded(base)), atol=1e-2)
    torch.testing.assert_close(logits(loaded(merged)), logits(trained), rtol=1e-5, atol=1e-5)
    again = peft.PeftModel.from_pretrained(loaded(base, quantization_config=four_bits()), str(alone))
    torch.testing.assert_close(logits(again), logits(trained), rtol=1e-6, atol=1e-6)

    # a resume over weights that were packed otherwise
    about = Weights(source, meta, torch.float32, QLORA).state
    assert origin_of(about) == origin
    otherwise = {name: (shape, "other") for name, (shape, _) in packed.items()}
    now: Any = PlainState(0, 1, others, frozen, origin=replace(origin, packed=otherwise))
    with pytest.raises(StorageError, match="other 4-bit weights"):
        load_slices(Slices(source, about), about, source, now)
