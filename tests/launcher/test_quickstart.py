"""The quickstart's corpus and tokenizer. Its whole run is proved where launching is (slow: minutes)."""

import ast
import json
from pathlib import Path

import pytest
import sentencepiece

from launcher.quickstart import (
    HELD_OUT_EVERY,
    Pair,
    build_corpus,
    functions,
    standard_library_pairs,
)
from launcher.resources import starter_config
from trainer.failures import UserError
from trainer.tokenizer_training import PAD_ID, train_sentencepiece

SOURCE = '''\
class Shape:
    @property
    def area(self, unit="m2"):
        """The area.

        In square metres."""
        # a comment stays
        side = self.side

        return side * side

    def undocumented(self):
        return 1

    def only_docstring(self):
        """Nothing to learn here."""

    def outdented(self):
        """Cutting the indentation would
change this docstring."""
        return 2

    def one_line(self): "A docstring on the line of def."; return 1


async def fetch(url):
    \'\'\'Fetch it.\'\'\'
    return await get(url)
'''


def test_functions_are_cut_after_their_docstrings() -> None:
    found = dict(sorted(functions(SOURCE)))
    area = 'def area(self, unit="m2"):\n    """The area.\n\n    In square metres."""\n'
    assert found == {
        area: "    # a comment stays\n    side = self.side\n\n    return side * side\n",
        "async def fetch(url):\n    '''Fetch it.'''\n": "    return await get(url)\n",
    }


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Pair], list[Pair]]:
    return standard_library_pairs()


def test_this_library_gives_the_same_real_pairs_each_time(pairs: tuple[list[Pair], list[Pair]]) -> None:
    train, held_out = pairs
    assert (train, held_out) == standard_library_pairs()
    assert len(train) > 2000
    assert len(held_out) > 50
    assert not {pair.module for pair in train} & {pair.module for pair in held_out}, "a module is on one side only"
    for pair in [*train, *held_out]:
        ast.parse(pair.prompt + pair.completion)
    assert any(pair.module == "json.decoder" for pair in train + held_out)


def test_a_library_without_sources_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(SOURCE)
    with pytest.raises(UserError, match=r"holds only 2 functions .* at least 500"):
        standard_library_pairs(tmp_path)


def test_broken_modules_are_passed_over_and_whole_modules_held_out(tmp_path: Path) -> None:
    for index in range(HELD_OUT_EVERY + 1):
        text = "".join(f'def f{index}_{k}():\n    """Return it."""\n    return {index}, {k}\n' for k in range(30))
        (tmp_path / f"m{index:02d}.py").write_text(text)
    (tmp_path / "z_template.py").write_text("def $name():\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_m.py").write_text((tmp_path / "m05.py").read_text().replace("f5", "g5"))
    train, held_out = standard_library_pairs(tmp_path)
    assert {pair.module for pair in held_out} == {"m00", f"m{HELD_OUT_EVERY:02d}"}
    assert len(train) == 30 * (HELD_OUT_EVERY - 1)


def test_corpus_and_tokenizer_fit_the_starter_config(tmp_path: Path) -> None:
    config = json.loads(starter_config("quickstart").read_text())
    model = config["model"]["config"]
    data = tmp_path / "data"
    train_count, held_out_count = build_corpus(data, model["vocab_size"])
    names = sorted(path.name for path in data.iterdir())
    assert names == ["held_out.jsonl", "tokenizer.model", "train.jsonl"], "nothing half-written stays"

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    assert tokenizer.get_piece_size() == model["vocab_size"]
    ids = (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id())
    assert ids == (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, PAD_ID)

    records = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert len(records) == train_count
    lengths = []
    for record in records[::10]:
        text = record["prompt"] + record["completion"]
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded) == text, "indentation and newlines survive"
        lengths.append(len(encoded))
    assert sum(length < config["data"]["sequence_length"] for length in lengths) > 0.95 * len(lengths)

    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    assert build_corpus(data, model["vocab_size"]) == (train_count, held_out_count)
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == before, "what is there is kept"


def test_tokenizer_training_is_deterministic_and_keeps_any_text(
    pairs: tuple[list[Pair], list[Pair]], tmp_path: Path
) -> None:
    train, _ = pairs
    for name in ("a.model", "b.model"):
        train_sentencepiece((pair.prompt + pair.completion for pair in train[:400]), 600, tmp_path / name)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    text = "\n  x = 'Grüße 東京'\t# \n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_starter_config_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"`quickstat`.*there are: .*quickstart"):
        starter_config("quickstat")
