"""Which attention is chosen, and torch's variable-length one against SDPA in every family that it is chosen for."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_forward import CPU, SEQUENCES, SMALL

from trainer import attention
from trainer.attention import VARLEN_FAMILIES, choose_attention
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.forward import LanguageModelLoss

GPU = torch.device("cuda")
DEVICES = [CPU, *([GPU] if torch.cuda.is_available() else [])]


def config_of(requested: str, task: str = "causal-lm", **model: Any) -> LaunchConfig:
    return LaunchConfig.model_validate(
        {
            "name": "x",
            "task": {"type": task},
            "model": {"path": "/nowhere", "attention": requested, **model},
            "data": {"train": [{"path": "/nowhere"}], "sequence_length": 64},
            "training": {"global_batch_size": 1, "max_steps": 1},
        }
    )


def family(name: str, implementation: str | None = None) -> Any:
    options = {**SMALL, "num_key_value_heads": 1, "sliding_window": 4, "head_dim": 8, "pad_token_id": 0}
    if implementation is None:
        return transformers.AutoConfig.for_model(name, **options)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", sorted(VARLEN_FAMILIES))
def test_varlen_gives_the_losses_and_gradients_of_sdpa(name: str, device: torch.device) -> None:
    """In fp32 on the CPU; in bfloat16, to its precision, on a GPU."""
    chosen, _ = choose_attention(config_of("varlen"), family(name), device)
    dtype, relative = (torch.float32, 1e-6) if device.type == "cpu" else (torch.bfloat16, 2e-2)
    results = []
    for implementation in ("sdpa", chosen):
        assert implementation is not None
        model = family(name, implementation).to(device, dtype)
        loss, _ = LanguageModelLoss(model, None, implementation, device)(model, SEQUENCES)
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (expected, gradients), (found, others) = results
    torch.testing.assert_close(found, expected, rtol=relative, atol=0)
    for other, gradient in zip(others, gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(other, gradient, rtol=100 * relative, atol=relative * max(scale, 1.0))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_samples_of_one_length_give_what_unequal_ones_do(device: torch.device, window: int | None) -> None:
    """Equal ones go through SDPA together; the last sample cut off, they are unequal."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(1, heads, 24, 16, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    outputs = []
    for lengths in ([8, 8, 8], [8, 8, 7]):
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        q, k, v = (tensor[:, :, : positions.size] for tensor in (query, key, value))
        told = attention.sample_bounds(positions, device)
        output, _ = attention.varlen_attention(torch.nn.Identity(), q, k, v, None, sliding_window=window, **told)
        assert output.shape == (1, positions.size, 4, 16)
        outputs.append(output[:, :16])
    torch.testing.assert_close(
        *outputs, rtol=2e-2 if device.type == "cuda" else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


def test_a_kernel_that_fails_or_is_wrong_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = family("llama")
    assert attention._kernel_problem("varlen", llama, CPU) is None
    right = attention.varlen_attention
    calls: list[int] = []

    def wrong(*arguments: Any, **options: Any) -> Any:
        """The second call, which would be the GPU's, lets samples see each other."""
        calls.append(1)
        if len(calls) % 2 == 0:
            edges = options["cu_seq_lens_q"][[0, -1]]
            options |= {"cu_seq_lens_q": edges, "max_length_q": int(edges[-1])}
        return right(*arguments, **options)

    monkeypatch.setattr(attention, "varlen_attention", wrong)
    assert "not close" in (attention._kernel_problem("varlen", llama, CPU) or "")

    def missing(*_: Any, **options: Any) -> Any:
        raise TypeError("varlen_attn() got an unexpected keyword argument 'enable_gqa'")

    monkeypatch.setattr(attention, "varlen_attention", missing)
    assert "unexpected keyword" in (attention._kernel_problem("varlen", llama, CPU) or "")


def test_auto_goes_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = family("llama")
    assert choose_attention(config_of("auto"), llama, CPU) == (None, "no GPU")
    packages: set[str] = set()
    failing: set[str] = set()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_installed", packages.__contains__)
    monkeypatch.setattr(attention, "_kernel_problem", lambda name, *_: "no such symbol" if name in failing else None)
    chosen, why = choose_attention(config_of("auto"), llama, GPU)
    assert (chosen, "torch's own kernel" in why) == ("varlen", True)
    for options, model, reason in (
        ({}, family("gemma2"), "model_type gemma2"),
        ({"dtype": "float32"}, llama, "bfloat16"),
    ):
        chosen, why = choose_attention(config_of("auto", **options), model, GPU)
        assert chosen is None
        assert reason in why
    packages |= {"flash-attn", "flash-attn-3", "flash-attn-4"}
    for version in (3, 4, 2):
        name = f"flash_attention_{version}"
        assert choose_attention(config_of("auto"), llama, GPU)[0] == name
        assert choose_attention(config_of(name), llama, GPU) == (name, "as configured")
        failing.add(name)
    chosen, why = choose_attention(config_of("auto"), llama, GPU)
    assert (chosen, "not flash_attention_4: its kernel fails here: no such symbol" in why) == ("varlen", True)
    failing.clear()
    assert choose_attention(config_of("auto", dtype="float32"), llama, GPU)[0] is None
    chosen, why = choose_attention(config_of("auto", "summarization"), family("t5"), GPU)
    assert (chosen, "t5 has no FlashAttention" in why) == (None, True)
    llama.attention_dropout = 0.1
    assert choose_attention(config_of("auto"), llama, GPU)[0] == "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_3 does not go here: it has no dropout"):
        choose_attention(config_of("flash_attention_3"), llama, GPU)
    packages.clear()
    with pytest.raises(UserError, match="flash_attention_4 does not go here: flash-attn-4 is not installed"):
        choose_attention(config_of("flash_attention_4"), llama, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in choose_attention(config_of("auto"), family("llama"), GPU)[1]


def test_a_package_is_known_by_its_name() -> None:
    assert attention._installed("flash-attn") == (importlib.util.find_spec("flash_attn_2_cuda") is not None)
    assert attention._installed("torch")


def test_heads_of_any_model_go_through_the_trial() -> None:
    """Of its own numbers and sizes; other names for them, or none, are no failure, layers that differ are."""
    for name in ("llama", "gpt2", "t5", "mamba", "gemma3_text"):
        assert attention._kernel_problem("varlen", transformers.AutoConfig.for_model(name), CPU) is None, name
    problem = attention._kernel_problem("varlen", transformers.AutoConfig.for_model("gemma4_text"), CPU)
    assert "may vary across layers" in (problem or "")


def test_what_cannot_be_is_refused() -> None:
    for name in ("gemma3", "paligemma"):  # from left to right alone, without a word
        model = transformers.AutoConfig.for_model(name)
        with pytest.raises(UserError, match="reads images in both directions"):
            choose_attention(config_of("flash_attention_2", "image-text-to-text"), model, GPU)
    with pytest.raises(UserError, match="flex_attention does not go here: it has no backward pass"):
        choose_attention(config_of("flex_attention"), family("llama"), CPU)
    with pytest.raises(UserError, match="flash_attention_3 does not go here: it is for GPUs"):
        choose_attention(config_of("flash_attention_3"), family("llama"), CPU)
    with pytest.raises(UserError, match="model_type gpt2"):
        choose_attention(config_of("varlen"), family("gpt2"), CPU)
    with pytest.raises(UserError, match="only causal-lm"):
        choose_attention(config_of("varlen", "text-classification"), family("llama"), CPU)


@pytest.mark.matrix
def test_flex_attention_gives_the_loss_of_sdpa() -> None:
    """Compiled by inductor; forward only, since it has no backward pass on CPUs."""
    losses = []
    with torch.no_grad():
        for implementation in ("sdpa", "flex_attention"):
            model = family("llama", implementation)
            losses.append(LanguageModelLoss(model, None, implementation, CPU)(model, SEQUENCES)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
