"""A tiny BERT's config and a WordPiece tokenizer, for tests of the tasks of encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer(folder: Path, words: list[str]) -> Path:
    """A folder with a WordPiece tokenizer whose vocabulary is these words, letters and pieces of one letter."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(97, 123)]
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *sorted(set(words) - set(letters))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    fast.add_special_tokens(list(SPECIAL))
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tiny_bert(words: int, **more: Any) -> dict[str, Any]:
    """`model.config` of a model that learns in seconds."""
    return {
        "model_type": "bert",
        "vocab_size": 57 + words,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        **more,
    }
