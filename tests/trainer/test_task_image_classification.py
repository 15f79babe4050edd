"""image-classification: references to images, damaged ones, and real runs whose exports plain transformers uses."""

from __future__ import annotations

import json
import random
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_runs import last_scores, make_config, run_at, same_runs
from image_data import (
    COLOURS,
    draw_shape,
    encoded,
    make_image_processor,
    make_pictures,
    predictions_of,
    tiny_vit,
    write,
)
from PIL import Image, ImageOps

from trainer import retry
from trainer.check import check
from trainer.config.schema import LaunchConfig
from trainer.data.encoding import BAD, SourceEncoder
from trainer.data.images import decode, reference
from trainer.data.sources import open_source
from trainer.failures import DataError
from trainer.tasks import get_task, task_tokenizer
from trainer.tasks.image_classification import ImageClassification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write(folder / "train.jsonl", make_pictures(folder, "train", 240, 1))
    write(folder / "test.jsonl", make_pictures(folder, "test", 61, 2))
    make_image_processor(folder / "processor")
    return folder


def config_of(folder: Path, task: dict[str, Any] | None = None, **data: Any) -> LaunchConfig:
    model = {"config": tiny_vit(), "tokenizer": None, "processor": str(folder / "processor")}
    return make_config(
        folder,
        {"type": "image-classification", **(task or {})},
        model={**model, "gradient_checkpointing": False},
        data={"sequence_length": 5, **data},
    )


def task_of(config: LaunchConfig) -> ImageClassification:
    task = get_task(config, task_tokenizer(config))
    assert isinstance(task, ImageClassification)
    return task


