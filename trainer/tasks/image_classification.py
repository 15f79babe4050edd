"""A class for an image, by the model's own image-classification head.

A sample holds a reference to its image, whose pixels are made when its batch is: windows of samples stay small. An
image counts as one token. Nothing is augmented. The image processor of the model does the rest, on Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import ImageClassificationTask
from trainer.data.images import decode, reference
from trainer.data.sample import Sample
from trainer.failures import DataError
from trainer.tasks.base import Objective, Predictions, named_columns
from trainer.tasks.encoder import HeadTask, Labels, cross_entropy, labels_of, set_labels, with_labels
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_TOP = 5
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")  # webdataset names columns by the files' endings
_LABEL_NAMES = ("label", "labels", "cls")


class ImageClassification(HeadTask):
    """Images with one label each."""

    auto_class = "AutoModelForImageClassification"
    label_columns = frozenset({"label"})
    structured = frozenset({"image", "label"})
    paths = frozenset({"image"})
    loads = True

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        config = with_labels(config, "label", _LABEL_NAMES)
        super().__init__(config, tokenizer)
        self.task = cast("ImageClassificationTask", config.task)
        self.labels = Labels(self.task.labels or ())

    @cached_property
    def processor(self) -> Any:
        """The image processor of the model. Raises DataError."""
        return load_processor(self.config, "AutoImageProcessor")

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        known = {}
        for column, names in (("image", IMAGE_NAMES), ("label", _LABEL_NAMES)):
            found = [name for name in names if name in record]
            if found and (column != "label" or self.labelled):
                known[column] = found[0]
        needed = self.needed("image", "label")
        return named_columns("image-classification", needed, (), {**known, **source_columns}, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        results: list[Sample | list[Sample] | str] = []
        for record in records:
            label = self.labels.id(record["label"]) if self.labelled else 0
            image = reference(record["image"]) if isinstance(label, int) else label
            if isinstance(image, str):
                results.append(image)
                continue
            tokens, targets = np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool)
            labels = np.array([label], dtype=np.int64) if self.labelled else None
            results.append(Sample(tokens, targets, labels, {"image": image}))
        return results

    def load(self, sample: Sample) -> Sample:
        """The sample with `pixel_values`, float32 [channels, height, width], in place of the reference."""
        inputs = sample.inputs or {}
        if "image" not in inputs:
            return sample
        pixels = self.processor(decode(inputs["image"]), return_tensors="np")["pixel_values"][0]
        return replace(sample, inputs={"pixel_values": np.asarray(pixels, dtype=np.float32)})

    def blank(self) -> np.ndarray:
        """The pixels of an image without content, float32 [channels, height, width]."""
        from PIL import Image

        pixels = self.processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)

    def configure(self, model_config: Any) -> None:
        set_labels(model_config, self.labels.names)
        model_config.problem_type = "single_label_classification"

    def objective(self, model: Any, attention: str, device: torch.device) -> Objective:
        from trainer.vision import ImageObjective

        return ImageObjective(model, self, device)

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        return cross_entropy(output.logits, labels_of(samples), self.task.label_smoothing)

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """(whether the best class is the right one, whether one of the best five is) of each sample."""
        logits = output.logits.float().cpu().numpy()
        order = np.argsort(-logits, axis=-1, kind="stable")
        gold = labels_of(samples).tolist()
        return [(bool(row[0] == right), right in row[:_TOP].tolist()) for row, right in zip(order, gold, strict=True)]

    @property
    def scored(self) -> tuple[str, ...]:
        return ("accuracy", *(["top5_accuracy"] if len(self.labels.names) > _TOP else []))

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        if not predictions:
            return {}
        found = np.array([pair for _, pair in predictions], dtype=np.float64).mean(axis=0)
        top = {"top5_accuracy": float(found[1])} if len(self.labels.names) > _TOP else {}
        return {"accuracy": float(found[0]), **top}

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """The probability of each class."""
        return [*output.logits.float().softmax(-1).tolist()]

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """The best class with its probability, and the best five."""
        pairs = sorted(zip(found[0], self.labels.names, strict=True), reverse=True)[:_TOP]
        return {"label": pairs[0][1], "probability": pairs[0][0], "best": {name: share for share, name in pairs}}

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def example(self) -> dict[str, Any]:
        import torch

        ramp = np.linspace(-1, 1, self.blank().size, dtype=np.float32).reshape(1, *self.blank().shape)
        return {"pixel_values": torch.from_numpy(ramp)}


def load_processor(config: LaunchConfig, auto_class: str) -> Any:
    """The processor of a config's model, on Pillow. Raises DataError."""
    import transformers

    origin = config.model.processor or config.model.path
    trusted = {"trust_remote_code": config.model.trust_remote_code}
    try:
        found = images = transformers.AutoImageProcessor.from_pretrained(origin, backend="pil", **trusted)
        if auto_class != "AutoImageProcessor":
            found = getattr(transformers, auto_class).from_pretrained(origin, **trusted)
            found.image_processor = images  # its backend cannot be named above: processors of videos have no such
        return found
    # RuntimeError: of a torchvision that is made for another torch
    except (OSError, ValueError, ImportError, TypeError, RuntimeError) as error:
        raise DataError(
            f"the processor of {origin!r} cannot be loaded: {error}; give model.processor a folder with a "
            "preprocessor_config.json"
        ) from error
