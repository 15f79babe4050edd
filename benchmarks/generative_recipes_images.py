"""What `generative_scores.py` trains on images: those of NLVR, with labels and questions from its descriptions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from generative_recipes import Recipe, Records, find, lines, write
from PIL import Image

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}  # NLVR's own names
PICTURE = 64  # pixels, of the squares that models see


def nlvr_colours(data: Path, folder: Path) -> Recipe:
    """NLVR's images by a ViT: which colour most of the items have."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    files = {}
    for name in ("dev", "test"):
        records = []
        for made in _scenes(data, folder, name):
            if (most := _most(made)) is not None:
                records.append({"image": made["image"], "label": most})
        files[name] = records
    ViTImageProcessorPil(size={"height": PICTURE, "width": PICTURE}).save_pretrained(folder / "processor")
    best = Counter(r["label"] for r in files["dev"]).most_common(1)[0][0]
    share = sum(r["label"] == best for r in files["test"]) / len(files["test"])
    body = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"model_type": "vit", "image_size": PICTURE, "patch_size": 8, **body}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Recipe(
        {"type": "image-classification"},
        {"config": config, "processor": str(folder / "processor")},
        write(folder / "train.jsonl", files["dev"]),
        [{"path": str(write(folder / "test.jsonl", files["test"]))}],
        65,
        32,
        300,
        1e-3,
        "accuracy",
        {f"always {best}": {"accuracy": share}},
    )


def nlvr_questions(data: Path, folder: Path) -> Recipe:
    """NLVR's images by a LLaVA: which colour most of the items have, and whether it is this one."""
    draw = random.Random(0)
    files: dict[str, Records] = {"dev": [], "test": []}
    for name, records in files.items():
        for made in _scenes(data, folder, name):
            if (most := _most(made)) is None:
                continue
            other = draw.choice([colour for colour in COLOURS.values() if colour != most])
            asked = [("which has most ?", most), (f"is most {most} ?", "yes"), (f"is most {other} ?", "no")]
            records += [{"image": made["image"], "prompt": prompt, "completion": answer} for prompt, answer in asked]
    files["test"] = files["test"][:600]
    by_question: dict[str, Counter[str]] = {}
    for record in files["dev"]:
        by_question.setdefault(record["prompt"], Counter())[record["completion"]] += 1
    right = [by_question[r["prompt"]].most_common(1)[0][0] == r["completion"] for r in files["test"]]
    baseline = {"the most frequent answer to each question": {"exact_match": sum(right) / len(right)}}
    words = ["which", "has", "most", "is", "?", "yes", "no", *COLOURS.values()]
    return _llava(folder, words, files["dev"], files["test"], 450, baseline)


def nlvr_statements(data: Path, folder: Path) -> Recipe:
    """NLVR as published: is a sentence about an image true? Learned sentences are scored beside held-out ones."""
    files: dict[str, Records] = {}
    for name in ("dev", "test"):
        files[name] = [
            {"image": made["image"], "prompt": made["sentence"].lower().strip(" ."), "completion": made["label"]}
            for made in _scenes(data, folder, name)
        ]
    best = Counter(r["completion"] for r in files["dev"]).most_common(1)[0][0]
    share = sum(r["completion"] == best for r in files["test"]) / len(files["test"])
    words = sorted({word for r in files["dev"] for word in r["prompt"].split()} | {"true", "false"})
    made = _llava(folder, words, files["dev"], files["test"], 160, {f"always {best}": {"exact_match": share}})
    learned = {"path": str(write(folder / "learned.jsonl", files["dev"][:200])), "name": "learned"}
    named = [{**made.evaluation[0], "name": "held_out"}, learned]
    return replace(made, evaluation=named, judged="held_out/exact_match", beats=False)


def _most(scene: dict[str, Any]) -> str | None:
    """The colour of most of the items; None where two have as many."""
    (first, most), *others = Counter(item["color"] for box in scene["boxes"] for item in box).most_common()
    return COLOURS[first] if not others or others[0][1] < most else None


def _scenes(data: Path, folder: Path, split: str) -> Records:
    """Records with the image (the three boxes in the quarters of a square, at their own size), sentence and boxes."""
    path = find(data, f"nlvr/{split}/{split}.json")
    (folder / split).mkdir(exist_ok=True)
    scenes = []
    for made in lines(path):
        name = f"{split}-{made['identifier']}-0.png"
        picture = Image.open(path.parent / "images" / made["directory"] / name).convert("RGB")
        square = Image.new("RGB", (200, 200), "grey")
        for box in range(3):
            square.paste(picture.crop((150 * box, 0, 150 * box + 100, 100)), (box % 2 * 100, box // 2 * 100))
        square.save(folder / split / name)
        boxes = made["structured_rep"]
        scenes.append(
            {"image": f"{split}/{name}", "sentence": made["sentence"], "label": made["label"], "boxes": boxes}
        )
    return scenes


def _llava(folder: Path, words: list[str], train: Records, test: Records, steps: int, baselines: Any) -> Recipe:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(special)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    images = CLIPImageProcessorPil(size={"height": PICTURE, "width": PICTURE}, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        images,
        transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder / "processor")
    body = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "llama", "vocab_size": len(special) + len(words), "max_position_embeddings": 192, **body}
    text |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    vision = {"model_type": "clip_vision_model", "image_size": PICTURE, "patch_size": 8, "projection_dim": 96, **body}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_id": 4}
    config["vision_feature_layer"] = -1  # of two layers the usual one before the last has seen nothing but patches
    return Recipe(
        {"type": "image-text-to-text", "generation": {"max_new_tokens": 2, "batch_size": 32}},
        {"config": {**config, "image_seq_length": (PICTURE // 8) ** 2}, "processor": str(folder / "processor")},
        write(folder / "train.jsonl", train),
        [{"path": str(write(folder / "test.jsonl", test))}],
        160,
        32,
        steps,
        1e-3,
        "exact_match",
        baselines,
    )
