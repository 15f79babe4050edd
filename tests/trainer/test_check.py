"""The preflight of data and tokenizer, and the masks of causal-lm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from trainer.check import check
from trainer.config.schema import LaunchConfig
from trainer.config.trained import AdapterConfig
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_config(tmp_path: Path, records: list[dict[str, Any]], vocab_size: int = 10, **data: Any) -> LaunchConfig:
    """A config over `records`, with a tokenizer of words: <s> 1, </s> 2, a 3, b 4, c 5."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<s>", "</s>"])
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return LaunchConfig.model_validate(
        {
            "name": "run",
            "task": {"type": "causal-lm"},
            "model": {
                "config": {"model_type": "llama", "vocab_size": vocab_size},
                "tokenizer": str(tmp_path / "tokenizer.json"),
            },
            "data": {"train": [{"path": str(source)}], "sequence_length": 8, **data},
            "training": {"global_batch_size": 2, "max_steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("record", "tokens", "learned"),
    [
        ({"text": "a b"}, [1, 3, 4, 2], [0, 1, 1, 1]),
        ({"prompt": "a b", "completion": "c"}, [1, 3, 4, 5, 2], [0, 0, 0, 1, 1]),
        ({"prompt": "", "completion": "c"}, [1, 5, 2], [0, 1, 1]),
        # texts that bring their own special tokens do not get them twice
        ({"text": "<s> a </s>"}, [1, 3, 2], [0, 1, 1]),
        ({"prompt": "<s> a", "completion": "b </s>"}, [1, 3, 4, 2], [0, 0, 1, 1]),
        ({"prompt": "", "completion": "<s> c"}, [1, 5, 2], [0, 1, 1]),
        # by position: an end of text inside the prompt is not learned, one inside the completion is
        ({"prompt": "a </s>", "completion": "</s> b"}, [1, 3, 2, 2, 4, 2], [0, 0, 0, 1, 1, 1]),
        ({"prompt": "a", "completion": ""}, [1, 3, 2], [0, 0, 0]),
    ],
)
def test_masks(tmp_path: Path, record: dict[str, str], tokens: list[int], learned: list[int]) -> None:
    config = make_config(tmp_path, [record])
    (sample,) = get_task(config, load_tokenizer(config.model)).encode([record])
    assert sample.tokens.tolist() == tokens
    assert sample.targets.astype(int).tolist() == learned


def test_good_data_passes_with_its_figures(tmp_path: Path) -> None:
    report = check(make_config(tmp_path, [{"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"}]))
    assert report["ok"], report
    (figures,) = report["statistics"]
    assert (figures["records"], figures["tokens"], figures["target_tokens"]) == (2, 10, 5)


def test_what_would_train_on_nothing_is_refused(tmp_path: Path) -> None:
    report = check(make_config(tmp_path, [{"prompt": "a a a a a a a a a", "completion": "b"}], on_long="truncate"))
    assert not report["ok"]
    assert "leaves a token to learn from" in report["errors"][0]


def test_vocabulary_beyond_the_model_is_refused(tmp_path: Path) -> None:
    report = check(make_config(tmp_path, [{"text": "a"}], vocab_size=4))
    assert not report["ok"]
    assert "6 ids" in report["errors"][0]


def test_qlora_without_bitsandbytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, [{"text": "a b"}])
    (tmp_path / "config.json").write_text(json.dumps(config.model.config))
    changed = {"config": None, "path": str(tmp_path), "adapter": AdapterConfig(type="qlora")}
    config = config.altered(model=changed)
    assert check(config)["ok"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    report = check(config)
    assert (report["ok"], report["class"]) == (False, "user")
    assert "pip install bitsandbytes" in report["errors"][0]


def test_fp8_without_torchao_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, [{"text": "a b"}])
    config = config.altered(model={"compile": True, "fp8": "rowwise"})
    assert check(config)["ok"]
    monkeypatch.setitem(sys.modules, "torchao", None)
    report = check(config)
    assert (report["ok"], report["class"]) == (False, "user")
    assert "pip install torchao" in report["errors"][0]


def test_command_line_names_each_bad_source_and_never_imports_torch(tmp_path: Path) -> None:
    config = make_config(tmp_path, [{"text": "a"}, {"txt": "b"}], evaluation=[{"path": str(tmp_path / "none.jsonl")}])
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    program = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['check', sys.argv[1]]; "
        "runpy.run_module('trainer.check', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    errors = json.loads(done.stdout)["errors"]
    assert [error.split(":")[0] for error in errors] == ["data.train[0]", "data.evaluation[0]"]
    assert "a.jsonl, line 2: no column 'text'; the record has 'txt'" in errors[0]


def test_a_large_source_is_not_walked_record_by_record(tmp_path: Path) -> None:
    config = make_config(tmp_path, [])
    with Path(config.data.train[0].path).open("w") as file:
        file.write('{"text": "a b c"}\n' * 400_000)
    start = time.process_time()
    assert check(config)["ok"]
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("metric", "name", "message"),
    [
        ("perplexity", None, None),
        ("dev/loss", "dev", None),
        ("target_tokens", "dev", None),
        ("f1", None, "there is no 'f1'; the scores are loss, perplexity, target_tokens"),
        ("test/loss", "dev", "there is no 'test/loss'; the scores are .*; of one source: dev/..."),
    ],
)
def test_a_metric_that_no_evaluation_will_give(
    tmp_path: Path, metric: str, name: str | None, message: str | None
) -> None:
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "b c"}\n')
    config = make_config(tmp_path, [{"text": "a b"}], evaluation=[{"path": str(other), "name": name}])
    config = config.altered(evaluation={"metric": metric})
    report = check(config)
    assert report["ok"] == (message is None)
    assert re.search(message or "^$", "".join(report["errors"]))


