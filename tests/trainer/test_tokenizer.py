"""Tokenizers of every form give the ids of their own libraries, and exports that AutoTokenizer reads alike."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from trainer.config.schema import ModelConfig
from trainer.failures import DataError
from trainer.tokenizer import load_tokenizer

ALPHABET = list("abc  \n\tXYZ.,'é½日本🙂\u00a0\u3000ﬁ<s></s>")


def texts(count: int) -> list[str]:
    choose = random.Random(5)
    corpus = Path(random.__file__).read_text(encoding="utf-8")
    made = ["", " ", "  two  spaces ", "\n\nnew\n lines\n"]
    for _ in range(count):
        start = choose.randrange(len(corpus) - 200)
        made.append(corpus[start : start + choose.randint(1, 200)])
        made.append("".join(choose.choice(ALPHABET[:-7]) for _ in range(choose.randint(0, 20))))
    return made


def train_sentencepiece(folder: Path, kind: str, byte_fallback: bool, rule: str) -> Path:
    keep_spaces = rule == "identity"
    sentencepiece.SentencePieceTrainer.train(
        input=random.__file__,
        model_prefix=str(folder / "spm"),
        vocab_size=700,
        model_type=kind,
        byte_fallback=byte_fallback,
        normalization_rule_name=rule,
        remove_extra_whitespaces=not keep_spaces,
        allow_whitespace_only_pieces=keep_spaces,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "spm.model"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_sentencepiece(tmp_path: Path, kind: str, byte_fallback: bool, rule: str) -> None:
    path = train_sentencepiece(tmp_path, kind, byte_fallback, rule)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(ModelConfig(path="unused", tokenizer=str(path)))
    scores = [reference.get_score(token) for token in range(reference.get_piece_size())]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.vocab_size == reference.get_piece_size()
    ties = 0
    for text in texts(200):
        expected = reference.encode(text)
        found = tokenizer.encode_batch([text])[0].tolist()
        if kind == "unigram" and found != expected:  # another segmentation of the same likelihood
            assert sum(scores[i] for i in found) == pytest.approx(sum(scores[i] for i in expected), rel=1e-6)
            ties += 1
        else:
            assert found == expected
        if reference.unk_id() not in expected:
            assert tokenizer.decode(found) == reference.decode(expected)
    assert ties < 20


def test_an_export_gives_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = train_sentencepiece(tmp_path, "bpe", True, "identity")
    tokenizer = load_tokenizer(ModelConfig(path="unused", tokenizer=str(path)))
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    tokenizer.save(folders[0])
    again = load_tokenizer(ModelConfig(path=str(folders[0])))  # a folder, now with tokenizer.json
    assert (again.bos_id, again.eos_id, again.vocab_size) == (1, 2, tokenizer.vocab_size)
    again.save(folders[1])
    alone = load_tokenizer(ModelConfig(path="unused", tokenizer=str(folders[0] / "tokenizer.json")))
    for folder in folders:
        loaded = AutoTokenizer.from_pretrained(folder)
        assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
        for text in texts(50):
            ids = tokenizer.encode_batch([text])[0].tolist()
            assert loaded(text)["input_ids"] == [1, *ids]
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids
            assert again.encode_batch([text])[0].tolist() == ids
            assert alone.encode_batch([text])[0].tolist() == ids


def test_a_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = train_sentencepiece(tmp_path / "a", "bpe", True, "identity")
    other = train_sentencepiece(tmp_path / "b", "unigram", True, "identity")
    copy = tmp_path / "copy.model"
    copy.write_bytes(one.read_bytes())
    prints = [load_tokenizer(ModelConfig(path="", tokenizer=str(p))).fingerprint() for p in (one, copy, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_that_does_not_begin_texts_has_no_bos(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<|end|>": 2}, unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|end|>", eos_token="<|end|>")
    wrapped.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)


@pytest.mark.parametrize("name", ["broken.model", "tokenizer.json", "empty"])
def test_what_is_no_tokenizer_is_said_to_be_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    else:
        path.write_text("{}")
    with pytest.raises(DataError, match=r"model\.tokenizer: the tokenizer of .* cannot be loaded"):
        load_tokenizer(ModelConfig(path="unused", tokenizer=str(path)))


def test_a_model_folder_without_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match=f"{tmp_path} has no tokenizer: put the files of the model's own there"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_tokenizer_that_transformers_makes_is_a_fast_one_as_well(tmp_path: Path) -> None:
    """Of a folder without tokenizer.json, or of the hub."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "##s"]))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    ((tokens, starts),) = tokenizer.encode_with_starts(["a goods"])
    assert (tokens.tolist(), starts.tolist()) == ([5, 6, 7], [0, 2, 6])
    assert tokenizer.backend.encode("a", "good").ids == [2, 5, 3, 6, 3]


def test_of_no_texts_no_tokens_begin(tmp_path: Path) -> None:
    """As where every conversation of a window is bad."""
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer.encode_with_starts([]) == []
    assert [ids.tolist() for ids, _ in tokenizer.encode_with_starts(["aa"])] == [[0, 0]]


def test_light_forms_do_not_import_transformers(tmp_path: Path) -> None:
    import subprocess

    path = train_sentencepiece(tmp_path, "bpe", True, "identity")
    program = (
        "import sys; from trainer.config.schema import ModelConfig; from trainer.tokenizer import load_tokenizer; "
        f"load_tokenizer(ModelConfig(path='x', tokenizer={str(path)!r})).encode_batch(['a']); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
