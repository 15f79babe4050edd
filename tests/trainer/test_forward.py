"""Collation of packed sequences, and the loss at labelled positions alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import trainer.loss
from trainer.data.sample import PackedSequence, Sample
from trainer.failures import UserError
from trainer.forward import LanguageModelLoss, collate
from trainer.loss import _add_product
from trainer.planning.layouts import PLAIN_LOGITS, has_plain_logits
from trainer.planning.memory import LOGIT_BLOCK

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def sample(tokens: list[int], targets: list[int]) -> Sample:
    return Sample(np.array(tokens, dtype=np.int32), np.array(targets, dtype=bool))


SEQUENCES = [
    PackedSequence((sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1]))),
    PackedSequence((sample([10, 11, 12, 13, 14, 15, 16, 17, 18], [0, 0, 0, 0, 1, 0, 0, 0, 1]),)),
]


def test_rows_are_padded_and_positions_restart() -> None:
    batch = collate(SEQUENCES, 0, False, CPU)
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9] + [0] * 11
    assert batch.position_ids[0].tolist() == [0, 1, 2, *range(13)]
    assert batch.position_ids[1].tolist() == list(range(16))
    assert batch.positions.tolist()[:5] == [0, 1, 3, 16 + 3, 16 + 7]
    assert batch.labels.tolist() == [6, 7, 9, 14, 18] + [-100] * 123
    assert batch.padded_tokens == 32 - 14


def test_one_row_has_no_padding() -> None:
    batch = collate(SEQUENCES, 0, True, CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, *range(10, 19)]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, *range(9)]]
    assert batch.positions.tolist()[:5] == [0, 1, 3, 5 + 3, 5 + 7]
    assert batch.labels.tolist()[:5] == [6, 7, 9, 14, 18]
    assert batch.padded_tokens == 0


@pytest.mark.parametrize("one_row", [False, True])
def test_a_batch_without_work_still_has_a_row(one_row: bool) -> None:
    batch = collate([], 0, one_row, CPU)
    assert batch.input_ids.shape == (1, 8)
    assert batch.padded_tokens == 8
    assert len(batch.labels) == len(batch.positions) == 0


def llama(attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=attention))


def gemma2(attention: str) -> Any:
    # it scales and soft-caps its logits and has sliding windows: the hook before the head must not disturb any of it
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=4, final_logit_softcapping=2.0, attn_implementation=attention)
    )


@pytest.mark.parametrize(
    ("build", "attention", "fused"),
    [(llama, "sdpa", False), (llama, "eager", False), (gemma2, "eager", False), (llama, "sdpa", True)],
)
def test_packed_loss_and_gradients_equal_one_sample_at_a_time(
    build: Callable[[str], Any], attention: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGIT_BLOCK, "cpu", 3 * SMALL["vocab_size"])  # three positions a block
    torch.manual_seed(0)
    model = build(attention).train()
    expected = torch.zeros(())
    for row in SEQUENCES:
        for one in row.samples:
            ids = torch.from_numpy(one.tokens.astype("int64"))
            labels = torch.where(torch.from_numpy(one.targets), ids, -100)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            expected = expected + functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss, _ = LanguageModelLoss(model, None, attention, CPU, fused=fused)(model, SEQUENCES)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-6)


def test_the_fused_loss_is_proved_on_the_model() -> None:
    objective = LanguageModelLoss(llama("sdpa"), None, "sdpa", CPU, fused=True)
    objective.check(Plain(objective._model))
    assert objective._fused
    capped = LanguageModelLoss(gemma2("eager"), None, "eager", CPU, fused=True)
    with pytest.raises(UserError, match=r"model\.fused_loss does not go here: Gemma2ForCausalLM changes the logits"):
        capped.check(Plain(capped._model))
    odd = llama("sdpa")
    odd.lm_head = type("Scaled", (torch.nn.Linear,), {})(SMALL["hidden_size"], SMALL["vocab_size"])
    with pytest.raises(UserError, match="the head is a Scaled"):
        LanguageModelLoss(odd, None, "sdpa", CPU, fused=True)


def test_a_fused_loss_that_nobody_insists_on_is_left_out_where_it_does_not_go(capsys: Any) -> None:
    capped = LanguageModelLoss(gemma2("eager"), None, "eager", CPU, fused=True, insists=False)
    capped.check(Plain(capped._model))
    assert not capped._fused
    assert "model.fused_loss: left out: Gemma2ForCausalLM changes the logits" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*PLAIN_LOGITS, "gemma2"}))
def test_families_said_to_have_plain_logits_have(name: str) -> None:
    import transformers

    scaled: dict[str, Any] = {"granite": {"logits_scaling": 8.0}, "gemma3_text": {"final_logit_softcapping": 2.0}}
    experts = {"num_experts": 2, "num_local_experts": 2, "n_routed_experts": 4, "num_experts_per_tok": 1}
    experts |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    for options in ({}, {**scaled, "granitemoe": scaled["granite"]}.get(name, {})):
        sizes = {**SMALL, **experts, "head_dim": 8, "pad_token_id": 0, **options}
        config = transformers.AutoConfig.for_model(name, **sizes)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(30)  # logits that soft-capping changes
        loss = LanguageModelLoss(model, None, "eager", CPU, packing=False, fused=True, insists=False)
        loss.check(Plain(model))
        assert has_plain_logits(config.to_dict()) == has_plain_logits({"model_type": name, **options}) == loss._fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_in_fp32(dtype: torch.dtype) -> None:
    for device in [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        left, right = (torch.randn(shape).to(device, dtype) for shape in ((24, 40), (40, 16)))
        total = torch.randn(24, 16, device=device)
        expected = total.double() + left.double() @ right.double()
        _add_product(total, left, right)
        torch.testing.assert_close(total.double(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_without_targets_the_fused_loss_still_reaches_the_head() -> None:
    model = llama("sdpa")
    loss, _ = LanguageModelLoss(model, None, "sdpa", CPU, fused=True)(model, [])
    loss.backward()
    assert float(loss.detach()) == 0
    assert not model.lm_head.weight.grad.any()


def test_evaluations_make_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(trainer.loss, "_add_product", lambda *_: made.append(1))
    model = llama("sdpa")
    objective = LanguageModelLoss(model, None, "sdpa", CPU, fused=True)
    with torch.no_grad():
        objective(model, SEQUENCES)
    assert not made
    objective(model, SEQUENCES)
    assert made


class Plain:
    """The part of an engine that the checks use."""

    def __init__(self, model: Any) -> None:
        self.probe = model


def test_isolation_holds_for_a_model_that_honours_positions() -> None:
    model = llama("sdpa")
    LanguageModelLoss(model, None, "sdpa", CPU).check_sight(Plain(model))


def test_a_model_that_mixes_packed_samples_is_refused() -> None:
    model = llama("sdpa")

    def mixing(**inputs: Any) -> Any:  # an all-ones mask switches off transformers' detection of packed sequences
        return model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))

    engine = Plain(model)
    engine.probe = mixing
    with pytest.raises(UserError, match=r"data\.packing"):
        LanguageModelLoss(model, None, "sdpa", CPU).check_sight(engine)


@pytest.mark.parametrize("kind", ["compressed_sparse_attention", "heavily_compressed_attention"])
def test_a_model_that_sums_up_many_packed_tokens_is_refused(kind: str) -> None:
    """What it sums up, 4 or 128 tokens at a time, is seen only by tokens that come later."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {**SMALL, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 8, "moe_intermediate_size": 8}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "layer_types": [kind] * 2}
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**sizes)).eval()
    LanguageModelLoss(model, None, "eager", CPU, packing=False).check_sight(Plain(model))
    with pytest.raises(UserError, match=r"data\.packing"):
        LanguageModelLoss(model, None, "eager", CPU).check_sight(Plain(model))


