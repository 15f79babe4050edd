"""Pictures of coloured shapes, an image processor, and tiny models that learn their colours."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
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


def make_processor(folder: Path, family: str, words: list[str]) -> Path:
    """A processor of a family, with a tokenizer of ``words``, for pictures of 16 by 16 pixels."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
    special = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokens = ["<unk>", *special, *tiles, *words]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(tokens)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens([*special, *tiles])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    template = (
        "{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %} </s> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=template)
    processor.save_pretrained(folder)
    return folder


def tiny_llava(words: list[str], family: str = "llava") -> dict[str, Any]:
    """`model.config` of a Llama that reads pictures, for `make_processor`."""
    text = {
        "model_type": "llama",
        "vocab_size": 12 + len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if family == "llava":
        vision |= {"model_type": "clip_vision_model", "projection_dim": 32}
        more: dict[str, Any] = {"image_token_id": 4, "image_seq_length": 4}
    else:
        vision |= {"model_type": "idefics3_vision"}
        more = {"image_token_id": 4, "scale_factor": 2, "pad_token_id": 1, "tie_word_embeddings": False}
    return {"model_type": family, "text_config": text, "vision_config": vision, **more}


def predictions_of(run: Path, records: Path, output: Path, processes: int = 1) -> list[dict[str, Any]]:
    """What `dsft predict` answers for a file of records."""
    command = [sys.executable, "-P", "-m", "launcher", "predict", str(run), "--input", str(records)]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "XDG_STATE_HOME": str(output.parent)}
    done = subprocess.run(
        [*command, "--output", str(output), "--processes", str(processes)],
        env=os.environ | environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
