"""A tiny random model, and its processor, of each family that reads images and writes text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# In the order of their ids; names are those by which families' processors ask the tokenizer for them.
_TOKENS = {
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "image_token": "<image>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
    "context_image_token": "<IMG_CONTEXT>",
}
_MORE = [
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
    *(f"_{tile}" for tile in range(1, 9)),
]
TOKENS = [*_TOKENS.values(), *_MORE]
PLACES = {  # what a family's prompts hold for an image
    "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>",
    **dict.fromkeys(("mistral3", "pixtral"), "[IMG]"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|vision_start|><|image_pad|><|vision_end|>"),
}
_SOFT = {"aya_vision": "<|IMG_PATCH|>", **PLACES, "gemma3": "<image>"}  # what stands for a piece of one
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
    "{% if part.type == 'image' %}PLACE{% else %}{{ part.text }}{% endif %}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
_VIDEOS = ("internvl", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm")
NEEDS_TORCHVISION = ("mistral3", "pixtral", *_VIDEOS)
VISION_FAMILIES = ("aya_vision", "gemma3", "llava_next", "paligemma", *NEEDS_TORCHVISION)


def image_id(family: str) -> int:
    soft = _SOFT.get(family, "<image>").removeprefix("<|vision_start|>").removesuffix("<|vision_end|>")
    return TOKENS.index(soft)


def _tokenizer(family: str, words: list[str]) -> Any:
    """Ids are places in TOKENS, and after them in ``words``; it writes a beginning, and no end."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = [*TOKENS, *words]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(tokens)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(TOKENS)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
    names = dict(list(_TOKENS.items())[:4])
    extra = dict(list(_TOKENS.items())[4:]) if family in ("gemma3", "internvl") else {}
    read = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, **names, extra_special_tokens=extra, model_input_names=read
    )


def make_family(folder: Path, family: str, words: list[str]) -> Path:
    """The processor of a family for patches of 8 by 8 pixels."""
    tokenizer = _tokenizer(family, words)
    template = _TEMPLATE.replace("PLACE", PLACES.get(family, "<image>"))
    made = _processor(family, tokenizer, template)
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def _processor(family: str, tokenizer: Any, template: str) -> Any:
    import transformers as t
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    square = {"height": 16, "width": 16}
    tiles = {"size": square, "max_patches": 3}
    match family:
        case "aya_vision":
            images = GotOcr2ImageProcessorPil(**tiles)
            return t.AyaVisionProcessor(images, tokenizer, patch_size=8, img_size=16, downsample_factor=1)
        case "gemma3":
            from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

            return t.Gemma3Processor(Gemma3ImageProcessorPil(size=square), tokenizer, image_seq_length=4)
        case "llava_next":
            from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

            pins = [[16, 32], [32, 16], [32, 32]]
            images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=pins)
            more = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
            return t.LlavaNextProcessor(images, tokenizer, patch_size=8, **more)
        case "mistral3" | "pixtral":
            from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

            images = PixtralImageProcessorPil(size={"longest_edge": 40}, patch_size=8)
            return t.PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2 - (family == "pixtral"))
        case "paligemma":
            from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

            images = SiglipImageProcessorPil(size=square)
            images.image_seq_length = 4
            return t.PaliGemmaProcessor(images, tokenizer)
        case "internvl":
            images = GotOcr2ImageProcessorPil(**tiles)
            return t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(), image_seq_length=1)
        case "llava_onevision":
            from transformers.models.llava_onevision import image_processing_pil_llava_onevision as module

            pins = [[16, 32], [32, 16], [32, 32]]
            images = module.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pins)
            more = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
            return t.LlavaOnevisionProcessor(images, tokenizer, t.LlavaOnevisionVideoProcessor(), **more)
        case "smolvlm":
            from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

            sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
            images = SmolVLMImageProcessorPil(**sizes)
            return t.SmolVLMProcessor(images, tokenizer, t.SmolVLMVideoProcessor(), image_seq_len=1)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 1024})
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    videos = t.Qwen3VLVideoProcessor() if family == "qwen3_vl" else t.Qwen2VLVideoProcessor()
    return getattr(t, f"{name}Processor")(images, tokenizer, videos)


def family_model(family: str, words: list[str]) -> dict[str, Any]:
    """`model.config` of a family for its `make_family`."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    tokens = {"vocab_size": -(-(len(TOKENS) + len(words)) // 8) * 8, "max_position_embeddings": 128}
    text: dict[str, Any] = {"model_type": "llama", **size, **tokens, **ends, "num_key_value_heads": 2}
    vision: dict[str, Any] = {**size, "image_size": 16, "patch_size": 8}
    more: dict[str, Any] = {"image_token_id": image_id(family), "tie_word_embeddings": False}
    match family:
        case "aya_vision":
            text |= {"model_type": "cohere2", "head_dim": 16}
            vision |= {"model_type": "siglip_vision_model"}
            more |= {"downsample_factor": 1, "alignment_intermediate_size": 64}
        case "gemma3":
            text |= {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}
            text |= {"layer_types": ["sliding_attention", "full_attention"]}
            vision |= {"model_type": "siglip_vision_model"}
            more |= {"mm_tokens_per_image": 4}
        case "llava_next":
            vision |= {"model_type": "clip_vision_model", "projection_dim": 32}
            more |= {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
        case "mistral3" | "pixtral":
            text |= {"model_type": "mistral", "head_dim": 16}
            vision |= {"model_type": "pixtral", "image_size": 40, "head_dim": 16}
            more |= {"spatial_merge_size": 2} if family == "mistral3" else {"vision_feature_layer": -1}
            more |= {} if family == "mistral3" else {"vision_feature_select_strategy": "full"}
        case "paligemma":
            text |= {"model_type": "gemma", "head_dim": 16}
            vision |= {"model_type": "siglip_vision_model", "projection_dim": 32}
            more |= {"projection_dim": 32}
        case "internvl":
            text |= {"model_type": "qwen2"}
            vision |= {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]}
            more |= {"image_seq_length": 1, "downsample_ratio": 0.5}
        case "llava_onevision":
            text |= {"model_type": "qwen2"}
            vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
            more |= {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "video_token_id": TOKENS.index("<video>")}
            more |= {"vision_feature_select_strategy": "full"}
        case "smolvlm":
            vision |= {"model_type": "smolvlm_vision"}
            more |= {"scale_factor": 2, "pad_token_id": 1}
        case _:
            text |= {"model_type": f"{family}_text", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            text["rope_parameters"] |= {"mrope_section": [2, 3, 3], "mrope_interleaved": True}
            vision |= {"depth": 2, "num_heads": 2, "model_type": family}
            vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
            for name in ("vision_start", "vision_end"):
                more[f"{name}_token_id"] = TOKENS.index(f"<|{name}|>")
            more |= {"video_token_id": TOKENS.index("<|video_pad|>")}
            if family == "qwen2_vl":
                vision |= {"embed_dim": 32, "mlp_ratio": 2}
            else:
                vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32}
            if family == "qwen3_vl":
                text |= {"head_dim": 16}
                vision |= {
                    "model_type": "qwen3_vl_vision",
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                }
    name = "llava" if family == "pixtral" else family
    return {"model_type": name, "text_config": text, "vision_config": vision, **more}