def test_pixels_are_those_of_the_processor_whatever_holds_the_image(folder: Path, tmp_path: Path) -> None:
    """A path, bytes, what datasets store and a webdataset's members give the same pixels, and labels by name or id."""
    import pyarrow
    from pyarrow import parquet

    task = task_of(config_of(folder))
    assert task.labels.names == tuple(sorted(COLOURS))
    picture = draw_shape("green", random.Random(3))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(encoded(picture))
    write(tmp_path / "a.jsonl", [{"image": "pictures/a.png", "label": "green"}])
    image = {"bytes": encoded(picture), "path": None}
    parquet.write_table(pyarrow.table({"image": [image], "label": [1]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"img": [image["bytes"]], "label": ["green"]}), tmp_path / "c.parquet")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name, body in (("0.png", encoded(picture)), ("0.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, BytesIO(body))
    wanted = task.processor(picture, return_tensors="np")["pixel_values"][0]
    for name in ("a.jsonl", "b.parquet", "c.parquet", "d.tar"):
        source = open_source(config_of(folder, train=[{"path": str(tmp_path / name)}]).data.train[0])
        (found,) = SourceEncoder(source, task, 5, "split", "error").encode(np.arange(1), [0])[0][0]
        assert found.labels is not None
        assert found.labels.tolist() == [1], name
        assert found.inputs is not None
        assert set(found.inputs) == {"image"}
        loaded = task.load(found)
        assert loaded.inputs is not None
        np.testing.assert_array_equal(loaded.inputs["pixel_values"], wanted)


def test_damaged_images_are_errors_or_counted(folder: Path, tmp_path: Path) -> None:
    task = task_of(config_of(folder))
    picture = draw_shape("blue", random.Random(4)).resize((200, 200))
    for kind in ("png", "jpeg"):
        body = encoded(picture, kind)
        (tmp_path / f"whole.{kind}").write_bytes(body)
        (tmp_path / f"cut.{kind}").write_bytes(body[: len(body) * 2 // 3])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full((9, 9), 3000, dtype=np.uint16)).save(tmp_path / "depth.png")
    bad = ("cut.png", "cut.jpeg", "text.png", "missing.png", 7, "depth.png")
    names = (*bad, "whole.png", "whole.jpeg")
    write(tmp_path / "a.jsonl", [{"image": name, "label": "blue"} for name in names])
    config = config_of(folder, train=[{"path": str(tmp_path / "a.jsonl")}])
    source = open_source(config.data.train[0])
    pieces, outcomes = SourceEncoder(source, task, 5, "split", "skip").encode(np.arange(8), range(8))
    assert outcomes == [(i, BAD) for i in range(6)]
    assert sorted(pieces) == [6, 7]
    problems = (
        *("truncated|cannot be decoded", "truncated", "not an image", "no such file.*relative", "image is int"),
        "more than 8 bits",
    )
    for number, problem in enumerate(problems):
        with pytest.raises(DataError, match=problem) as raised:
            SourceEncoder(source, task, 5, "split", "error").encode(np.array([number]), [0])
        assert f"a.jsonl, line {number + 1}" in str(raised.value) or f"a.jsonl:{number + 1}" in str(raised.value)


def test_a_picture_that_cannot_be_read_for_a_moment_is_not_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "a.png", encoded(draw_shape("blue", random.Random(4)))
    answers: list[bytes | OSError] = [OSError(5, "Input/output error"), whole, OSError(116, "Stale file handle"), whole]

    def read(_path: Path) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    image = reference(str(path))
    assert isinstance(image, np.ndarray)
    assert decode(image).tobytes() == Image.open(BytesIO(whole)).convert("RGB").tobytes()


def test_a_picture_is_turned_as_its_exif_says_whatever_else_is_in_there() -> None:
    picture = draw_shape("blue", random.Random(4)).resize((32, 24))
    for orientation in range(1, 10):
        # the second entry, a width in letters, cannot be written again
        for more in (b"", struct.pack(">HHI4s", 0x0100, 2, 2, b"x")):
            turn = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
            head = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1 + bool(more))
            body = BytesIO()
            picture.save(body, "png", exif=head + more + turn + bytes(4))
            if not more:
                expected = ImageOps.exif_transpose(Image.open(body)).convert("RGB").tobytes()
            image = reference(body.getvalue())
            assert isinstance(image, np.ndarray)
            assert decode(image).tobytes() == expected


def test_a_picture_smaller_than_what_it_is_drafted_at() -> None:
    for size in ((1, 1), (300, 2)):
        body = BytesIO()
        Image.new("RGB", size).save(body, "JPEG")
        image = reference(body.getvalue())
        assert not isinstance(image, str)
        assert decode(image).size == size


def test_check_looks_at_images_without_a_tokenizer(folder: Path) -> None:
    report = check(config_of(folder))
    assert report["ok"]
    assert report["statistics"][0]["records"] == 240


def test_runs_learn_alike_at_one_and_two_ranks_and_exports_work_without_dsft(folder: Path, tmp_path: Path) -> None:
    import transformers
    from PIL import Image

    config = config_of(folder)
    one, two = run_at(tmp_path / "one", config, 1, 12), run_at(tmp_path / "two", config, 2, 3)
    same_runs(one, two)
    first, last = one.evaluation_lines()[0]["evaluation"], last_scores(one)
    assert last["accuracy"] > 0.8
    assert last["top5_accuracy"] >= last["accuracy"]
    assert last["loss"] < first["loss"]
    assert last["samples"] == 61

    classify = transformers.pipeline("image-classification", model=str(two.export_dir), device="cpu")
    records = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    plain = []
    for record in records:
        with Image.open(folder / record["image"]) as picture:
            plain.append(classify(picture.convert("RGB"))[0])
    right = sum(one["label"] == record["label"] for one, record in zip(plain, records, strict=True))
    assert right / len(records) == pytest.approx(last_scores(two)["accuracy"])
    answers = predictions_of(two.path, folder / "test.jsonl", tmp_path / "answers.jsonl")
    assert [answer["label"] for answer in answers] == [one["label"] for one in plain]
    assert [answer["probability"] for answer in answers] == pytest.approx([one["score"] for one in plain], rel=1e-4)


@pytest.mark.matrix
def test_batch_normalisation_does_not_tell_ranks_apart(folder: Path, tmp_path: Path) -> None:
    """A ResNet keeps the statistics it comes with; those of batches would be others in each micro-batch and rank."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(shape).train()
    with torch.no_grad():
        for _ in range(30):  # some statistics
            model(torch.randn(16, 3, 16, 16))
    model.save_pretrained(tmp_path / "model")
    changed = config_of(folder).model_dump(mode="json")
    changed["model"] |= {"path": str(tmp_path / "model"), "config": None}
    changed["deepspeed"]["zero_stage"] = 2  # what its initialisation counts ZeRO-3 has cut
    config = LaunchConfig.model_validate(changed)
    one, two = run_at(tmp_path / "one", config, 1, 12), run_at(tmp_path / "two", config, 2, 3)
    same_runs(one, two)
    assert last_scores(one)["accuracy"] > 0.8
