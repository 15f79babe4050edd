"""Model facts without torch, held against the real models of transformers on the meta device."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trainer.config.schema import ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.planning import memory
from trainer.planning.layouts import FAMILIES, parameter_shapes
from trainer.planning.model_facts import facts_of_config, model_facts, safetensors_shapes

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0}
VARIANTS = [
    {},
    {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2},
    {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {**SMALL, "num_key_value_heads": 1, "head_dim": 32, "attention_bias": False},
]


def real_parameters(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_names_and_shapes_are_those_of_the_real_model(model_type):
    for variant in VARIANTS:
        config = {"model_type": model_type, **variant}
        if model_type in ("gpt_neox", "phi3") and "head_dim" in variant:
            continue  # these have no such setting
        real = real_parameters(config)
        assert dict(parameter_shapes(config)) == real, variant
        facts = facts_of_config(config)
        assert facts.parameters == facts.trainable_parameters == sum(torch.Size(s).numel() for s in real.values())


def test_gpt2_under_its_own_names():
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "n_inner": 40}
    assert dict(parameter_shapes(config)) == real_parameters(config)
    assert facts_of_config(config).lookup_parameters == 16 * 32  # positions; the tied embedding is the head


def test_frozen_parameters_are_counted():
    config = {"model_type": "llama", **SMALL, "intermediate_size": 96}
    layer = sum(torch.Size(s).numel() for n, s in real_parameters(config).items() if n.startswith("model.layers.0."))
    facts = facts_of_config(config, ("model.layers.0",))
    assert facts.parameters - facts.trainable_parameters == layer == facts.largest_block
    with pytest.raises(UserError, match="matches no parameter"):
        facts_of_config(config, ("model.layer.0",))
    with pytest.raises(UserError, match="nothing is left"):
        facts_of_config(config, ("*",))


def test_patterns_of_the_optimizer_are_checked_where_all_names_are_known():
    model = ModelConfig(config={"model_type": "llama", **SMALL, "intermediate_size": 96}, tokenizer="none")
    key = "training.unfreeze.0.match"
    assert model_facts(model, {key: ("layers:0-1", "*.q_proj", "lm_head")}).parameters
    with pytest.raises(UserError, match=rf"{key}: 'layers:2' matches no parameter .* 2 layers"):
        model_facts(model, {key: ("layers:0", "layers:2")})
    adapted = model.model_copy(update={"adapter": AdapterConfig()})
    assert model_facts(adapted, {key: ("*lora_B*",)}).parameters
    with pytest.raises(UserError, match=rf"{key}: of what it matches nothing is trained"):
        model_facts(model.model_copy(update={"freeze": ("layers:0",)}), {key: ("layers:0",)})


@pytest.mark.parametrize(
    ("tied", "section", "trained"),
    [
        (False, {}, True),
        (True, {}, True),
        (False, {"freeze": ("lm_head",)}, False),
        (True, {"freeze": ("*embed*",)}, False),
        (False, {"adapter": AdapterConfig()}, False),
        (False, {"adapter": AdapterConfig(modules_to_save=("lm_head",))}, True),
    ],
)
def test_only_a_head_that_is_trained_has_a_gradient(tied, section, trained):
    facts = facts_of_config({"model_type": "llama", **SMALL, "tie_word_embeddings": tied}, **section)
    assert facts.trained_head == trained
    gradient = (4 + 2 * 2) * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert memory.fused_logit_bytes(facts, 8, 2, "cpu") == (2 * 2 + 12) * 8 * SMALL["vocab_size"] + gradient * trained


def test_a_new_head_is_known_to_the_model_alone():
    """And the one that it replaces is not there."""
    model = ModelConfig(
        config={"model_type": "llama", **SMALL, "intermediate_size": 96, "tie_word_embeddings": False},
        tokenizer="none",
        train_only=("score", "layers:1"),
    )
    facts = model_facts(model, {"training.optimizer.groups.0.match": ("score",)}, new_head=True)
    with torch.device("meta"):
        real = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**model.config))
    assert facts.parameters == sum(p.numel() for name, p in real.named_parameters() if name != "score.weight")
    assert facts.lookup_parameters == real.model.embed_tokens.weight.numel()


def test_lists_of_sizes_of_a_family_that_is_not_known_are_none():
    """As LeViT's, one for each stage."""
    facts = facts_of_config({"model_type": "levit", "hidden_sizes": [128, 256], "num_attention_heads": [4, 8]})
    assert (facts.heads, facts.kv_heads, facts.parameters) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, r'hidden_size: found "64"; expected a positive integer'),
        ({"vocab_size": 0}, "vocab_size: found 0"),
        ({"max_position_embeddings": [512]}, r"max_position_embeddings: found \[512\]"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"model_type": "mistral"}, "num_key_value_heads 8 .the default"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(UserError, match=message):
        facts_of_config({"model_type": "llama", **SMALL, **change})


