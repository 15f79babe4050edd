"""Conversations: rendered as transformers renders them, and only what the assistant writes is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from trainer.check import check
from trainer.config.generation import GenerationConfig
from trainer.config.schema import DataSource, LaunchConfig
from trainer.config.tasks import CausalLMTask
from trainer.data.chat import Chat
from trainer.data.encoding import SourceEncoder
from trainer.data.sample import Sample
from trainer.data.sources import open_source
from trainer.failures import DataError
from trainer.predict import Reader
from trainer.tasks import get_task
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.writing import WritingCausalLM
from trainer.tokenizer import load_tokenizer

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as published with transformers' documentation: the answer and its end are marked
MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content | trim }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# what came before the last question loses its reasoning, as in templates of reasoning models
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% if message.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hé?"},
    {"role": "assistant", "content": "<think>hm</think>Yes, 你好."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_tokenizer(folder: Path, template: str | None) -> Path:
    """Bytes, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )
    return folder


def make_config(folder: Path, template: str | None, **data: Any) -> LaunchConfig:
    tokenizer = make_tokenizer(folder / "tokenizer", template)
    return LaunchConfig.model_validate(
        {
            "name": "chat",
            "task": {"type": "causal-lm"},
            "model": {"config": {"model_type": "llama", "vocab_size": 300}, "tokenizer": str(tokenizer)},
            "data": {"train": [{"path": str(folder / "a.jsonl")}], "sequence_length": 400, **data},
            "training": {"global_batch_size": 4, "max_steps": 1},
        }
    )


def task_of(config: LaunchConfig) -> CausalLM:
    return get_task(config, load_tokenizer(config.model))


def shown(task: CausalLM, sample: Sample | str) -> tuple[str, list[str]]:
    """The whole text, and each learned stretch of it."""
    assert isinstance(sample, Sample)
    fast = tokenizers.Tokenizer.from_file(f"{task.tokenizer.origin}/tokenizer.json")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.targets, [0]])))
    learned = [fast.decode(sample.tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]
    return fast.decode(sample.tokens.tolist(), skip_special_tokens=False), learned


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("assistant", ["<think>hm</think>Yes, 你好.<|im_end|>\n", "No.<|im_end|>\n"]),
        ("last", ["No.<|im_end|>\n"]),
        ("all", None),
    ],
)
def test_turn_by_turn(tmp_path: Path, loss_on: str, learned: list[str] | None) -> None:
    task = task_of(make_config(tmp_path, CHATML, loss_on=loss_on))
    (sample,) = task.encode([{"messages": TALK}])
    text, found = shown(task, sample)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHé?")
    assert found == (learned or [text.removeprefix("<|im_start|>")])  # the first token is predicted from nothing


@pytest.mark.parametrize(
    ("record", "eos", "source", "references"),
    [
        ({"prompt": "a", "completion": "bcde"}, True, "a", ["bcde"]),  # a prompt of one token is one
        ({"text": "abcdef"}, True, "abc", ["def"]),
        ({"messages": [*TALK, TALK[1]]}, True, None, ["No."]),  # what follows the answer is none of it
        ({"prompt": "abc"}, True, "abc", []),
        ({"prompt": "abc"}, False, "abc", []),
    ],
)
def test_what_is_written_from_and_compared_with(
    tmp_path: Path, record: dict[str, Any], eos: bool, source: str | None, references: list[str]
) -> None:
    marked = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    config = make_config(tmp_path, marked)
    config = config.model_copy(update={"task": CausalLMTask(type="causal-lm", generation=GenerationConfig())})
    tokenizer = load_tokenizer(config.model)
    task = get_task(config, tokenizer if eos else replace(tokenizer, eos_id=None))
    assert isinstance(task, WritingCausalLM)
    task.labelled = bool(references)
    (sample,) = task.encode([record])
    assert isinstance(sample, Sample)
    written = task.written(sample, [[]])
    assert source in (None, written["source"])
    assert written["references"] == references


