"""Next-token prediction: `prompt` + `completion` (the completion is learned), or `text` (everything is).

A prompt and its completion are tokenised apart and joined, so that the prompt's tokens in training are those of the
prompt alone at generation. BOS, where the tokenizer uses one, stands first exactly once; EOS ends the completion and is
learned. Masks go by position, never by token id: an EOS that is also the padding token is still learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.sample import Sample
from trainer.failures import DataError
from trainer.tokenizer import Tokenizer


class CausalLM:
    """Turns records into samples of one piece; the stream splits those that are longer than a sequence."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        """Task column -> column of the file, for a source whose first record is given.

        Raises:
            DataError: the record has neither `text` nor `prompt` and `completion`.
        """
        known = {"text", "prompt", "completion"}
        unknown = sorted(set(source_columns) - known)
        if unknown:
            raise DataError(f"columns: {unknown[0]!r} is no column of causal-lm; known are {', '.join(sorted(known))}")
        names = {name: source_columns.get(name, name) for name in known}
        chosen = ("text",) if "text" in source_columns else ("prompt", "completion")
        if not source_columns and "text" in record:
            chosen = ("text",)
        missing = [names[name] for name in chosen if names[name] not in record]
        if missing:
            raise DataError(
                f"no column {missing[0]!r}; the record has {', '.join(map(repr, record)) or 'none'}: map `text`, or "
                "`prompt` and `completion`, under `columns`"
            )
        return {name: names[name] for name in chosen}

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Sample]:
        """One sample per record. Records have the task's columns, `text` or `prompt` and `completion`, as strings."""
        texts: list[str] = []
        for record in records:
            texts += [record["text"]] if "text" in record else [record["prompt"], record["completion"]]
        encoded = iter(self.tokenizer.encode_batch(texts))
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        eos = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        samples = []
        for record in records:
            prompt = np.zeros(0, dtype=np.int32) if "text" in record else next(encoded)
            learned = next(encoded)
            # a text may bring these tokens itself, written out: never twice
            head = [] if (prompt if len(prompt) else learned)[:1].tolist() == bos else bos
            tail = [] if learned[-1:].tolist() == eos else eos
            tokens = np.concatenate([np.array(head, dtype=np.int32), prompt, learned, np.array(tail, dtype=np.int32)])
            targets = np.zeros(len(tokens), dtype=bool)
            targets[max(len(head) + len(prompt), 1) :] = True  # the first token of all is predicted from nothing
            if not len(learned):
                targets[:] = False
            samples.append(Sample(tokens, targets))
        return samples
