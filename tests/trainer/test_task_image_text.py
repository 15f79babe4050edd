"""image-text-to-text: what is read and learned, losses as plain transformers has them, and real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoder_runs import last_scores, make_config, run_at, same_runs
from image_data import COLOURS, make_pictures, make_processor, predictions_of, tiny_llava, write
from PIL import Image
from transformers.utils import is_torchvision_available
from vision_families import NEEDS_TORCHVISION, PLACES, VISION_FAMILIES, family_model, make_family

from trainer.adapters import add_adapter
from trainer.config.schema import LaunchConfig
from trainer.config.trained import AdapterConfig
from trainer.data.encoding import SourceEncoder
from trainer.data.sample import PackedSequence, Sample
from trainer.data.sources import open_source
from trainer.failures import DataError, UserError
from trainer.tasks import get_task, task_tokenizer
from trainer.tasks.image_text_to_text import ImageTextToText
from trainer.vision import ImageTextObjective

WORDS = [*COLOURS, "which", "colour", "?", "say", "assistant", "user", ":"]
FAMILIES = ("llava", "idefics3")
_TORCHVISION = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
ALL_FAMILIES = [
    *FAMILIES,
    *(pytest.param(f, marks=_TORCHVISION) if f in NEEDS_TORCHVISION else f for f in VISION_FAMILIES),
]


def make_records(folder: Path, name: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Questions on pictures; three of six records in a row have none, and hold the answer."""
    records: list[dict[str, Any]] = []
    for index, made in enumerate(make_pictures(folder, name, number, seed)):
        colour = made["label"]
        if index % 6 < 3:
            records.append({"image": [made["image"]], "prompt": "which colour ?", "completion": colour})
        else:
            records.append({"prompt": f"say {colour} ?", "completion": colour})
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write(folder / "train.jsonl", make_records(folder, "train", 240, 1))
    write(folder / "test.jsonl", make_records(folder, "test", 30, 2))
    for family in FAMILIES:
        make_processor(folder / family, family, WORDS)
    make_family(folder / "llava_next", "llava_next", WORDS)
    return folder


def tiny_model(family: str) -> dict[str, Any]:
    return tiny_llava(WORDS, family) if family in FAMILIES else family_model(family, WORDS)


def config_of(folder: Path, family: str, **changes: Any) -> LaunchConfig:
    model = {"config": tiny_model(family), "tokenizer": None, "processor": str(folder / family)}
    task = {"type": "image-text-to-text", **changes.pop("task", {})}
    model |= {"gradient_checkpointing": False, **changes.pop("model", {})}
    data = {"sequence_length": 64, **changes.pop("data", {})}
    return make_config(folder, task, model=model, data=data, **changes)


def task_of(config: LaunchConfig) -> ImageTextToText:
    task = get_task(config, task_tokenizer(config))
    assert isinstance(task, ImageTextToText)
    return task


