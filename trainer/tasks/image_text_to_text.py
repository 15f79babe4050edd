"""Texts about images: `prompt` (with `image`, one or several, or none) is read, `completion` is learned and scored.

The model's own processor writes out the placeholders of a prompt's images; a prompt without any gets them in front.
A conversation (`messages`) goes through the chat template of the processor; its last turn is learned. A sample holds
references to its images, whose pixels are made when its batch is. Samples never share a sequence. A completion that is
too long is cut; a prompt is not, since its images cannot be.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.images import decode, reference
from trainer.data.sample import Sample
from trainer.failures import DataError, UserError
from trainer.tasks.base import named_columns
from trainer.tasks.encoder import set_padding
from trainer.tasks.image_classification import IMAGE_NAMES, load_processor
from trainer.tasks.written import WrittenTask
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.vision import ImageTextObjective

# Held against their processors and models; others lay their inputs out otherwise. The input, if any, that tells a model
# which tokens are of images; PaliGemma's tells it which are learned.
FAMILIES = {
    "aya_vision": None,
    "gemma3": "token_type_ids",
    "idefics3": None,
    "internvl": None,
    "llava": None,
    "llava_next": None,
    "llava_onevision": None,
    "mistral3": None,
    "paligemma": "token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen2_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "smolvlm": None,
}
_PLACE = "<image>"  # of an image in any prompt
_PLACES = {"<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}  # what Qwen's templates write for it


class ImageTextToText(WrittenTask):
    """Prompts with images, and their completions."""

    auto_class = "AutoModelForImageTextToText"
    label_columns = frozenset({"completion"})
    structured = frozenset({"image", "messages"})
    optional = paths = frozenset({"image"})
    loads = True
    counted = "target_tokens"

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.metrics = self.settings.metrics or ("exact_match",)
        self._lock = threading.Lock()  # training and evaluation encode in a thread each

    @cached_property
    def processor(self) -> Any:
        """The model's processor, on Pillow. Raises DataError."""
        found = load_processor(self.config, "AutoProcessor")
        if not hasattr(found, "image_token"):
            origin = self.config.model.processor or self.config.model.path
            raise DataError(f"{origin!r} has no processor for images and texts: see model.processor")
        return found

    @cached_property
    def image_id(self) -> int:
        """The token that stands for a piece of an image."""
        tokenizer, token = self.processor.tokenizer, self.processor.image_token
        # not what stands for an image in a prompt in all families
        found = getattr(self.processor, "image_token_ids", None) or [tokenizer.convert_tokens_to_ids(token)]
        return int(found[0])

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        found = [name for name in (*IMAGE_NAMES, "images") if name in record]
        if found:
            source_columns = {"image": found[0], **source_columns}
        chat = "messages" in source_columns or ("messages" in record and "prompt" not in source_columns)
        needed = ("messages",) if chat else self.needed("prompt", "completion")
        # the first record may be one of those without an image
        return {"image": "image", **named_columns("image-text-to-text", needed, ("image",), source_columns, record)}

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        with self._lock:
            return [self._encode(record) for record in records]

    def _encode(self, record: dict[str, Any]) -> Sample | str:
        images = []
        given = record.get("image")
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            image = reference(value)
            if isinstance(image, str):
                return image
            images.append(image)
        prompt, completion = record.get("prompt", ""), record.get("completion", "")
        if "messages" in record:
            texts = self._chat(record["messages"])
            if isinstance(texts, str):
                return texts
            prompt, completion = texts
        token = self.processor.image_token
        place = _PLACES.get(token, token)
        prompt = prompt.replace(_PLACE, place)
        prompt = prompt if token in prompt else place * len(images) + prompt
        if prompt.count(token) != len(images):
            return f"{len(images)} images, and {prompt.count(token)} places ({token}) for them in the prompt"
        try:
            given_ids = self._prompt(prompt, images)
        except ValueError as error:  # PaliGemma's without an image, Qwen's for one that is too narrow
            kind = type(self.processor).__name__
            return f"{kind} cannot make inputs of the prompt and its {len(images)} images: {error}"
        inputs = {f"image{index}": image for index, image in enumerate(images)}
        limit, length = self.config.data.sequence_length, len(given_ids)
        if length + self.labelled > limit:
            return f"the prompt and its images are {length} tokens of data.sequence_length ({limit}): raise it"
        if not self.labelled:  # its end is then the one target
            return Sample(given_ids, np.arange(length) == length - 1, None, inputs, {"length": length})
        learned = self.tokenizer.encode_batch([completion])[0]
        if "messages" not in record and self.tokenizer.eos_id is not None:
            learned = np.append(learned, np.int32(self.tokenizer.eos_id))
        if self.image_id in learned:
            return f"the completion holds {token}, which stands for an image"
        tokens = np.concatenate([given_ids, learned])
        cut = len(tokens) > limit
        about = {"length": length, "prompt": prompt, "completion": self.tokenizer.decode(learned.tolist())}
        targets = np.arange(len(tokens)) >= max(length, 1)  # the first token of all is predicted from nothing
        return Sample(tokens[:limit], targets[:limit], None, inputs, about, truncated=cut)

    def _prompt(self, prompt: str, images: Sequence[np.ndarray]) -> np.ndarray:
        """Token ids of a prompt, int32, with the places of its images written out."""
        shown: dict[str, Any] = {"images": [[decode(image) for image in images]]} if images else {}
        begun = self.processor.tokenizer.bos_token  # templates write it, and the tokenizer would once more
        if begun and prompt.startswith(begun):
            shown["add_special_tokens"] = False
        return np.asarray(self.processor(text=[prompt], **shown)["input_ids"][0], dtype=np.int32)

    def _chat(self, messages: Any) -> tuple[str, str] | str:
        """(text up to the last turn, its text) of a conversation by the template, or what is wrong with it."""
        if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
            return "messages is no list of turns"
        answered = messages[-1].get("role") == "assistant"
        if self.labelled and not (answered and len(messages) > 1):
            return "the last of messages is no turn of the assistant after another one"
        try:
            if not answered:
                return self.processor.apply_chat_template(messages, add_generation_prompt=True), ""
            before = self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
            whole = self.processor.apply_chat_template(messages)
        except Exception as error:  # of jinja2, and of templates themselves
            return f"the chat template cannot render messages: {error}"
        if not whole.startswith(before):
            return "the chat template writes the last turn otherwise than it asks for it: what is learned is not clear"
        return before, whole[len(before) :]

    def load(self, sample: Sample) -> Sample:
        """The sample with what the image processor gives of its images in place of the references."""
        inputs = sample.inputs or {}
        images = [] if "pixel_values" in inputs else [*inputs.values()]
        return replace(sample, inputs=self.pixels([decode(image) for image in images])) if images else sample

    def pixels(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Inputs of the model for images, [images (or tiles, or patches of them), ...] each."""
        text = [self.processor.image_token * len(images)]  # the whole processor has settings for images, too
        found = self.processor(text=text, images=[list(images)], return_tensors="np")
        nested = "pixel_attention_mask" in found  # of Idefics3: [texts, tiles, channels, height, width]
        return {name: found[name][0] if nested else found[name] for name in self.inputs if name in found}

    inputs = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")

    def types(self, tokens: np.ndarray, learned: np.ndarray) -> dict[str, np.ndarray]:
        """The model's further input for tokens, [rows, length], where ``learned`` tells which of them are."""
        if self._types is None:
            return {}
        told = learned if self._prefixed else tokens == self.image_id
        return {self._types: told.astype(np.int64)}

    @cached_property
    def blank(self) -> Sample:
        """A sample of an empty image and nothing to learn, for batches without images."""
        from PIL import Image

        picture = Image.new("RGB", (32, 32))
        with self._lock:
            found = self.processor(text=[self.processor.image_token], images=[[picture]])["input_ids"][0]
        tokens = np.asarray(found, dtype=np.int32)
        return Sample(tokens, np.zeros(len(tokens), dtype=bool), None, self.pixels([picture]), {"length": len(tokens)})

    def configure(self, model_config: Any) -> None:
        if model_config.model_type not in FAMILIES:
            raise UserError(
                f"image-text-to-text knows models of the types {', '.join(FAMILIES)}, and {model_config.model_type} is "
                "none of them"
            )
        self._types = FAMILIES[model_config.model_type]
        self._prefixed = model_config.model_type == "paligemma"
        if model_config.image_token_id != self.image_id:
            raise UserError(
                f"the model's image_token_id is {model_config.image_token_id}, and {self.processor.image_token} of "
                f"its processor is {self.image_id}: choose the model's own processor (model.processor)"
            )
        set_padding(model_config.get_text_config(), self.tokenizer)

    def objective(self, model: Any, attention: str, device: torch.device) -> ImageTextObjective:
        from trainer.vision import ImageTextObjective

        return ImageTextObjective(model, self, device)

    def written(self, sample: Sample, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What an evaluation needs of a sample and the token ids that were generated for it."""
        return {
            "source": sample.reference.get("prompt", ""),
            "references": [sample.reference["completion"].strip()] if self.labelled else [],
            "texts": [text.strip() for text in self.decoded(texts)],
        }

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def example(self) -> dict[str, Any]:
        from trainer.vision import image_text_inputs

        return image_text_inputs([self.blank], 0, self.types)