@pytest.mark.parametrize("seed", [0, 2])
def test_a_leak_that_weighs_next_to_nothing_is_found_by_other_tokens(seed: int) -> None:
    """Convolutions of small random weights, over the end of the sample before."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    kinds = ["conv", "full_attention", "conv"]
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, layer_types=kinds))
    with pytest.raises(UserError, match=r"data\.packing"):
        LanguageModelLoss(model.eval(), None, "sdpa", CPU).check_sight(Plain(model))


@pytest.mark.parametrize("packing", [True, False])
def test_an_encoder_that_loads_as_a_causal_model_is_refused(packing: bool) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = BertLMHeadModel(BertConfig(**sizes, intermediate_size=32)).eval()
    objective = LanguageModelLoss(model, None, "sdpa", CPU, packing)
    with pytest.raises(UserError, match="BertLMHeadModel lets tokens see those that come after them"):
        objective.check_sight(Plain(model))
    decoder = BertLMHeadModel(BertConfig(**sizes, intermediate_size=32, is_decoder=True)).eval()
    LanguageModelLoss(decoder, None, "sdpa", CPU, packing=False).check_sight(Plain(decoder))


def test_a_model_that_predicts_several_tokens_at_once_is_refused() -> None:
    from transformers import ProphetNetConfig, ProphetNetForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    model = ProphetNetForCausalLM(ProphetNetConfig(**sizes, decoder_ffn_dim=16)).eval()
    with pytest.raises(UserError, match="ProphetNetForCausalLM has no head that takes one vector a token"):
        LanguageModelLoss(model, None, "eager", CPU).check_sight(Plain(model))


@pytest.mark.parametrize("asked", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_config_that_asks_for_attention_both_ways_is_refused(asked: dict[str, bool]) -> None:
    """varlen is causal whatever a config says, and other readers of the export are not."""
    model = llama("sdpa")
    model.config.update(asked)
    with pytest.raises(UserError, match="lets tokens see those that come after them"):
        LanguageModelLoss(model, None, "sdpa", CPU).check_sight(Plain(model))


def test_rows_of_constant_length() -> None:
    for one_row in (False, True):
        shapes = {
            collate(some, 0, one_row, CPU, row_length=32).input_ids.shape[1] for some in (SEQUENCES, SEQUENCES[:1], [])
        }
        assert shapes == {32}
    torch.manual_seed(0)
    model = llama("sdpa")
    loss = LanguageModelLoss(model, None, "sdpa", CPU)
    expected = loss(model, SEQUENCES)[0]
    loss.row_length = 32
    torch.testing.assert_close(loss(model, SEQUENCES)[0], expected, rtol=1e-6, atol=0)
