"""Plain DeepSpeed, as a user without dsft has it: two steps of a tiny Llama, `save_checkpoint`, and its weights.

    torchrun ... deepspeed_program.py OUTPUT STAGE [frozen]

OUTPUT/model: a Hugging Face folder with config and tokenizer of the untrained model; OUTPUT/checkpoint: DeepSpeed's;
OUTPUT/expected.safetensors: the trained weights, as gathered on rank 0.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it would be compiled


def config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "steps_per_print": 10**9,
    }


def main() -> None:
    output, stage = Path(sys.argv[1]), int(sys.argv[2])
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=24,
            intermediate_size=41,  # not divisible by two ranks
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    rank = int(os.environ["RANK"])
    if rank == 0:
        model.save_pretrained(output / "model")
    if "frozen" in sys.argv:
        model.model.layers[0].mlp.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, 1e-2), config=config(stage))
    for step in range(2):
        ids = torch.randint(0, 260, (1, 16), generator=torch.Generator().manual_seed(7 * rank + step))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(output / "checkpoint"))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        if rank == 0:
            weights = {name: value.detach().float().clone() for name, value in engine.module.named_parameters()}
            save_file(weights, output / "expected.safetensors")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
