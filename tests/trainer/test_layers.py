"""What layers keep for their backward pass: the products that are computed again, counted on a real model."""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import kernels
from trainer.config.schema import ModelConfig
from trainer.failures import UserError
from trainer.kernels import fuse_kernels
from trainer.layers import compile_layers, experts, keep_statistics, repeated_layers, set_recomputation

LAYERS = 4
IN_A_LAYER = 7  # products with weights in a Llama layer; each has two more in the backward pass


class Counting(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes)).train()


def config_of(**options: Any) -> ModelConfig:
    return ModelConfig(path="nowhere", **options)


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"gradient_checkpointing": False}, 0),
        ({"gradient_checkpointing": True}, LAYERS),
        ({"gradient_checkpointing": {"every": 3}}, 2),
        ({"gradient_checkpointing": "selective"}, 0),
        ({"gradient_checkpointing": {"every": 3}, "activation_offload": True}, 2),
    ],
)
def test_what_is_computed_again_and_that_gradients_stay(options: dict[str, Any], again: int) -> None:
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for chosen in ({"gradient_checkpointing": False}, options):
        model = llama()
        set_recomputation(model, config_of(**chosen))
        with Counting() as counting:
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            loss.backward()
        results.append((counting.counts, float(loss.detach()), [parameter.grad for parameter in model.parameters()]))
    (plain, plain_loss, plain_gradients), (counts, loss_value, gradients) = results
    # checkpointing stops as soon as the last tensor is there that the backward pass wants: before down_proj's product
    assert counts["aten::mm"] - plain["aten::mm"] == again * (IN_A_LAYER - 1)
    rsqrt = LAYERS if options["gradient_checkpointing"] == "selective" else again
    assert counts["aten::rsqrt"] - plain["aten::rsqrt"] == 2 * rsqrt  # the norms
    assert loss_value == plain_loss
    for found, expected in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_inputs_that_are_offloaded_are_not_on_the_device() -> None:
    """On a CPU they are copied as well: what the graph keeps is not the tensor that the layer was called with."""
    packed: list[torch.Size] = []
    real = torch.autograd.graph.saved_tensors_hooks.__init__

    def noting(self: Any, pack: Any, unpack: Any) -> None:
        def noted(tensor: torch.Tensor) -> Any:
            kept = pack(tensor)
            if isinstance(kept, tuple) and isinstance(kept[0], torch.device):
                packed.append(tensor.shape)
                assert kept[1].data_ptr() != tensor.data_ptr()
            return kept

        real(self, noted, unpack)

    model = llama()
    set_recomputation(model, config_of(activation_offload=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", noting)
        model(input_ids=torch.ones(2, 16, dtype=torch.int64), use_cache=False).logits.mean().backward()
    assert packed.count(torch.Size([2, 16, 24])) == LAYERS
    assert not {tuple(shape) for shape in packed} & {tuple(p.shape) for p in repeated_layers(model)[0].parameters()}


def test_batch_normalisation_keeps_its_statistics() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    model(pixel_values=torch.randn(4, 3, 32, 32))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    keep_statistics(model, config_of())
    model.train()
    pixels = torch.randn(4, 3, 32, 32)
    together = model(pixel_values=pixels).logits
    torch.testing.assert_close(torch.cat([model(pixel_values=part).logits for part in pixels.split(1)]), together)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    together.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(UserError, match="start from a trained model"):
        keep_statistics(model, ModelConfig(config={"model_type": "resnet"}, processor="none"))


def test_experts_are_gathered_together() -> None:
    """Every rank runs others: one by one, ranks would wait for each other for ever."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2, "num_experts": 2}
    config = SwitchTransformersConfig(vocab_size=9, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **sizes)
    found = experts(SwitchTransformersForConditionalGeneration(config))
    assert [len(module) for module in found] == [2, 2]  # type: ignore[arg-type]


def test_models_without_layers_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing: Linear has no layers"):
        set_recomputation(torch.nn.Linear(2, 2), config_of(gradient_checkpointing="selective"))


@pytest.mark.parametrize(
    "options",
    [
        {"activation_offload": True, "gradient_checkpointing": "selective"},
        {"activation_offload": True, "gradient_checkpointing": False},
        {"gradient_checkpointing": {"every": 0}},
        {"activation_offload": True, "compile": True},
        {"sequence_parallel": 2, "compile": True},
        {"kernels": "liger", "compile": True},
        {"compile": {"mode": "reduce-overhead"}},
    ],
)
def test_combinations_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"activation_offload|every|mode|sequence_parallel|kernels"):
        config_of(**options)


@pytest.mark.parametrize(
    "recompute",
    [True, *(pytest.param(value, marks=pytest.mark.matrix) for value in (False, "selective", {"every": 2}))],
    ids=["all", "none", "selective", "every"],
)
def test_layers_share_whole_compiled_graphs(recompute: Any, graph_counters: Any) -> None:
    """Without code generation (that is in the matrix of test_engine.py): no graph breaks, one graph for each kind."""
    kinds = 2 if isinstance(recompute, dict) else 1
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in (False, True):
        model = llama()
        config = config_of(gradient_checkpointing=recompute, compile=compiled)
        set_recomputation(model, config)
        if compiled:
            assert compile_layers(model, config).startswith(f"{LAYERS} layers")
        loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert graph_counters["stats"]["unique_graphs"] == kinds
    assert not graph_counters["graph_break"]
    (expected, plain), (found, gradients) = results
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-8)


def test_without_a_compiler_layers_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of CPUs for a run on these, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = llama()
    assert "no-such-compiler is not on this node" in compile_layers(model, config_of(compile=True))
    assert "forward" not in vars(repeated_layers(model)[0])


def test_fused_kernels_go_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels run on GPUs alone; here is what decides about them."""
    model, liger = llama(), config_of(kernels="liger")
    monkeypatch.setattr(kernels, "on_gpu", lambda: False)
    assert fuse_kernels(model, config_of(kernels="none")) == "the model's own, as configured"
    assert fuse_kernels(model, config_of()) == "the model's own: its kernels want a GPU"
    with pytest.raises(UserError, match=r"model\.kernels: liger does not go here: its kernels want a GPU"):
        fuse_kernels(model, liger)
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    with pytest.raises(UserError, match="liger-kernel is not installed"):
        fuse_kernels(model, liger)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    assert "torch.compile fuses them itself" in fuse_kernels(model, config_of(compile=True))
    monkeypatch.setattr(kernels, "_problem", lambda *_: None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)  # as where a name it wants is gone: Qwen2-VL's
    assert "it does not fit this transformers" in fuse_kernels(model, config_of())
    with pytest.raises(UserError, match="does not fit this transformers"):
        fuse_kernels(model, liger)


def test_what_serves_one_model_leaves_later_ones_alone() -> None:
    """Classes are put back, functions go by device: as Liger replaces both in the model's module."""
    from transformers.models.llama import modeling_llama

    own_norm, own_rotary = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb

    def broken(*_: Any, **__: Any) -> Any:
        raise AssertionError("GPUs only")

    ids = torch.arange(16)[None]
    expected = llama()(input_ids=ids, labels=ids).loss
    try:
        with kernels.only_this_instance(llama()):
            modeling_llama.LlamaRMSNorm = modeling_llama.apply_rotary_pos_emb = broken
        assert modeling_llama.LlamaRMSNorm is own_norm
        assert modeling_llama.apply_rotary_pos_emb is not own_rotary
        assert torch.equal(llama()(input_ids=ids, labels=ids).loss, expected)
        with pytest.raises(AssertionError, match="GPUs only"):
            modeling_llama.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True))
    finally:
        modeling_llama.apply_rotary_pos_emb = own_rotary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels want a GPU")
def test_fused_kernels_compute_what_the_models_own_do() -> None:
    pytest.importorskip("liger_kernel")
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for name in ("none", "liger"):
        model = llama().cuda()
        told = fuse_kernels(model, config_of(kernels=name))
        assert told == ("Liger's for llama" if name == "liger" else "the model's own, as configured")
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for own, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, own, rtol=2e-4, atol=2e-5)
    cpu = ids.cpu()
    later = llama()(input_ids=cpu, labels=cpu).loss  # a model made afterwards, where there is no GPU
    torch.testing.assert_close(later, results[0][0].cpu(), rtol=1e-4, atol=1e-5)
