"""From images to a summed loss and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.data.sample import Sample
from trainer.objective import EncoderObjective

if TYPE_CHECKING:
    from trainer.tasks.image_classification import ImageClassification


class ImageObjective(EncoderObjective):
    """As EncoderObjective, for models that read the pixels of one image a sample."""

    def __init__(self, model: Any, task: ImageClassification, device: torch.device) -> None:
        super().__init__(model, task, None, device)
        self._images = task
        self._blank = task.blank()
        self._dtype = model.dtype

    def collate(self, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], int]:
        """(`pixel_values` [samples, channels, height, width] in the model's dtype; 0); a blank image for no samples.

        Raises:
            UserError: the processor gives images of different sizes.
        """
        loaded = [self._images.load(sample).inputs or {} for sample in samples]  # those of predict are not yet
        pixels = np.stack([inputs["pixel_values"] for inputs in loaded] or [self._blank])
        return {"pixel_values": torch.from_numpy(pixels).to(self._device, self._dtype, non_blocking=True)}, 0
