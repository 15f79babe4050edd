"""The transformers config of `model.config`: what transformers itself would pass over in silence."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.schema import ModelConfig
from trainer.failures import UserError
from trainer.model import load_model_config


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