@pytest.mark.parametrize(("loss_on", "on_long"), [("assistant", "split"), ("all", "truncate")])
@pytest.mark.parametrize(
    "template", [CHATML, MARKED + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"]
)
def test_an_answer_is_written_to_the_last_question(tmp_path: Path, template: str, loss_on: str, on_long: str) -> None:
    """By `dsft predict`; what is too long for a sequence is told, whatever `data.on_long` says of training."""
    config = make_config(tmp_path, template, loss_on=loss_on, on_long=on_long)
    settings = CausalLMTask(type="causal-lm", generation=GenerationConfig())
    task = get_task(config.model_copy(update={"task": settings}), load_tokenizer(config.model))
    assert isinstance(task, WritingCausalLM)
    task.labelled = False
    long = [{"role": "user", "content": "a" * 400}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (TALK[:4], long)))
    samples, why = Reader(open_source(config.data.train[0]), task, config, 0)(np.arange(2))
    text, _ = shown(task, replace(samples[0][0], tokens=samples[0][0].tokens[: task.prompt_length(samples[0][0])]))
    assert text.endswith("user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert "more than data.sequence_length (400) tokens" in why[1]


def test_as_transformers_renders_tokenises_and_masks(tmp_path: Path) -> None:
    import transformers

    for template in (CHATML, MARKED):
        task = task_of(make_config(tmp_path, template))
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        (sample,) = task.encode([{"messages": TALK}])
        marked = template == MARKED
        expected = reference.apply_chat_template(
            TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
        )
        assert isinstance(sample, Sample)
        assert sample.tokens.tolist() == expected["input_ids"]
        if marked:
            assert sample.targets.tolist() == [bool(value) for value in expected["assistant_masks"]]
            assert shown(task, sample)[1] == ["<think>hm</think>Yes, 你好.<|im_end|>", "No.<|im_end|>"]


def test_tools_and_tool_calls(tmp_path: Path) -> None:
    task = task_of(make_config(tmp_path, CHATML))
    call = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}]
    talk = [
        {"role": "user", "content": "1+1?", "tool_calls": None},  # as tables fill in
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two"},
    ]
    tools = [{"type": "function", "function": {"name": "sum"}}]
    as_values, as_text = task.encode(
        [{"messages": talk, "tools": tools}, {"messages": json.dumps(talk), "tools": json.dumps(tools)}]
    )
    text, learned = shown(task, as_values)
    assert text.startswith("<|im_start|>tools\n" + json.dumps(tools))
    assert learned == [json.dumps(call) + "<|im_end|>\n", "Two<|im_end|>\n"]
    assert shown(task, as_text) == (text, learned)


SEVERAL_MARKS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "[{% generation %}{{ message.content }}{% endgeneration %}]"
    "{% if message.tool_calls %}({% generation %}{{ message.tool_calls | tojson }}{% endgeneration %}){% endif %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("last", "learned"),
    [({"content": "c", "tool_calls": [1]}, ["c", "[1]"]), ({"content": ""}, [])],
    ids=["two spans", "an empty one"],
)
def test_the_last_turn_is_all_of_it_and_no_other(last: dict[str, Any], learned: list[str]) -> None:
    messages = [*TALK[1:4], {"role": "assistant", **last}]
    text, spans = Chat(SEVERAL_MARKS, {}, {}, "last").render(messages)
    assert spans is not None
    assert [text[start:end] for start, end in spans] == learned


def test_of_templates_with_names_the_default_is_taken(tmp_path: Path) -> None:
    config = make_config(tmp_path, None).model
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": named}))
    assert load_tokenizer(config).chat_template == CHATML


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"tests": ["assert f()"]}, False),
        ({"tests": "def check(f): ...", "entry_point": "f"}, False),
        ({"tests": "def check(f): ..."}, True),
        ({"tests": None, "entry_point": "f"}, True),
        ({"tests": ["assert f()", None]}, True),
        ({}, False),
    ],
)
def test_tests_that_cannot_be_run_are_told(tmp_path: Path, more: dict[str, Any], wrong: bool) -> None:
    config = make_config(tmp_path, None)
    code = {"type": "causal-lm", "generation": {}, "code_execution": {"enabled": True}}
    task = task_of(config.model_copy(update={"task": CausalLMTask.model_validate(code)}))
    (found,) = task.encode([{"prompt": "a", "completion": "b", **more}])
    assert (found == "tests: expected a list of texts, or a text that checks the function `entry_point`") == wrong
    assert isinstance(found, Sample) != wrong


def test_json_as_templates_ask_for_it(tmp_path: Path) -> None:
    """The arguments of transformers' filter, which published templates use."""
    template = "{{ messages[0].content | tojson(ensure_ascii=False, separators=(',', ':')) }}"
    sample = task_of(make_config(tmp_path, template, loss_on="all")).encode([{"messages": TALK[1:2]}])[0]
    assert shown(task_of(make_config(tmp_path, template)), sample)[0] == '"Hé?"'


