"""Pictures of coloured shapes, an image processor, and tiny models that learn their colours."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def draw_shape(colour: str, draw: random.Random) -> Image.Image:
    """A shape of a colour somewhere on a grey ground; 24 to 40 pixels wide and high."""
    picture = Image.new("RGB", (draw.randrange(24, 41), draw.randrange(24, 41)), "grey")
    x, y = draw.randrange(4), draw.randrange(4)
    box = (x, y, x + draw.randrange(16, 20), y + draw.randrange(16, 20))
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if draw.random() < 0.5 else pen.rectangle)(box, fill=colour)
    return picture


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def make_pictures(folder: Path, name: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Records of ``number`` pictures, which are written to folder/name/."""
    draw = random.Random(seed)
    (folder / name).mkdir()
    records = []
    for index in range(number):
        colour = draw.choice(COLOURS)
        path = f"{name}/{index}.{draw.choice(('png', 'jpg'))}"
        draw_shape(colour, draw).save(folder / path)
        records.append({"image": path, "label": colour})
    return records


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_image_processor(folder: Path, size: int = 16) -> Path:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def tiny_vit(size: int = 16, **more: Any) -> dict[str, Any]:
    """`model.config` of a model that learns in seconds."""
    return {
        "model_type": "vit",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **more,
    }