def test_what_is_trained_on_is_no_evaluation(tmp_path: Path) -> None:
    same = tmp_path / "copy.jsonl"
    config = make_config(tmp_path, [{"text": "a b"}] * 3, evaluation=[{"path": str(same), "limit": 1}])
    same.write_bytes((tmp_path / "a.jsonl").read_bytes())
    report = check(config)
    assert report["warnings"] == [
        "data.evaluation[0]: copy.jsonl is trained on as well: its scores say nothing about other data"
    ]


def test_labels_are_told_and_those_that_look_alike(tmp_path: Path) -> None:
    records = [{"s": "a", "class": label} for label in ("Good", "good ", "bad")]
    source = {"path": str(tmp_path / "a.jsonl"), "template": {"text": "b {s}", "label": "{class}"}}
    values = make_config(tmp_path, records).model_dump(mode="json")
    values |= {"task": {"type": "text-classification"}, "data": {"train": [source], "sequence_length": 8}}
    report = check(LaunchConfig.model_validate(values))
    assert report["errors"] == []
    assert report["labels"] == ["Good", "bad", "good "]
    alone = "differ in case, white space or type (true is read as 1) alone"
    assert report["warnings"] == [f"the labels 'Good', 'good ' {alone}"]
    records = [{"text": f"a {n}", "label": label} for n, label in enumerate([True, "true", False, "no"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values["data"]["train"] = [{"path": str(tmp_path / "a.jsonl")}]
    labels, unknown = check(LaunchConfig.model_validate(values))["warnings"]
    assert labels == f"the labels '1', 'true' {alone}"
    assert unknown.startswith("data.train[0]: 33.3% of the tokens stand for text that the tokenizer does not know")


def test_a_training_that_only_warms_up(tmp_path: Path) -> None:
    values = make_config(tmp_path, [{"text": "a b"}] * 6).model_dump(mode="json")
    for length, steps in (
        ({"max_steps": 4}, 4),
        ({"epochs": 3.0}, 3),
    ):  # 6 of 4 tokens: 2 a sequence, 2 of these a batch
        training = {"global_batch_size": 3, **length, "schedule": {"warmup_steps": 4}}
        (warning,) = check(LaunchConfig.model_validate({**values, "training": training}))["warnings"]
        assert f"warmup_steps is 4, and the training has about {steps} steps" in warning
