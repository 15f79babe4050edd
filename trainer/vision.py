"""From images, and texts about them, to a summed loss and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.data.sample import PackedSequence, Sample
from trainer.engine import Engine
from trainer.generation import Generator, Prompt
from trainer.loss import LabelledPositions, cross_entropy_sum, filled_up
from trainer.objective import EncoderObjective, padded
from trainer.parameters import whole_shape
from trainer.tasks.base import Objective, Predictions

if TYPE_CHECKING:
    from trainer.tasks.image_classification import ImageClassification
    from trainer.tasks.image_text_to_text import ImageTextToText


class ImageObjective(EncoderObjective):
    """As EncoderObjective, for models that read the pixels of one image a sample."""

    def __init__(self, model: Any, task: ImageClassification, device: torch.device) -> None:
        super().__init__(model, task, device)
        self._images = task
        self._blank = task.blank()
        self._dtype = model.dtype

    def collate(self, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], int]:
        """(`pixel_values` [samples, channels, height, width] in the model's dtype; 0); a blank image for no samples."""
        loaded = [self._images.load(sample).inputs or {} for sample in samples]  # those of predict are not yet
        pixels = np.stack([inputs["pixel_values"] for inputs in loaded] or [self._blank])
        return {"pixel_values": torch.from_numpy(pixels).to(self._device, self._dtype, non_blocking=True)}, 0


class ImageTextObjective(Objective):
    """The loss over target tokens and the texts that a model generates from prompts with images.

    Every forward pass takes at least one image, a blank one in a row without targets where samples bring none: under
    ZeRO-3 all ranks have to run the vision tower, or none.
    """

    def __init__(self, model: Any, task: ImageTextToText, device: torch.device) -> None:
        self._task, self._device, self._dtype = task, device, model.dtype
        self.head_parameters = math.prod(whole_shape(model.get_output_embeddings().weight))
        self._head = LabelledPositions(model)
        self._pad = task.tokenizer.pad_id or 0  # hidden by the mask; an image's token it is never
        settings, blank = task.settings.generation, Prompt(task.blank.tokens, (0,), task.blank.inputs)
        self._generator = Generator(model, settings, task.tokenizer, device, self._more, blank) if settings else None

    def __call__(self, forward: Callable[..., Any], sequences: Sequence[PackedSequence]) -> tuple[torch.Tensor, int]:
        """(sum of the loss over target tokens, fp32 scalar; padded tokens)."""
        samples = self._samples(sequences)
        rows = samples if any(sample.inputs for sample in samples) else [*samples, self._task.blank]
        inputs = image_text_inputs(rows, self._pad, self._task.types)
        width = inputs["input_ids"].shape[1]
        places = [row * width + np.flatnonzero(sample.targets) - 1 for row, sample in enumerate(rows)]
        positions, labels = filled_up(np.concatenate(places), np.concatenate([s.tokens[s.targets] for s in rows]))
        with self._head.only(torch.from_numpy(positions).to(self._device)):
            output = forward(**self._moved(inputs), use_cache=False)
        loss = cross_entropy_sum(output.logits, torch.from_numpy(labels).to(self._device))
        return loss, inputs["input_ids"].numel() - sum(len(sample.tokens) for sample in samples)

    def answer(self, engine: Engine, sequences: Sequence[PackedSequence]) -> Predictions:
        """What was generated from each prompt, as the task writes it down."""
        if self._generator is None:
            return []
        samples, written = self._samples(sequences), self._task.written
        return self._generator.answers(engine, samples, lambda s: s.tokens[: s.reference["length"]], written)

    def _samples(self, sequences: Sequence[PackedSequence]) -> list[Sample]:
        """Samples with pixels: those of predict come without."""
        return [self._task.load(sample) for sequence in sequences for sample in sequence.samples]

    def _more(self, prompts: Sequence[Prompt], ids: np.ndarray) -> dict[str, torch.Tensor]:
        types = self._task.types(ids, np.zeros_like(ids))
        pixels = joined_pixels([prompt.inputs or {} for prompt in prompts])
        return self._moved({name: torch.from_numpy(values) for name, values in types.items()} | pixels)

    def _moved(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: values.to(self._device, self._dtype if values.is_floating_point() else None, non_blocking=True)
            for name, values in inputs.items()
        }


def image_text_inputs(rows: Sequence[Sample], pad: int, types: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Token ids, mask and types, int64 [rows, longest rounded up], padded on the right; all pixels."""
    ids = padded([row.tokens for row in rows], pad)
    mask = padded([np.ones(len(row.tokens)) for row in rows], 0)
    named = {"input_ids": ids, "attention_mask": mask, **types(ids, padded([row.targets for row in rows], 0))}
    pixels = joined_pixels([row.inputs or {} for row in rows])
    return {name: torch.from_numpy(values) for name, values in named.items()} | pixels


def joined_pixels(parts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What there is of the images of all samples, [images (or tiles, or patches), ...], in their order.

    Images of different sizes, or numbers of tiles, are filled up with zeros; the models know where. Where they come
    with a mask (Idefics3), there is one more dimension in front: the model takes all images as those of one text.
    """
    parts = [part for part in parts if part]
    joined: dict[str, torch.Tensor] = {}
    for name in parts[0] if parts else ():
        arrays = [part[name] for part in parts]
        shape = np.max([array.shape[1:] for array in arrays], axis=0)
        values = torch.from_numpy(np.concatenate([_filled(array, shape) for array in arrays]))
        joined[name] = values[None] if "pixel_attention_mask" in parts[0] else values
    return joined


def _filled(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """[images, ...] with zeros at the ends of the further dimensions up to ``shape``."""
    if array.shape[1:] == tuple(shape):
        return array
    more = [(0, wanted - had) for wanted, had in zip(shape, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *more])
