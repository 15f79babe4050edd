"""`task.head`: layers of one's own choice, from training to an export that plain transformers loads and runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_runs import last_scores, make_config, make_workspace, run_at, same_runs, task_of
from test_task_text_classification import WORDS, dsft, make_records
from training_runs import copy_run, figures, launch, logs

from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.config.trained import AdapterConfig
from trainer.export import export_run
from trainer.failures import UserError
from trainer.model import build_optimizer
from trainer.modeling_head import model_class, pooled
from trainer.planning.model_facts import facts_of_config, model_facts
from trainer.rundir import RunDirectory

HEAD = {"hidden_sizes": [24, 16], "dropout": 0.1, "pooling": "mean"}
CLASSIFY = {"type": "text-classification", "labels": ["negative", "positive"], "head": HEAD}
SHORT = {"max_steps": 12}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    return make_workspace(folder, WORDS * 3, train=make_records(240, 1), test=make_records(67, 2))


@pytest.fixture
def transformers_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers keeps the code of models is a folder of this test."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def load(folder: Path, auto_class: str = "AutoModelForSequenceClassification") -> Any:
    """An export in plain transformers, by the code in it."""
    import transformers

    model, report = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__module__.startswith("transformers_modules.")
    assert not any(report.values()), report
    return model.eval()


def texts(workspace: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace / "test.jsonl").read_text().splitlines()]


def logits_of(model: Any, workspace: Path, folder: Path) -> torch.Tensor:
    """Of test.jsonl, in one batch, padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([record["sentence"] for record in texts(workspace)], padding=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


@pytest.mark.usefixtures("transformers_code")
def test_an_export_gives_the_scores_of_its_run_in_plain_transformers(workspace: Path, tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", make_config(workspace, CLASSIFY, training=SHORT), 1, 6)
    model = load(run.export_dir)
    logits = logits_of(model, workspace, run.export_dir)
    gold = torch.tensor([int(record["label"]) for record in texts(workspace)])
    assert last_scores(run)["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, gold)), rel=1e-5)
    assert last_scores(run)["accuracy"] == pytest.approx(float((logits.argmax(-1) == gold).float().mean()))
    assert [tuple(parameter.shape) for parameter in model.task_head.parameters() if parameter.dim() == 2] == [
        (24, 32),
        (16, 24),
        (2, 16),
    ]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    model.save_pretrained(tmp_path / "saved")  # by transformers, once more
    assert torch.equal(logits_of(load(tmp_path / "saved"), workspace, run.export_dir), logits)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("bert", {}),
        ("roberta", {"pad_token_id": 1}),
        ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
        ("modernbert", {"pad_token_id": 0}),
        ("deberta-v2", {}),
        ("llama", {"pad_token_id": 0}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0}),
    ],
)
def test_families(workspace: Path, model_type: str, more: dict[str, Any]) -> None:
    """Encoders and decoders: the head alone is new, drawn like any layer, and each parameter has a gradient."""
    import transformers

    from trainer.head import set_head

    heads = {"AutoModelForSequenceClassification": CLASSIFY, "AutoModelForTokenClassification": None}
    for auto_class, task in heads.items():
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **more}, num_labels=3)
        task = task or {"type": "token-classification", "head": {"hidden_sizes": [24, 16]}}
        chosen: Any = make_config(workspace, task).task
        set_head(config, auto_class, chosen.head)
        torch.manual_seed(1)
        model = model_class(config.auto_map[auto_class].rpartition(".")[2])._from_config(config)
        ids = torch.arange(16).view(2, 8) + 5
        mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        logits = model(input_ids=ids, attention_mask=mask).logits
        assert logits.shape == ((2, 3) if "Sequence" in auto_class else (2, 8, 3))
        logits.sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert {name for name, _ in model.named_children()} == {model.base_model_prefix, "task_head"}
        drawn = next(model.task_head.parameters())
        assert float(drawn.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_pooling_sees_no_padding() -> None:
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])  # on either side
    kept = torch.stack([hidden[0, :3], hidden[1, 2:]])
    expected = {"cls": kept[:, 0], "last": kept[:, -1], "mean": kept.mean(1), "max": kept.amax(1)}
    for pooling, value in expected.items():
        torch.testing.assert_close(pooled(hidden, mask, pooling), value)
        torch.testing.assert_close(pooled(kept, None, pooling), value)
    with pytest.raises(ValueError, match="a vector a token"):
        pooled(hidden[:, :2], mask, "mean")


