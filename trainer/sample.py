"""Completes a prompt with an exported model, and with the same model before training, by plain transformers.

`python -P -m trainer.sample --export DIR --prompt-file FILE [--max-new-tokens N] [--seed S]` prints one JSON object:
{"before": text, "after": text}. dsft takes no part in the generation: the export stands alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, seed: int) -> str:
    """The text that the model continues `prompt` with, sampled cautiously (top 5 at temperature 0.7)."""
    import torch

    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    bos = torch.full((1, 1), tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else encoded[:, :0]
    tokens = torch.cat([bos, encoded], dim=1)
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            top_k=5,
            temperature=0.7,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    text: str = tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete a prompt before and after training")
    parser.add_argument("--export", type=Path, required=True, help="Hugging Face folder of the trained model")
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompt = arguments.prompt_file.read_text(encoding="utf-8")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.export)
    torch.manual_seed(arguments.seed)
    config = AutoConfig.from_pretrained(arguments.export)
    untrained = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    trained = AutoModelForCausalLM.from_pretrained(arguments.export, dtype=torch.float32).eval()
    samples = {
        name: complete(model, tokenizer, prompt, arguments.max_new_tokens, arguments.seed)
        for name, model in (("before", untrained), ("after", trained))
    }
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
