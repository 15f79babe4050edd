"""More tokens than the model knows: rows are added to its embeddings (`model.resize_embeddings`)."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config.schema import ModelConfig
from trainer.tokenizer import load_tokenizer

_MULTIPLE = 64  # sizes that tensor cores like


def wanted_vocabulary(config: ModelConfig, model_config: Any) -> int | None:
    """Rows that the embeddings are to have, None where they are to stay as they are."""
    if not config.resize_embeddings:
        return None
    tokens = load_tokenizer(config).vocab_size
    return None if tokens <= model_config.get_text_config().vocab_size else -(-tokens // _MULTIPLE) * _MULTIPLE


def resize_embeddings(model: Any, config: ModelConfig) -> None:
    """Add the rows that the tokenizer needs, each the mean of those there are (Hewitt 2021).

    Nothing is drawn: they are the same at any world size. Every rank must make the call; under ZeRO-3 each then holds
    the embeddings as a whole until the engine is made.
    """
    size = wanted_vocabulary(config, model.config)
    if size is None:
        return
    before = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if values is not None:
                with torch.no_grad():
                    values[before:] = values[:before].float().mean(0).to(values.dtype)