def read(config: LaunchConfig, task: ImageTextToText, path: Path, records: list[dict[str, Any]]) -> list[Sample]:
    write(path, records)
    source = open_source(config.data.train[0].model_copy(update={"path": str(path)}))
    encoder = SourceEncoder(source, task, config.data.sequence_length, "truncate", "error")
    made, _ = encoder.encode(np.arange(len(records)), range(len(records)))
    return [made[number][0] for number in range(len(records))]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_mixed_batch_is_learned_as_by_plain_transformers(folder: Path, family: str) -> None:
    """Several images, one, and none, of very different sizes: loss and gradients are the sums over samples that run by
    themselves, with labels; and so in other micro-batches."""
    if family not in FAMILIES:
        make_family(folder / family, family, WORDS)
    config = config_of(folder, family, data={"sequence_length": 96})
    task = task_of(config)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:8]]
    records[0]["image"] += records[1]["image"]
    for name, size in (("wide", (90, 20)), ("tall", (18, 70))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    records[1]["image"], records[2]["image"] = ["wide.png"], ["wide.png", "tall.png", records[2]["image"][0]]
    if family == "paligemma":
        records = [record for record in records if "image" in record]
    samples = read(config, task, folder / f"{family}.jsonl", records)
    values = tiny_model(family)
    model_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    task.configure(model_config)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(model_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # what is read of images shows
    objective = ImageTextObjective(model, task, torch.device("cpu"))
    sequences = [PackedSequence((task.load(sample),)) for sample in samples]
    loss, padded = objective(model, sequences)
    loss.backward()
    found = gradients_of(model)
    assert padded > 0
    halves = [objective(model, sequences[start : start + 2])[0].item() for start in range(0, len(sequences), 2)]
    assert sum(halves) == pytest.approx(loss.item(), rel=1e-5)

    wanted = 0.0
    for record, sample in zip(records, samples, strict=True):
        images = [Image.open(folder / path).convert("RGB") for path in record.get("image", [])]
        shown = {"images": [images]} if images else {}
        text = PLACES.get(family, "<image>") * len(images) + record["prompt"]
        inputs = dict(task.processor(text=[text], **shown, return_tensors="pt"))
        inputs.pop("labels", None)
        learned = torch.tensor([[task.tokenizer.encode_batch([record["completion"]])[0][0], 3]])
        given = inputs["input_ids"]
        assert sample.tokens.tolist() == [*given[0].tolist(), *learned[0].tolist()]
        assert sample.targets.sum() == 2
        inputs["input_ids"] = torch.cat([given, learned], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in inputs.keys() & {"token_type_ids", "mm_token_type_ids"}:
            inputs[name] = torch.cat([inputs[name], torch.full_like(learned, int(family == "paligemma"))], dim=1)
        labels = torch.cat([torch.full_like(given, -100), learned], dim=1)
        alone = 2 * model(**inputs, labels=labels).loss
        alone.backward()
        wanted += alone.item()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    expected = gradients_of(model)
    assert found.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm()) < 1e-3 * float(gradient.norm()) + 1e-6 * scale, name

    texts = [sequence for sequence in sequences if not sequence.samples[0].inputs]
    (objective(model, texts)[0] + objective(model, [])[0]).backward()
    assert objective(model, [])[0].item() == 0
    tower = [p for name, p in model.named_parameters() if ("vision" in name or "visual" in name) and ".0." in name]
    assert tower
    assert all(p.grad is not None and not p.grad.any() for p in tower)  # run, and without effect


@pytest.mark.parametrize("family", [*FAMILIES, *VISION_FAMILIES])
def test_adapters_go_on_all_families(family: str) -> None:
    values = tiny_model(family)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    add_adapter(model, AdapterConfig(rank=2, targets=["*q_proj"]), 0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients that have been made since the last call."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_records_that_cannot_be_read_say_why(folder: Path) -> None:
    config = config_of(folder, "llava")
    task = task_of(config)
    image = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["image"][0]
    good = {"image": image, "prompt": "colour ? <image>", "completion": "red"}
    (sample,) = read(config, task, folder / "a.jsonl", [good])
    assert sample.tokens[2:6].tolist() == [4] * 4  # where the prompt has it
    for change, problem in (
        ({"image": [image, image]}, "2 images, and 1 places"),
        ({"image": None}, "0 images, and 1 places"),
        ({"completion": "<image>"}, "stands for an image"),
        ({"prompt": "red " * 70, "image": image}, "74 tokens of data.sequence_length"),
        ({"image": "missing.png"}, "no such file"),
    ):
        with pytest.raises(DataError, match=problem):
            read(config, task, folder / "a.jsonl", [{**good, **change}])
    (sample,) = read(config, task, folder / "a.jsonl", [{**good, "completion": "red " * 80}])
    assert len(sample.tokens) == 64
    with pytest.raises(UserError, match="knows models of the types"):
        task.configure(transformers.AutoConfig.for_model("blip-2"))
    changed = transformers.AutoConfig.for_model("llava", image_token_id=5)
    with pytest.raises(UserError, match="image_token_id is 5"):
        task.configure(changed)


def test_prompts_of_other_families_hold_their_places(folder: Path) -> None:
    """`<image>` is a place in all families, and a conversation begins once, though template and tokenizer say so."""
    make_family(folder / "gemma3", "gemma3", WORDS)
    config = config_of(folder, "gemma3")
    task = task_of(config)
    image = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["image"][0]
    user = {"role": "user", "content": [{"type": "text", "text": "which"}, {"type": "image"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    records = [
        {"image": image, "prompt": "which <image> colour ?", "completion": "red"},
        {"image": image, "prompt": "which <start_of_image> colour ?", "completion": "red"},
    ]
    first, second = read(config, task, folder / "g.jsonl", records)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert np.flatnonzero(first.tokens == task.image_id).tolist() == [3, 4, 5, 6]  # behind <s> which <start_of_image>
    (sample,) = read(config, task, folder / "h.jsonl", [{"image": image, "messages": [user, answer]}])
    assert task.image_id in sample.tokens
    assert sample.tokens.tolist().count(2) == 1
    with pytest.raises(DataError, match="0 images, and 1 places"):
        read(config, task, folder / "g.jsonl", [{"prompt": "which <image> colour ?", "completion": "red"}])
    make_family(folder / "paligemma", "paligemma", WORDS)
    config = config_of(folder, "paligemma")
    with pytest.raises(DataError, match="PaliGemmaProcessor cannot make inputs of the prompt and its 0 images"):
        read(config, task_of(config), folder / "g.jsonl", [{"prompt": "which colour ?", "completion": "red"}])


def test_the_first_token_of_all_is_predicted_from_nothing(folder: Path) -> None:
    config = config_of(folder, "llava")
    (sample,) = read(config, task_of(config), folder / "b.jsonl", [{"prompt": "", "completion": "red"}])
    assert sample.targets.tolist() == [False, True]


def test_conversations_learn_the_last_turn(folder: Path) -> None:
    config = config_of(folder, "llava")
    task = task_of(config)
    image = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["image"][0]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour ?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    (sample,) = read(config, task, folder / "b.jsonl", [{"images": [image], "messages": [user, answer]}])
    learned = sample.tokens[sample.targets].tolist()
    assert task.tokenizer.show(learned).split() == ["red", "</s>"]
    assert np.count_nonzero(sample.tokens == 4) == 4
    with pytest.raises(DataError, match="no turn of the assistant"):
        read(config, task, folder / "b.jsonl", [{"images": [image], "messages": [user]}])


@pytest.mark.parametrize(
    ("family", "frozen", "processes"),
    [
        ("llava", (), 2),
        pytest.param("idefics3", ("*vision_model*",), 3, marks=pytest.mark.matrix),
        pytest.param(
            "llava_next", (), 2, marks=pytest.mark.matrix
        ),  # its own parameter is part of what is read of images
    ],
)
def test_runs_learn_alike_at_one_and_two_ranks(
    folder: Path, tmp_path: Path, family: str, frozen: tuple[str, ...], processes: int
) -> None:
    """At two ranks one of them evaluates and generates from texts alone, the other with images; neither waits.

    There layers are gathered as one, also that whose output LLaVA reads beside the one after it.
    """
    task = {"generation": {"max_new_tokens": 3, "batch_size": 4}}
    config = config_of(folder, family, task=task, model={"freeze": frozen})
    again = config.model.model_copy(update={"gradient_checkpointing": "selective"})
    one = run_at(tmp_path / "one", config, 1, 12)
    two = run_at(tmp_path / "two", config.model_copy(update={"model": again}), 2, 3)
    same_runs(one, two)
    scores = last_scores(one)
    assert scores["exact_match"] > 0.5  # a fifth of the answers would be right by chance
    assert scores["loss"] < one.evaluation_lines()[0]["evaluation"]["loss"]
    state = json.loads((next(two.checkpoints_dir.iterdir()) / "state.json").read_text())
    assert {trained for name, _, trained in state["parameters"] if "vision" in name} == {not frozen}

    texts = plain_texts(two.export_dir, folder)
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    right = sum(text == record["completion"] for text, record in zip(texts, records, strict=True))
    assert right / 30 == pytest.approx(last_scores(two)["exact_match"])
    answers = predictions_of(two.path, folder / "test.jsonl", tmp_path / "answers.jsonl", processes=processes)
    assert [answer["text"] for answer in answers] == texts


def plain_texts(export: Path, folder: Path) -> list[str]:
    """What plain transformers writes for the records of test.jsonl."""
    processor = transformers.AutoProcessor.from_pretrained(export)
    model = transformers.AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    texts = []
    for line in (folder / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        images = [Image.open(folder / path).convert("RGB") for path in record.get("image", [])]
        shown = {"images": [images]} if images else {}
        inputs = processor(text=["<image>" * len(images) + record["prompt"]], **shown, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(output, skip_special_tokens=True).strip())
    return texts


@pytest.mark.matrix
def test_records_without_any_image(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        write(tmp_path / f"{name}.jsonl", [record for record in records if "image" not in record])
    sources = {
        "train": [{"path": str(tmp_path / "train.jsonl")}],
        "evaluation": [{"path": str(tmp_path / "test.jsonl")}],
    }
    config = config_of(folder, "llava", task={"generation": {"max_new_tokens": 3, "batch_size": 4}}, data=sources)
    one, two = run_at(tmp_path / "one", config, 1, 12), run_at(tmp_path / "two", config, 2, 3)
    same_runs(one, two)
    assert last_scores(two)["exact_match"] > 0.5


@pytest.mark.matrix
def test_an_adapter_of_a_model_that_sees(folder: Path, tmp_path: Path) -> None:
    """LoRA on the language model of a LLaVA that has learned a little: nothing else changes."""
    from safetensors.torch import load_file

    task = {"generation": {"max_new_tokens": 3, "batch_size": 4}}
    base = run_at(tmp_path / "base", config_of(folder, "llava", task=task, training={"max_steps": 20}), 1, 12)
    model = {"path": str(base.export_dir), "config": None, "processor": None}
    model |= {"adapter": {"rank": 4, "targets": ["*language_model*.q_proj", "*language_model*.down_proj"]}}
    config = config_of(folder, "llava", task=task, model=model)
    one, two = run_at(tmp_path / "one", config, 1, 12), run_at(tmp_path / "two", config, 2, 3)
    same_runs(one, two)
    assert last_scores(two)["loss"] < last_scores(base)["loss"]
    before, after = (load_file(run.export_dir / "model.safetensors") for run in (base, two))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4  # of two layers
    assert all("language_model" in name and name.split(".")[-2] in ("q_proj", "down_proj") for name in changed)
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    answers = predictions_of(two.path, folder / "test.jsonl", tmp_path / "answers.jsonl", processes=2)
    assert [answer["text"] for answer in answers] == plain_texts(two.export_dir, folder)
    right = sum(a["text"] == r["completion"] for a, r in zip(answers, records, strict=True))
    assert right / 30 == pytest.approx(last_scores(two)["exact_match"])