def test_what_cannot_have_a_head_is_refused(workspace: Path) -> None:
    import transformers

    from trainer.head import set_head

    for task in (
        {"type": "question-answering", "head": {}},
        {"type": "causal-lm", "head": {}},
        {"type": "token-classification", "head": {"pooling": "mean"}},
        {**CLASSIFY, "head": {"hidden_sizes": [0]}},
        {**CLASSIFY, "dropout": 0.1},
        {**CLASSIFY, "pooling": "mean"},
        {"type": "multiple-choice", "head": {}, "dropout": 0.1},
    ):
        with pytest.raises(ValueError, match="head"):
            make_config(workspace, task)
    adapted = {"path": str(workspace), "config": None, "adapter": {"rank": 2}}
    values = make_config(workspace, CLASSIFY, model=adapted).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"cannot hold the layers of task\.head"):
        LaunchConfig.model_validate({**values, "export": {"adapter": "adapter"}})
    head = make_config(workspace, CLASSIFY).task.head  # type: ignore[union-attr]
    auto_class = "AutoModelForSequenceClassification"
    with pytest.raises(UserError, match="bart reads a text by two stacks"):
        set_head(transformers.BartConfig(), auto_class, head)
    for config in (transformers.ViTConfig(), transformers.PerceiverConfig()):
        with pytest.raises(UserError, match=f"no ForSequenceClassification of {config.model_type} to put"):
            set_head(config, auto_class, head)
    config = transformers.BertConfig()
    set_head(config, auto_class, head)
    set_head(config, auto_class, None)  # another run, from such an export
    assert not {"task_head", "auto_map"} & config.to_dict().keys()


def test_the_head_lies_above_all_layers_and_counts_in_the_plan(workspace: Path) -> None:
    config = make_config(workspace, CLASSIFY, training={"optimizer": {"learning_rate": 1.0, "layer_decay": 0.5}})
    task = task_of(config)
    import transformers

    model_config = transformers.BertConfig(**SIZES)
    task.configure(model_config)
    model = task.auto.from_config(model_config)
    optimizer = build_optimizer(model, config.training.optimizer)
    head = {id(parameter) for parameter in model.task_head.parameters()}
    factors = {g["lr_factor"] for g in optimizer.param_groups if head & {id(p) for p in g["params"]}}
    assert factors == {1.0}
    assert min(group["lr_factor"] for group in optimizer.param_groups) == 0.5**3

    hidden_layers = 32 * 24 + 24 + 24 * 16 + 16
    llama = {"model_type": "llama", **SIZES}
    plain, more = (facts_of_config(llama, new_head=True, head_sizes=sizes) for sizes in ((), (24, 16)))
    assert (more.parameters or 0) - (plain.parameters or 0) == hidden_layers
    adapted = ModelConfig(config=llama, tokenizer="none", adapter=AdapterConfig(rank=2))
    plain, more = (model_facts(adapted, new_head=True, head_sizes=sizes) for sizes in ((), (24, 16)))
    assert (more.trainable_parameters or 0) - (plain.trainable_parameters or 0) == hidden_layers


# -- whole runs at several world sizes, with adapters, by every command -----------------------------------------------


@pytest.fixture(scope="module")
def pretrained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(3)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    shutil.copy(workspace / "tokenizer.json", folder)
    return folder


@pytest.mark.matrix
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_the_head_is_the_same_at_any_world_size(
    workspace: Path, pretrained: Path, tmp_path: Path, weights: str
) -> None:
    model = {} if weights == "random" else {"path": str(pretrained), "config": None}
    task = {**CLASSIFY, "head": {**HEAD, "dropout": 0.0, "pooling": "max"}}
    config = make_config(workspace, task, model=model)
    one, two = run_at(tmp_path / "one", config, 1, 6), run_at(tmp_path / "two", config, 2, 6)
    same_runs(one, two)
    assert weights == "pretrained" or last_scores(one)["accuracy"] > 0.9