def test_an_unknown_family_is_said_to_be_unknown():
    facts = facts_of_config({"model_type": "rwkv9", "hidden_size": 8})
    assert facts.parameters is None
    assert facts.source == "unknown"
    assert "rwkv9" in facts.note


def test_an_unknown_family_is_counted_from_its_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv9", "hidden_size": 8}))
    save_file({"a.0.w": torch.zeros(3, 4), "a.0.b": torch.zeros(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a.1.w": torch.zeros(5, 4)}, tmp_path / "model-00002-of-00002.safetensors")
    facts = model_facts(ModelConfig(path=str(tmp_path), freeze=("a.1",)))
    assert (facts.parameters, facts.trainable_parameters, facts.largest_block) == (36, 16, 20)
    assert facts.source == "safetensors"
    assert safetensors_shapes(tmp_path)["a.0.w"] == (3, 4)
    (tmp_path / "model-00003-of-00002.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        model_facts(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("glm4_moe", {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ],
)
def test_a_token_runs_through_some_experts_alone(family, experts, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SMALL, "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **experts))
    model.save_pretrained(tmp_path)
    facts = model_facts(ModelConfig(path=str(tmp_path)))
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert facts.idle_parameters == inside * 6 // 8
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": None}))
    assert model_facts(ModelConfig(path=str(tmp_path))).idle_parameters is None


def test_an_encoder_multiplies_with_no_embedding_and_has_no_logits(tmp_path):
    """As a classifier; as a language model it would, with the embedding as its head."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8, "vocab_size": 100}))
    words = {"bert.embeddings.word_embeddings.weight": torch.zeros(100, 8), "bert.encoder.layer.0.w": torch.zeros(4)}
    save_file(words, tmp_path / "model.safetensors")
    model = ModelConfig(path=str(tmp_path))
    assert [model_facts(model, new_head=new).lookup_parameters for new in (True, False)] == [800, 0]
    assert [model_facts(model, new_head=new).vocabulary for new in (True, False)] == [None, 100]


def test_of_a_model_with_images_the_sizes_of_both_parts_are_known(tmp_path):
    """Those that its config leaves out are its text model's defaults; a tower that is frozen keeps nothing."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 16}
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 4}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
    save_file({"vision_tower.w": torch.zeros(9), "language_model.w": torch.zeros(5)}, tmp_path / "model.safetensors")
    whole, frozen = (model_facts(ModelConfig(path=str(tmp_path), freeze=names)) for names in ((), ("*vision_tower*",)))
    assert (whole.model_type, whole.hidden_size, whole.layers, whole.vocabulary) == ("llava", 4096, 4, 32000)
    assert (whole.tower.layers, whole.trainable_parameters, frozen.tower, frozen.trainable_parameters) == (
        3,
        14,
        None,
        5,
    )
    kept = [
        memory.activation_bytes(facts, 100, 100, 2, memory.Recomputation(1), "sdpa")
        for facts in (whole, frozen, whole.tower)
    ]
    assert kept[0] == kept[1] + kept[2]


@pytest.mark.parametrize(
    ("config", "tower", "patches"),
    [
        ({"model_type": "llava"}, {"hidden_size": 8, "num_hidden_layers": 3}, 1),
        ({"model_type": "smolvlm", "scale_factor": 3}, {"hidden_size": 8, "num_hidden_layers": 3}, 9),
        ({"model_type": "qwen2_vl"}, {"hidden_size": 64, "embed_dim": 8, "depth": 3, "spatial_merge_size": 2}, 4),
        ({"model_type": "internvl", "downsample_ratio": 0.5}, {"hidden_size": 8, "num_hidden_layers": 3}, 4),
        (
            {"model_type": "gemma3", "mm_tokens_per_image": 256},
            {"hidden_size": 8, "num_hidden_layers": 3, "image_size": 896, "patch_size": 14},
            16,
        ),
    ],
)
def test_how_much_a_tower_reads_of_an_image(config, tower, patches):
    facts = facts_of_config({**config, "text_config": {"model_type": "llama"}, "vision_config": tower})
    assert (facts.tower.hidden_size, facts.tower.layers, facts.patches_per_token) == (8, 3, patches)


def test_names_in_files_of_qwen_are_those_of_its_model(tmp_path):
    """Files of Qwen2-VL and Qwen2.5-VL have the text model's layers at model.layers."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": {"depth": 2}}))
    names = ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.mlp.fc1.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "model.safetensors")
    adapter = AdapterConfig(rank=2, targets=["*language_model*.q_proj"])
    assert model_facts(ModelConfig(path=str(tmp_path), adapter=adapter)).trainable_parameters == 16
    facts = model_facts(ModelConfig(path=str(tmp_path), freeze=("*language_model*",)))
    assert (facts.trainable_parameters, facts.tower.layers) == (16, 2)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        model_facts(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"has no config\.json"):
        model_facts(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        model_facts(ModelConfig(path=str(tmp_path)))


def test_a_hub_id_is_looked_up_in_the_cache_only(tmp_path, monkeypatch):
    assert "hf download nobody/nothing" in model_facts(ModelConfig(path="nobody/nothing")).note
    snapshot = tmp_path / "models--some--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model/refs").mkdir()
    (tmp_path / "models--some--model/refs/main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_facts(ModelConfig(path="some/model")).hidden_size == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 64},
        {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 64},
        {"model_type": "gpt2", "n_inner": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ],
    ids=lambda config: config["model_type"],
)
def test_activations_are_close_to_what_autograd_keeps(config, dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = {**sizes, "vocab_size": 1000, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.base_model(input_ids=ids, use_cache=False)
    width = 2 if dtype == "bfloat16" else 4
    estimated = memory.activation_bytes(facts_of_config(config), 512, 256, width, memory.Recomputation(0), "sdpa")
    assert 0.85 <= estimated / sum(kept.values()) <= 1.35, output.last_hidden_state.shape


def test_an_adapter_is_counted_and_its_base_left_out_of_checkpoints(tmp_path):
    config = {"model_type": "llama", **SMALL, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = model_facts(ModelConfig(path=str(tmp_path)))
    lora = model_facts(
        ModelConfig.model_validate({"path": str(tmp_path), "adapter": {"rank": 2, "targets": ["q_proj"]}})
    )
    hidden, queries = SMALL["hidden_size"], dict(parameter_shapes(config))["model.layers.0.self_attn.q_proj.weight"][0]
    assert lora.trainable_parameters == 2 * (hidden + queries) * SMALL["num_hidden_layers"]
    assert lora.parameters == plain.parameters + lora.trainable_parameters
    assert not lora.pinned
    save_file({"model.norm.weight": torch.ones(hidden)}, tmp_path / "model.safetensors")
    assert model_facts(ModelConfig(path=str(tmp_path), freeze=("layers:0",))).pinned


def test_an_adapter_on_the_head_keeps_its_logits():
    config = {"model_type": "llama", **SMALL, "tie_word_embeddings": False}
    assert facts_of_config(config, adapter=AdapterConfig(type="lora")).plain_logits
    assert not facts_of_config(config, adapter=AdapterConfig(type="lora", targets=("lm_head",))).plain_logits
