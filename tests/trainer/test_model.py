"""The transformers config of `model.config`: what transformers itself would pass over in silence."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoder_runs import last_scores, make_config, make_workspace, run_at, same_runs

from trainer.check import check
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.failures import UserError
from trainer.model import build_model, load_model_config
from trainer.tasks.encoder import set_labels


def load(**config: Any) -> Any:
    return load_model_config(ModelConfig(config=config, tokenizer="unused"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, r"model\.config\.model_type: transformers \S+ has no 'lama'; did you mean 'llama'\?"),
        ({"model_type": "llama", "hiden_size": 8}, r"hiden_size: llama has no such key; did you mean `hidden_size`\?"),
        ({"model_type": "llama", "hidden_size": "many"}, r"model\.config: the model cannot be built"),
    ],
)
def test_slips_of_the_pen_are_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**config)


def test_keys_of_other_versions_and_of_generation_are_let_through() -> None:
    more = {"transformers_version": "4.40.0", "torch_dtype": "float32", "pretraining_tp": 1, "rope_theta": 1e4}
    assert load(model_type="llama", hidden_size=8, num_attention_heads=2, **more).hidden_size == 8
    bart = {"static_position_embeddings": False, "classif_dropout": 0.0, "forced_bos_token_id": 0, "d_model": 8}
    assert load(model_type="bart", encoder_attention_heads=2, decoder_attention_heads=2, **bart).d_model == 8


def classifier(folder: Path, labels: int) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=320, num_labels=labels, **shape, **dropout)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return model


def test_a_head_for_another_number_of_labels_is_made_anew(tmp_path: Path) -> None:
    saved = classifier(tmp_path / "model", 5)
    config = ModelConfig(path=str(tmp_path / "model"), dtype="float32")
    build = functools.partial(
        build_model, config, transformers.AutoModelForSequenceClassification, {"zero_optimization": {"stage": 2}}, None
    )
    for names in ("abc", "abcde"):
        made = build(0, functools.partial(set_labels, labels=names))
        state = saved.state_dict()
        same = {name for name, tensor in made.state_dict().items() if torch.equal(tensor, state[name])}
        anew = {"classifier.weight", "classifier.bias"} if names == "abc" else set()
        assert state.keys() - same == anew
        assert made.classifier.weight.shape == (len(names), 32)
    values = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(values | {"intermediate_size": 32}))
    for names in ("abc", "abcde"):
        with pytest.raises(
            UserError, match=r"bert\.encoder\.layer\.0\.\S+ is of another size than its config\.json says"
        ):
            build(0, functools.partial(set_labels, labels=names))


@pytest.mark.matrix
def test_a_classifier_of_other_labels_learns_alike_at_any_stage(tmp_path: Path) -> None:
    records = [{"text": f"w{n % 3} x{n % 5}", "label": "abc"[n % 3]} for n in range(120)]
    make_workspace(tmp_path, [record["text"] for record in records], train=records, test=records[:20])
    classifier(tmp_path / "model", 5)
    model = {"path": str(tmp_path / "model"), "config": None}
    config = make_config(tmp_path, {"type": "text-classification"}, model=model)
    assert check(config)["warnings"] == ["model.path has a head for 5 labels: one for the 3 of the data is made anew"]
    staged = LaunchConfig.model_validate(config.model_dump(mode="json") | {"deepspeed": {"zero_stage": 2}})
    one, two = run_at(tmp_path / "one", config, 1, 12), run_at(tmp_path / "two", staged, 2, 3)
    same_runs(one, two)
    assert last_scores(one)["accuracy"] > 0.9