@pytest.mark.matrix
@pytest.mark.usefixtures("transformers_code")
def test_with_an_adapter_it_is_trained_whole_resumes_and_is_exported(
    workspace: Path, pretrained: Path, tmp_path: Path
) -> None:
    model = {"path": str(pretrained), "config": None, "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
    config = make_config(workspace, CLASSIFY, model=model, checkpoint={"interval_steps": 20, "keep_last": 3})
    run = run_at(tmp_path / "run", config, 2, 6)
    state = json.loads((run.checkpoints_dir / "step-00000040/state.json").read_text())
    trained = {name for name, _, is_trained in state["parameters"] if is_trained}
    assert {name for name in trained if "lora_" not in name} == {
        f"task_head.{layer}.{kind}" for layer in (1, 4, 7) for kind in ("weight", "bias")
    }
    logits = logits_of(load(run.export_dir), workspace, run.export_dir)
    gold = torch.tensor([int(record["label"]) for record in texts(workspace)])
    assert last_scores(run)["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, gold)), rel=1e-4)
    with pytest.raises(UserError, match=r"cannot hold the layers of `task\.head`"):
        export_run(run, LaunchConfig.model_validate_json(run.config_path.read_text()), adapter="adapter")

    again = copy_run(run, tmp_path / "again")
    shutil.rmtree(again.checkpoints_dir / "step-00000040")
    assert launch(again, 2, attempt=2) == 0, logs(again)
    assert figures(again) == figures(run)
    assert torch.equal(logits_of(load(again.export_dir), workspace, again.export_dir), logits)


@pytest.mark.matrix
@pytest.mark.usefixtures("transformers_code")
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_commands_use_such_a_model_as_any_other(workspace: Path, tmp_path: Path, model_type: str) -> None:
    task = {**CLASSIFY, "head": {**HEAD, "pooling": "last"}}
    model = {"config": {"model_type": model_type, **SIZES}}
    run = run_at(tmp_path / "run", make_config(workspace, task, model=model), 2, 6)
    done = dsft(tmp_path, "eval", str(run.path), "--processes", "3", "--batch-size", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"] == pytest.approx(last_scores(run), rel=1e-4)
    assert dsft(tmp_path, "export", str(run.path), "--output", "exported").returncode == 0
    data = str(workspace / "test.jsonl")
    done = dsft(tmp_path, "predict", "exported", "--input", data, "--output", "answers.jsonl", "--processes", "2")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    expected = logits_of(load(tmp_path / "exported"), workspace, run.export_dir).softmax(-1)
    found = torch.tensor([[answer["probabilities"][name] for name in CLASSIFY["labels"]] for answer in answers])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # such an export is where another run starts, with its head
    start = {"path": str(run.export_dir), "config": None}
    still = {"max_steps": 1, "optimizer": {"learning_rate": 1e-9}}
    following = run_at(tmp_path / "next", make_config(workspace, task, model=start, training=still), 1, 6)
    assert last_scores(following) == pytest.approx(last_scores(run), rel=1e-4)


@pytest.mark.matrix
@pytest.mark.usefixtures("transformers_code")
def test_words_and_choices(workspace: Path, tmp_path: Path) -> None:
    """Token classification, where nothing is pooled, and multiple choice: at two ranks as at one, and exported."""
    records = texts(workspace)
    folder = make_workspace(
        tmp_path,
        WORDS * 3,
        train=[{"tokens": r["sentence"].split(), "tags": [len(w) % 2 for w in r["sentence"].split()]} for r in records],
    )
    shutil.copy(folder / "train.jsonl", folder / "test.jsonl")
    task: dict[str, Any] = {"type": "token-classification", "labels": ["even", "odd"], "head": {"hidden_sizes": [24]}}
    runs = both(folder, task)
    batch = {"input_ids": torch.arange(24).view(2, 12) + 5}
    assert load(runs[1].export_dir, "AutoModelForTokenClassification")(**batch).logits.shape == (2, 12, 2)

    choices = [
        {"context": "it was", "choice1": "good", "choice2": r["sentence"], "label": int(r["label"])} for r in records
    ]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in choices))
    runs = both(folder, {"type": "multiple-choice", "head": {**HEAD, "dropout": 0.0}})
    batch = {"input_ids": torch.arange(24).view(2, 3, 4) + 5}
    assert load(runs[1].export_dir, "AutoModelForMultipleChoice")(**batch).logits.shape == (2, 3)


def both(folder: Path, task: dict[str, Any]) -> list[RunDirectory]:
    task = {**task, "head": {**task["head"], "dropout": 0.0}}
    config = make_config(folder, task, training=SHORT, evaluation={"interval_steps": 6})
    runs = [run_at(folder / f"{task['type']}-{ranks}", config, ranks, 6) for ranks in (1, 2)]
    same_runs(*runs)
    return runs
