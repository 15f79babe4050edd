"""`dsft tokenizer train`, as users call it."""

import json
import subprocess
import sys

import pytest

from launcher.cli import main
from trainer.config.schema import ModelConfig
from trainer.tokenizer import load_tokenizer
from trainer.tokenizer_training import texts_of

TEXT = "the cat sat on a mat while rain fell over green hills and old stone walls under grey evening skies"
WORDS = TEXT.split()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30)) for i in range(1, 300)]
    path.write_text("".join(json.dumps({"id": i, "title": "no", "body": line}) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_is_usable_at_once_and_keeps_any_text(corpus, tmp_path, capfd, kind):
    output = tmp_path / "new" / f"{kind}.model"
    command = ["tokenizer", "train", "--input", str(corpus), "--vocab-size", "315", "--output", str(output)]
    assert main([*command, "--type", kind, "--column", "body", "--symbol", "<|user|>", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["pieces"] == 315
    assert report["texts"] == 299
    assert report["characters_per_token"] > 2
    tokenizer = load_tokenizer(ModelConfig(path="x", tokenizer=str(output)))
    text = "<|user|>the cat\n\tsat  on Grüße 東京 "
    ids = tokenizer.encode_batch([text])[0].tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[:1]) == "<|user|>"

    assert main(command) == 2, "a model that may be in use is not written over"
    assert "there already" in capfd.readouterr().err


def test_what_cannot_be_learned_is_an_error(corpus, tmp_path, capfd):
    output = tmp_path / "a.model"
    command = ["tokenizer", "train", "--input", str(corpus), "--output", str(output)]
    assert main([*command, "--vocab-size", "9000"]) == 2
    error = capfd.readouterr().err
    assert "cannot learn 9000 pieces" in error
    assert "<=" in error
    assert main([*command, "--vocab-size", "300", "--column", "text"]) == 2
    assert "text.jsonl, line 1: no text in it (it has 'id', 'title', 'body')" in capfd.readouterr().err
    assert main([*command[:-1], str(tmp_path / "a.bin"), "--vocab-size", "300"]) == 2
    assert list(tmp_path.iterdir()) == [corpus]


def test_records_are_spread_over_the_whole_source(corpus):
    found = list(texts_of([str(corpus)], "auto", ["body"], 3))
    lines = [json.loads(line)["body"] for line in corpus.read_text().splitlines()]
    assert found == [lines[0], lines[99], lines[199]]


def test_neither_torch_nor_transformers_is_imported(corpus, tmp_path):
    code = (
        "import sys; from trainer.tokenizer_training import main; "
        f"code = main(['--input', {str(corpus)!r}, '--vocab-size', '320', '--output', {str(tmp_path / 'b.model')!r}]); "
        "sys.exit(code or bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