def test_masks_that_cannot_be_found_are_refused(tmp_path: Path) -> None:
    (problem,) = task_of(make_config(tmp_path, FORGETFUL)).encode([{"messages": TALK}])
    assert "turn 3 cannot be found: the text changes with what follows" in str(problem)
    assert 'data.loss_on to "last"' in str(problem)
    task = task_of(make_config(tmp_path, FORGETFUL, loss_on="last"))
    assert shown(task, task.encode([{"messages": TALK}])[0])[1] == ["No.<|im_end|>\n"]
    hidden = FORGETFUL.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    (problem,) = task_of(make_config(tmp_path, hidden, loss_on="last")).encode([{"messages": TALK}])
    assert "the prompt is not part of it" in str(problem)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": "x"}], "roles must alternate"),
        ([], "a list of objects"),
        ("[1", "`messages` is text, but not JSON"),
        ([{"content": "x"}], "message 1 has no `role`"),
        ([{"role": "user"}], "neither `content` nor `tool_calls`"),
        ([{"role": "user", "content": "\ufdd0"}], "U\\+FDD0"),
    ],
)
def test_bad_conversations(tmp_path: Path, messages: Any, message: str) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (good, messages, good)))
    task = task_of(make_config(tmp_path, STRICT))
    source = open_source(DataSource(path=str(path)))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}"):
        SourceEncoder(source, task, 400, "split", "error").encode(np.arange(3), range(3))
    pieces, outcomes = SourceEncoder(source, task, 400, "split", "skip").encode(np.arange(3), range(3))
    assert sorted(pieces) == [0, 2]
    assert outcomes == [(1, 0)]


def test_the_check_refuses_before_a_launch(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    for template, message in ((None, "has no chat template"), ("{% for %}", "cannot be read"), (FORGETFUL, "turn 3")):
        report = check(make_config(tmp_path, template))
        assert not report["ok"]
        assert message in report["errors"][0]
    assert check(make_config(tmp_path, CHATML))["ok"]


@pytest.mark.parametrize(("end", "joined"), [(" ", 2), ("\\n", 0), ("", 0)])
def test_the_check_warns_of_answers_that_begin_within_a_token(tmp_path: Path, end: str, joined: int) -> None:
    """As with GPT-2's vocabulary, where the space before a word is part of it."""
    says = "{{ m.role }}:{% if m.role == 'assistant' %}" + f"{end or ' '}{{% endif %}}{{{{ m.content }}}}\n"
    template = (
        f"{{% for m in messages %}}{says}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{end}{{% endif %}}"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    config = make_config(tmp_path, template)
    fast = tokenizers.Tokenizer.from_file(f"{config.model.tokenizer}/tokenizer.json")
    alphabet = fast.get_vocab(with_added_tokens=False)
    merges = [("Ġ", "<"), ("Ġ", "N")]
    fast.model = models.BPE(alphabet | {"".join(pair): 300 + i for i, pair in enumerate(merges)}, merges)
    fast.save(f"{config.model.tokenizer}/tokenizer.json")
    report = check(config.altered(model={"resize_embeddings": True}))
    assert report["ok"], report
    assert ["2 answers begin within the last token of their prompt" in told for told in report["warnings"]] == (
        [True] * bool(joined)
    )


def test_prompt_templates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"q": "1+{x}?", "a": 2, "text": "t"}, {"q": "?", "a": None}, {"q": "?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(make_config(tmp_path, None))
    config = DataSource(path=str(path), template={"prompt": "Q: {q}\n{{A}}:", "completion": " {a}"})
    encoder = SourceEncoder(open_source(config), task, 400, "split", "skip")
    pieces, outcomes = encoder.encode(np.arange(3), range(3))
    assert shown(task, pieces[0][0]) == ("Q: 1+{x}?\n{A}: 2<|im_end|>", [" 2<|im_end|>"])
    assert outcomes == [(1, 0), (2, 0)]
    with pytest.raises(DataError, match="'answer' is no column of causal-lm"):
        SourceEncoder(open_source(DataSource(path=str(path), template={"answer": "x"})), task, 400, "split", "skip")
    for wrong in ("{a.b}", "{a!r}", "{a:>9}", "{}", "{"):
        with pytest.raises(ValueError, match="template"):
            DataSource(path="a", template={"text": wrong})
