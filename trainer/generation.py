"""Generation on all ranks at once: the same text at any number of ranks, in bounded memory.

Under ZeRO-3 every forward pass gathers parameters from all ranks, so all of them make the same number of passes: a rank
that has finished its texts, or has none, goes on with what it has until the last one is done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer import collectives
from trainer.config.generation import GenerationConfig
from trainer.data.sample import Sample
from trainer.engine import Engine, gathered
from trainer.tasks.base import Predictions
from trainer.tokenizer import Tokenizer

_PAD_TO = 8  # tokens; CPU kernels are kept for every shape that they meet


@dataclass(frozen=True)
class Prompt:
    """What text is generated from: token ids, a number of one's own for the draws, and further inputs (images)."""

    tokens: np.ndarray
    key: tuple[int, ...]
    inputs: Mapping[str, np.ndarray] | None = None


class Generator:
    """Generates texts with a model; to be made on every rank.

    Args:
        model: whole or partitioned; encoder-decoder models read prompts by their encoder, others continue them.
        settings: the config's `task.generation`.
        tokenizer: knows the end of a text, and padding.
        device: of the model.
        more: the model's further inputs for a batch of prompts, of which one has some, and their ids [prompts, length].
        blank: a prompt with further inputs, for batches without any: ranks then run the same parts of the model.
    """

    def __init__(
        self,
        model: Any,
        settings: GenerationConfig,
        tokenizer: Tokenizer,
        device: torch.device,
        more: Callable[[Sequence[Prompt], np.ndarray], Mapping[str, torch.Tensor]] | None = None,
        blank: Prompt | None = None,
    ) -> None:
        self._settings, self._device, self._more, self._blank = settings, device, more, blank
        # ranks of `dsft predict` have none: they never wait for one another
        self._group = collectives.new_group(collectives.TIMEOUT_SECONDS) if dist.is_initialized() else None
        # `generate` reads images outside of the model's forward pass, in which ZeRO-3 gathers what is its own
        readers = [module for module in model.modules() if hasattr(module, "get_image_features")]
        self._outside = [parameter for module in readers for parameter in module.parameters(recurse=False)]
        self._decoder_only = not model.config.is_encoder_decoder
        self._positions = _learned_positions(model) if self._decoder_only else None
        config = copy.deepcopy(model.generation_config)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self._ends = sorted({end for end in (*ends, tokenizer.eos_id) if end is not None})
        fallback = self._ends[0] if self._ends else 0  # hidden by the mask: any id will do
        self._pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_id or fallback
        config.update(
            max_new_tokens=settings.max_new_tokens,
            max_length=None,
            min_length=0,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            do_sample=False,  # see Draw
            temperature=None,
            top_k=None,
            top_p=None,
            num_return_sequences=1,
            use_cache=True,  # off in the model's config, for training
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
            return_dict_in_generate=False,
        )
        if not self._decoder_only and config.decoder_start_token_id is None:
            config.decoder_start_token_id = model.config.decoder_start_token_id
        self._config = config

    def __call__(self, engine: Engine, prompts: Sequence[Prompt]) -> list[list[list[int]]]:
        """`samples_per_prompt` lists of new token ids for each prompt, without the end.

        Where parameters are partitioned, every rank has to make the call.
        """
        count = self._settings.samples_per_prompt
        # of about the same length together: less padding
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
        jobs = [(i, sample) for i in order for sample in range(count)]
        size = self._settings.batch_size
        rounds = -(-len(jobs) // size)
        found: list[list[list[int]]] = [[[] for _ in range(count)] for _ in prompts]
        with engine.generating() as (model, synced), torch.no_grad():
            if synced:
                rounds = collectives.largest(self._group, rounds)
            for start in range(0, rounds * size, size):
                batch = jobs[start : start + size]
                rows = self._generate(model, synced, [prompts[i] for i, _ in batch], [sample for _, sample in batch])
                for (i, sample), row in zip(batch, rows, strict=False):
                    found[i][sample] = row
        return found

    def answers(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        prompt: Callable[[Sample], np.ndarray],
        written: Callable[[Sample, list[list[int]]], Any],
    ) -> Predictions:
        """What is ``written`` of the texts generated from the ``prompt`` of each sample; see `__call__`."""
        origins = [sample.origin or (0, 0, 0) for sample in samples]
        prompts = [Prompt(prompt(one), of, one.inputs) for one, of in zip(samples, origins, strict=True)]
        texts = self(engine, prompts)
        return [(of, written(one, found)) for of, one, found in zip(origins, samples, texts, strict=True)]

    def _generate(self, model: Any, synced: bool, prompts: list[Prompt], samples: list[int]) -> list[list[int]]:
        if self._blank is not None and not any(prompt.inputs for prompt in prompts):
            prompts, samples = [*prompts, self._blank], [*samples, 0]
        rows = [prompt.tokens for prompt in prompts] or [np.full(1, self._pad, dtype=np.int32)]
        width = -(-max(map(len, rows)) // _PAD_TO) * _PAD_TO
        ids = np.full((len(rows), width), self._pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for index, row in enumerate(rows):
            # a decoder goes on from the last column, so that padding has to come first
            place = slice(width - len(row), width) if self._decoder_only else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        draws = []
        if self._settings.do_sample:
            keys = [(*prompt.key, sample) for prompt, sample in zip(prompts, samples, strict=True)] or [(0,)]
            draws = [Draw(self._settings, keys)]
        hook = model.register_forward_pre_hook(self._clamped, with_kwargs=True)
        try:
            with gathered(self._outside):
                output = model.generate(
                    input_ids=torch.from_numpy(ids).to(self._device),
                    attention_mask=torch.from_numpy(mask).to(self._device),
                    generation_config=self._config,
                    logits_processor=draws,
                    synced_gpus=synced,
                    **(self._more(prompts, ids) if self._more else {}),
                )
        finally:
            hook.remove()
        texts = output[:, width if self._decoder_only else 1 :].tolist()
        return [self._ended(text, len(row)) for text, row in zip(texts, rows, strict=True)]

    def _clamped(self, _: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Rows that are at the model's last position stay there, while others, or those of other ranks, go on."""
        if self._positions is not None and named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"].clamp(max=self._positions - 1)
        return arguments, named

    def _ended(self, text: list[int], prompt: int) -> list[int]:
        """Up to its end, or to the model's last position behind a prompt of so many tokens."""
        end = next((place for place, token in enumerate(text) if token in self._ends), len(text))
        return text[: end if self._positions is None else min(end, self._positions - prompt + 1)]


def _learned_positions(model: Any) -> int | None:
    """How many positions a model has an embedding of (GPT-2, OPT); None: it computes them, of any number."""
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings()]
    # OPT has two more than it says
    return positions if positions and any(0 <= m.num_embeddings - positions <= 2 for m in tables) else None


class Draw:
    """Draws each row's next token, by random numbers that depend on the row's key alone.

    In place of torch.multinomial, whose draws depend on the rows beside it. Temperature, top-k and top-p are those of
    transformers. After it only the drawn token is left, which greedy search then takes.
    """

    def __init__(self, settings: GenerationConfig, keys: Sequence[tuple[int, ...]]) -> None:
        from transformers.generation.logits_process import (
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._warpers: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(settings.top_p))
        self._randoms = [np.random.default_rng([settings.seed, *key]) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] scores -> the same shape, 0 for the drawn token and -inf elsewhere."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        sums = scores.double().softmax(-1).cumsum(-1)
        uniform = torch.tensor([[random.random()] for random in self._randoms], dtype=torch.float64).to(sums.device)
        drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)
