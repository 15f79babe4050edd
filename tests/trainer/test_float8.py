"""Products in 8 bits: which layers have them, and that they are torchao's, in the layers' own forward and backward."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from trainer import float8
from trainer.config.schema import ModelConfig
from trainer.failures import UserError
from trainer.float8 import use_float8
from trainer.layers import compile_layers, set_recomputation

LAYERS = 2
IN_A_LAYER = 7
RECIPES = ("rowwise", "rowwise_with_gw_hp", "tensorwise")


def llama(hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": hidden, "intermediate_size": 80, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).train()


def config_of(recipe: str = "rowwise", **options: Any) -> ModelConfig:
    return ModelConfig(path="nowhere", dtype="float32", compile=True, fp8=recipe, **options)


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(1))  # 46 tokens: no multiple of 16
    loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
    if model.training:
        loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_in_8_bits_and_evaluation_is_not(recipe: str) -> None:
    plain_loss, plain = loss_and_gradients(llama())
    model = llama()
    weights = dict(model.named_parameters())
    assert use_float8(model, config_of(recipe)) == f"{recipe}, {LAYERS * IN_A_LAYER} linear layers"
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())  # ZeRO's, with all it knows
    loss, gradients = loss_and_gradients(model)
    assert 0 < abs(loss - plain_loss) / plain_loss < 0.01
    # 3 bits of mantissa: an error of up to 1/16 of each factor
    assert all(1e-3 < error < 0.2 for error in distance(gradients, plain))
    assert torch.equal(loss_and_gradients(model.eval())[0], loss_and_gradients(llama().eval())[0])


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_recomputation_changes_nothing(recompute: Any) -> None:
    results = []
    for chosen in (False, recompute):
        model, config = llama(), config_of(gradient_checkpointing=chosen)
        use_float8(model, config)
        set_recomputation(model, config)
        results.append(loss_and_gradients(model))
    (loss, gradients), (found, others) = results
    assert loss == found
    assert max(distance(others, gradients)) < 1e-6


@pytest.mark.parametrize(
    "recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.matrix) for name in RECIPES[1:])]
)
def test_compiled_layers_are_whole_graphs_that_keep_no_gathered_weight(recipe: str, graph_counters: Any) -> None:
    """A view of a weight that is kept for the backward pass would keep all that ZeRO-3 has gathered."""
    results = []
    for compiled in (False, True):
        model, config = llama(), config_of(recipe, gradient_checkpointing=False)
        use_float8(model, config)
        if compiled:
            compile_layers(model, config)
        weights = {p.untyped_storage().data_ptr(): p for p in model.model.layers.parameters()}
        views: list[torch.Tensor] = []

        def note(tensor: Any, weights: Any = weights, views: Any = views) -> Any:
            weight = weights.get(tensor.untyped_storage().data_ptr())
            if weight is not None and weight is not tensor:
                views.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            results.append((*loss_and_gradients(model), len(views)))
    (loss, gradients, kept), (found, others, compiled_kept) = results
    assert kept > 0  # what torchao does by itself
    assert compiled_kept == 0
    assert graph_counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert max(distance(others, gradients)) < 1e-5


def test_layers_that_are_not_trained_stay_as_they_are() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0." not in name and "o_proj" not in name)
    assert use_float8(model, config_of()).endswith(f"{IN_A_LAYER - 1} linear layers")
    assert type(model.model.layers[0].mlp.up_proj) is type(model.lm_head) is torch.nn.Linear


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no trained linear layers .* divisible by 16"):
        use_float8(llama(hidden=36), config_of())
    for options, problem in (
        ({"compile": False}, "set `compile`"),
        ({"adapter": {"type": "lora"}}, "leave it out with `adapter`"),
        ({"fp8": "e4m3"}, "rowwise"),
    ):
        with pytest.raises(ValueError, match=problem):
            ModelConfig(path="nowhere", **{"compile": True, "fp8": "rowwise", **options})
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="pip install torchao"):
        use_float8(llama(), config_of())
    monkeypatch.setattr(float8, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"NVIDIA A100 .*8\.0.* has no products in 8 bits"):
        use_float8(llama(), config_of())
