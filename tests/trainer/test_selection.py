"""What is trained: layer ranges, patterns, adapters and parameter groups; the plan counts what the model really has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from trainer.adapters import add_adapter, head_modules, piece_of, plain_name
from trainer.config.schema import ModelConfig, OptimizerConfig
from trainer.config.trained import AdapterConfig, Unfreeze
from trainer.failures import UserError
from trainer.model import build_optimizer, choose_trained
from trainer.planning.model_facts import facts_of_config
from trainer.selection import depths, layers_of, matching, select, trained_names

LLAMA = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]
T5 = [
    "shared.weight",
    "encoder.embed_positions.weight",
    *(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)),
    "encoder.final_layer_norm.weight",
    *(f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(3)),
    "decoder.final_layer_norm.weight",
    "lm_head.0.weight",
]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("layers:0-3", {0, 1, 2, 3}),
        ("layers:11", {11}),
        ("layers:9-", {9, 10, 11}),
        ("layers:-1", {0, 1}),
        ("layers:12", set()),
    ],
)
def test_ranges_of_layers(pattern: str, layers: set[int]) -> None:
    found = matching(LLAMA, pattern)
    assert {layers_of(LLAMA)[name] for name in found} == layers
    assert len(found) == 3 * len(layers)


def test_names_and_patterns() -> None:
    assert matching(LLAMA, "model.layers.1") == [
        f"model.layers.1.{p}.weight" for p in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ]
    assert len(matching(LLAMA, "*.mlp")) == 12
    assert matching(LLAMA, "lm_head.weight") == ["lm_head.weight"]
    assert matching(LLAMA, "head") == []
    assert trained_names(LLAMA, ("lm_head",), ("layers:10-", "lm_head")) == set(matching(LLAMA, "layers:10-"))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("layers:x",), r"freeze: 'layers:x' is no range of layers; write layers:0-11"),
        (("layers:-",), "is no range"),
        (("layers:12-",), r"matches no parameter .* 12 layers"),
        (("*",), "nothing is left to train"),
    ],
)
def test_what_freezes_nothing_or_everything_is_an_error(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained_names(LLAMA, patterns, ())


def test_depths_go_from_the_embeddings_over_the_layers_to_the_head() -> None:
    found, top = depths(LLAMA)
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"], found["lm_head.weight"], top) == (
        0,
        13,
        13,
        13,
    )
    assert [found[f"model.layers.{i}.norm.weight"] for i in (0, 5, 11)] == [1, 6, 12]
    found, top = depths(T5)
    assert top == 4
    assert [found[name] for name in T5] == [0, 0, 1, 2, 3, 4, 1, 2, 3, 4, 4]  # a numbered head is no layer


def make_model(model_type: str, auto_class: str = "AutoModelForCausalLM", **more: Any) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **SIZES, **more)
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_config(config)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "options", [{}, {"targets": ("layers:1",)}, {"use_dora": True}, {"modules_to_save": ("*embed_tokens",)}]
)
def test_the_plan_counts_what_an_adapter_adds(model_type: str, options: dict[str, Any]) -> None:
    if model_type == "gpt2" and options.keys() & {"use_dora", "modules_to_save"}:
        pytest.skip("its matrices lie the other way round, its embeddings have another name")
    config = AdapterConfig(rank=4, **options)
    model = make_model(model_type)
    before = sum(parameter.numel() for parameter in model.parameters())
    add_adapter(model, config, 0)
    facts = facts_of_config({"model_type": model_type, **SIZES}, adapter=config)
    assert facts.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters()) > before


def test_a_head_is_trained_beside_the_adapter_and_a_head_of_words_is_not() -> None:
    classifier = make_model("llama", "AutoModelForSequenceClassification")
    assert head_modules(classifier) == {"score"}
    add_adapter(classifier, AdapterConfig(), 0)
    own = {name for name, p in classifier.named_parameters() if p.requires_grad and piece_of(name) is None}
    assert own == {"score.weight"}
    assert head_modules(make_model("llama")) == set()
    assert not any("lm_head" in plain_name(n) for n, p in tuned("llama").named_parameters() if p.requires_grad)


def tuned(model_type: str, seed: int = 0, **options: Any) -> Any:
    model = make_model(model_type)
    add_adapter(model, AdapterConfig(**options), seed)
    return model


def test_the_adapter_comes_from_the_seed_and_changes_nothing_at_first() -> None:
    plain = make_model("llama")
    ids = torch.arange(12)[None]
    first, again, other = (tuned("llama", seed) for seed in (0, 0, 1))
    assert torch.equal(first(input_ids=ids).logits, plain(input_ids=ids).logits)
    pieces = [{n: p for n, p in model.named_parameters() if piece_of(n)} for model in (first, again, other)]
    assert all(torch.equal(pieces[0][name], pieces[1][name]) for name in pieces[0])
    assert not any(torch.equal(p, pieces[2][name]) for name, p in pieces[0].items() if "lora_A" in name)
    assert all(not p.any() for name, p in pieces[0].items() if "lora_B" in name)
    half = make_model("llama").to(torch.bfloat16)
    add_adapter(half, AdapterConfig(), 0)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"targets": ("q_prok",)}, {}, r"'q_prok' is no linear layer of the model \(it has .*q_proj"),
        ({"targets": ("lm_head",)}, {"tie_word_embeddings": True}, "lm_head is tied"),
        ({"modules_to_save": ("nothing",)}, {}, "modules_to_save: 'nothing' matches no parameter"),
        ({"modules_to_save": ("layers:0",)}, {}, "is trained as a whole"),
    ],
)
def test_adapters_that_cannot_be(options: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapter(make_model("llama", **more), AdapterConfig(**options), 0)


def test_the_config_says_what_to_do_about_contradictions() -> None:
    with pytest.raises(ValidationError, match="leave out `freeze`"):
        ModelConfig.model_validate({"path": "/m", "freeze": ["a"], "adapter": {}})
    with pytest.raises(ValidationError, match="not both"):
        OptimizerConfig.model_validate(
            {"groups": [{"match": ["a"], "learning_rate": 1.0, "learning_rate_factor": 2.0}]}
        )


def test_parameter_groups() -> None:
    model = make_model("llama")
    choose_trained(model, ModelConfig(path="/m", train_only=("layers:0-1", "lm_head", "model.norm")), 0)
    config = OptimizerConfig.model_validate(
        {
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "layer_decay": 0.5,
            "groups": [
                {"match": ["lm_head"], "learning_rate": 4e-3},
                {"match": ["*.mlp"], "learning_rate_factor": 3.0, "weight_decay": 0.7},
            ],
        }
    )
    optimizer = build_optimizer(model, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[p]: (g["lr"], g["weight_decay"], g["lr_factor"]) for g in optimizer.param_groups for p in g["params"]
    }
    expected = {
        "lm_head.weight": (4e-3, 0.1, 4.0),
        "model.norm.weight": (1e-3, 0.0, 1.0),
        "model.layers.1.mlp.up_proj.weight": (1.5e-3, 0.7, 1.5),
        "model.layers.0.mlp.up_proj.weight": (7.5e-4, 0.7, 0.75),
        "model.layers.1.self_attn.q_proj.weight": (5e-4, 0.1, 0.5),
        "model.layers.0.input_layernorm.weight": (2.5e-4, 0.0, 0.25),
    }
    for name, (rate, decay, factor) in expected.items():
        assert found[name][1] == decay, name
        assert math.isclose(found[name][0], rate), name
        assert math.isclose(found[name][2], factor), name
    assert "model.embed_tokens.weight" not in found
    with pytest.raises(UserError, match=r"groups\.0\.match: 'x' matches no parameter"):
        build_optimizer(model, OptimizerConfig.model_validate({"groups": [{"match": ["x"], "weight_decay": 0.0}]}))


def test_a_selection_of_names_that_are_not_the_models_own_is_lenient() -> None:
    assert select(LLAMA, ("x",), "key", strict=False) == set()


def test_what_is_unfrozen_later_is_in_groups_of_its_own() -> None:
    model = make_model("llama")
    rules = [
        Unfreeze.model_validate({"match": match, "from_step": step})
        for match, step in ((["layers:1-"], 10), (["layers:0-", "*embed*"], 20))
    ]
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1), rules)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group["from_step"] for group in optimizer.param_groups for p in group["params"]}
    assert found["model.layers.1.mlp.up_proj.weight"] == found["model.layers.1.input_layernorm.weight"] == 10
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.embed_tokens.weight"] == 20
    assert found["model.norm.weight"] == 1
    everything = Unfreeze.model_validate({"match": ["*"], "from_step": 2})
    with pytest.raises(UserError, match="nothing to train in the first steps"):
        build_optimizer(model, OptimizerConfig(), [everything])
    with pytest.raises(UserError, match=r"unfreeze\.0\.match: 'x' matches no parameter"):
        build_optimizer(model, OptimizerConfig(), [everything.model_copy(update={"match": ("x",)})])
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Unfreeze.model_validate({"match": ["*"], "from_step": 1})
    with pytest.raises(ValidationError, match="are AdamW's"):
        OptimizerConfig.model_validate({"type": "adafactor", "betas": (0.9, 0.99)})
