"""`dsft data`: what it shows is what a rank would train on, and it refuses what would train on nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from launcher.cli import main
from launcher.commands.data import without_repeats


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_config(folder: Path, *sources: dict[str, Any], **data: Any) -> str:
    fast = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    begin = ("<s>", fast.token_to_id("<s>"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[begin])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "a.jsonl").write_text("".join(json.dumps({"q": "ab", "a": "[c]" * (1 + n % 2)}) + "\n" for n in range(9)))
    config = {
        "name": "look",
        "task": {"type": "causal-lm"},
        "model": {"config": {"model_type": "llama", "vocab_size": 300}, "tokenizer": "tokenizer.json"},
        "data": {"train": sources, "sequence_length": 16, **data},
        "training": {"global_batch_size": 2, "max_steps": 5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


SOURCE = {"path": "a.jsonl", "columns": {"prompt": "q", "completion": "a"}}


def test_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, {**SOURCE, "weight": 3}, {**SOURCE, "weight": 1, "limit": 4})
    assert main(["data", path, "--json", "--samples", "2"]) == 0
    report = json.loads(capfd.readouterr().out)
    first, second = report["statistics"]
    assert first["samples"] == [
        [[["<s>ab", False], ["[c]</s>", True]]],
        [[["<s>ab", False], ["[c][c]</s>", True]]],
    ]
    assert (first["records"], second["records"]) == (9, 4)
    # five samples of 3 + 3 + 1 tokens, four of 3 + 6 + 1
    assert (first["tokens"], first["target_tokens"]) == (5 * 7 + 4 * 10, 5 * 4 + 4 * 7)
    assert first["sequences_per_epoch"] == 7  # two of the short ones share one, twice; no other two fit into 16
    assert first["packing_efficiency"] == pytest.approx(75 / (7 * 16))
    assert dict(first["length_histogram"]) == {2: 0, 4: 0, 6: 0, 8: 5, 10: 4, 12: 0, 14: 0, 16: 0}
    assert (first["begin_with_bos"], first["end_with_eos"]) == (1, 1)
    assert [item["share"] for item in report["statistics"]] == [0.75, 0.25]
    assert report["steps_per_epoch"] == (7 + second["sequences_per_epoch"]) / 2
    assert report["steps"] == 5
    assert [item["epochs"] for item in report["statistics"]] == [7.5 / 7, 2.5 / second["sequences_per_epoch"]]


def test_sources_with_epochs_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sources = ({**SOURCE, "epochs": 2}, {**SOURCE, "limit": 4, "epochs": "repeat"})
    path = write_config(tmp_path, *sources, packing=False)
    steps = ["--set", "training.max_steps=null", "--set", "training.epochs=1"]
    assert main(["data", path, "--json", *steps]) == 0
    report = json.loads(capfd.readouterr().out)
    # 2 x 9 of the first one; of the second a share of 4 to 18
    assert report["steps"] == pytest.approx((18 + 4) / 2)
    assert [item["epochs"] for item in report["statistics"]] == pytest.approx([2, 1])
    assert main(["data", path, "--set", "data.train.1.epochs=1"]) == 0
    assert "the training, 5." in capfd.readouterr().out
    assert main(["data", path, "--set", "data.train.1.epochs=1", "--set", "training.max_steps=50"]) == 0
    assert "data.train ends after about 11 of training.max_steps=50 steps" in capfd.readouterr().out
    assert main(["data", path, "--set", "data.train.0.epochs=0.01"]) == 2
    assert "data.train[0]: 0.01 epochs of 9 records are none" in capfd.readouterr().out
    assert main(["data", path, *steps, "--set", "data.train.0.epochs=repeat"]) == 2
    assert "every source repeats" in capfd.readouterr().err


def test_for_people(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", write_config(tmp_path, SOURCE, on_long="truncate"), "--set", "data.sequence_length=8"]) == 0
    shown = capfd.readouterr().out
    for text in ("<s>ab⟦[c]</s>⟧", "9, 9 looked at", "4 truncated", "seen and ⟦learned⟧", "100% begin"):
        assert text in shown


def test_of_a_long_record_some_pieces_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, SOURCE)
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "ab", "a": "c" * 100}) + "\n")
    assert main(["data", path, "--set", "data.sequence_length=8"]) == 0
    shown = capfd.readouterr().out
    assert shown.count("cccc") == 3
    assert "and 12 more pieces of this record" in shown


def test_tokens_of_an_image_are_counted() -> None:
    assert without_repeats("<s> <image> <image>" + " <image>" * 574 + " so <b><b>") == "<s> <image> x 576 so <b><b>"


def test_labels_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, {"path": "b.tsv", "column_names": ["text", "label"]})
    (tmp_path / "b.tsv").write_text("so so\tgood\nno\tbad\n")
    task = ["--set", "task.type=text-classification", "--set", "data.packing=false"]
    assert main(["data", path, *task]) == 0
    shown = capfd.readouterr().out
    assert 'so so\n⟦label: "good"⟧' in shown
    assert "learned   " not in shown  # a share of tokens says nothing here


def test_nothing_to_learn_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, SOURCE, sequence_length=3, on_long="truncate")
    assert main(["data", path]) == 2
    assert "none of 9 records leaves a token to learn from" in capfd.readouterr().out
    (tmp_path / "a.jsonl").write_text('{"q": 1}\n')
    assert main(["data", write_config(tmp_path, {**SOURCE, "path": "b.jsonl"}), "--json"]) == 2
    assert "there is no file" in json.loads(capfd.readouterr().out)["errors"][0]
