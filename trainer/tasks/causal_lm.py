"""Next-token prediction: `prompt` + `completion` (the completion is learned), `text` (everything is), or `messages`.

A prompt and its completion are tokenised apart and joined, so that the prompt's tokens in training are those of the
prompt alone at generation. BOS, where the tokenizer uses one, stands first exactly once; EOS ends the completion and is
learned. A conversation is tokenised as one text, exactly as its chat template writes it: nothing is added. Masks go by
position, never by token id: an EOS that is also the padding token is still learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.chat import Chat
from trainer.data.sample import Sample
from trainer.failures import DataError
from trainer.planning.layouts import has_plain_logits
from trainer.tasks.base import BaseTask, Predictions
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.forward import LanguageModelLoss


class CausalLM(BaseTask):
    """Turns records into samples of one piece; the stream splits those that are longer than a sequence."""

    auto_class = "AutoModelForCausalLM"
    structured = frozenset({"messages", "tools"})
    optional = frozenset({"tools"})
    splits = True
    predicts = False
    counted = "target_tokens"

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._data = config.data

    def objective(self, model: Any, attention: str, device: torch.device) -> LanguageModelLoss:
        settings = self.config.model
        fused = settings.fuses_loss(has_plain_logits(model.config.to_dict()))
        insists = settings.fused_loss is True
        loss = self.loss(model, self.tokenizer.pad_id, attention, device, self._data.packing, fused, insists)
        loss.longest = self._data.sequence_length
        if settings.compile and self._data.packing:  # every further shape would be compiled again
            loss.row_length = self._data.sequence_length
        return loss

    def loss(self, *arguments: Any) -> LanguageModelLoss:
        """The objective, from its arguments."""
        from trainer.forward import LanguageModelLoss

        return LanguageModelLoss(*arguments)

    @property
    def scored(self) -> tuple[str, ...]:
        return ("perplexity",)

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    @cached_property
    def chat(self) -> Chat:
        """Raises DataError where the tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"{self.tokenizer.origin} has no chat template, which `messages` need: use the tokenizer of an "
                "instruction-tuned model (model.tokenizer), or put a chat_template.jinja into its folder"
            )
        return Chat(
            self.tokenizer.chat_template,
            self.tokenizer.special_tokens,
            self._data.chat_template_arguments,
            self._data.loss_on,
        )

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        """Task column -> column of the file, for a source whose first record is given.

        Raises:
            DataError: the record has neither `text` nor `prompt` and `completion` nor `messages`.
        """
        known = {"text", "prompt", "completion", "messages", "tools"}
        unknown = sorted(set(source_columns) - known)
        if unknown:
            raise DataError(f"columns: {unknown[0]!r} is no column of causal-lm; known are {', '.join(sorted(known))}")
        names = {name: source_columns.get(name, name) for name in known}
        chosen: tuple[str, ...] = ("prompt", "completion")
        for name in ("text", "messages"):
            if name in source_columns or (not {"text", *chosen} & source_columns.keys() and names[name] in record):
                chosen = (name,)
        missing = [names[name] for name in chosen if names[name] not in record]
        if missing:
            raise DataError(
                f"no column {missing[0]!r}; the record has {', '.join(map(repr, record)) or 'none'}: map `text`, or "
                "`prompt` and `completion`, or `messages`, under `columns`"
            )
        if chosen == ("messages",):
            _ = self.chat
            chosen = ("messages", "tools")
        return {name: names[name] for name in chosen}

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        """A sample for each record of the task's columns, or what is wrong with it."""
        if records and "messages" in records[0]:
            return self._encode_chats(records)
        return [*self._encode_texts(records)]

    def _encode_texts(self, records: Sequence[dict[str, Any]]) -> list[Sample]:
        """Samples that are views of two arrays: one for each would cost more than all else here but the tokenizer."""
        parts = 1 if "text" in records[0] else 2
        texts: list[str] = []
        for record in records:
            texts += [record["text"]] if parts == 1 else [record["prompt"], record["completion"]]
        ids, ends = self.tokenizer.encode_flat(texts)
        starts = np.concatenate([[0], ends[:-1]]).reshape(-1, parts)
        ends = ends.reshape(-1, parts)
        first, learned, last = starts[:, 0], starts[:, -1], ends[:, -1]  # int64 [records] each, in ids
        # a text may bring BOS and EOS itself, written out: never twice
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        head, tail = np.full(len(first), bos is not None), np.full(len(first), eos is not None)
        some, answered = last > first, last > learned
        head[some] &= ids[first[some]] != bos
        tail[answered] &= ids[last[answered] - 1] != eos

        lengths = last - first + head + tail
        sample_ends = np.cumsum(lengths)
        begins = sample_ends - lengths
        tokens = np.empty(int(sample_ends[-1]), dtype=np.int32)
        tokens[begins[head]] = -1 if bos is None else bos
        tokens[sample_ends[tail] - 1] = -1 if eos is None else eos
        # ids move by the BOS and EOS before them, record by record
        tokens[np.arange(len(ids)) + np.repeat(begins + head - first, last - first)] = ids
        # learned: what follows the prompt, if anything; never the first token of all, predicted from nothing
        given = np.where(answered, np.maximum(head + learned - first, 1), lengths)
        targets = np.arange(len(tokens)) - np.repeat(begins, lengths) >= np.repeat(given, lengths)
        return [
            Sample(tokens[begin:end], targets[begin:end])
            for begin, end in zip(begins.tolist(), sample_ends.tolist(), strict=True)
        ]

    def _encode_chats(self, records: Sequence[dict[str, Any]]) -> list[Sample | str]:
        results: list[Sample | str] = []
        rendered = []
        for record in records:
            try:
                rendered.append(self.chat.render(record["messages"], record.get("tools"), not self.labelled))
                results.append("")
            except ValueError as error:
                results.append(str(error))
        encoded = iter(self.tokenizer.encode_with_starts([text for text, _ in rendered]))
        conversations = iter(rendered)
        for place, problem in enumerate(results):
            if problem:
                continue
            tokens, starts = next(encoded)
            text, learned = next(conversations)
            if learned is None:  # the place of the answer is then the one target
                tokens, starts, learned = np.append(tokens, tokens[-1:]), np.append(starts, -1), [(-1, 0)]
            # a token that begins before a span belongs to what the model is given
            targets = np.zeros(len(tokens), dtype=bool)
            for start, end in learned:
                targets |= (starts >= start) & (starts < end)
                self.joined += bool(text[start:end][:1].strip()) and start not in starts
            targets[:1] = False
            results[place] = Sample(tokens, targets)
        return results
