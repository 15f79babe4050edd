"""Translation and summarization with encoder-decoder models: `source` is read, `target` is learned and scored.

Both end as the tokenizer ends a text, at least with EOS. They share `data.sequence_length`: a target is cut to
`task.max_target_tokens`, a source to what is left. A target may be a list of references: the first one is learned, an
evaluation compares with all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.sample import Sample
from trainer.failures import DataError, UserError
from trainer.tasks.base import named_columns
from trainer.tasks.written import WrittenTask
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from trainer.seq2seq import SequenceToSequenceObjective

_DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "translation": ("bleu", "chrf"),
    "summarization": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
}

_ALSO_KNOWN_AS: dict[str, dict[str, str]] = {"summarization": {"text": "source", "summary": "target"}}

Encode = Callable[[list[str]], list[list[int]]]


class SequenceToSequence(WrittenTask):
    """Pairs of a source and a target."""

    auto_class = "AutoModelForSeq2SeqLM"
    structured = label_columns = frozenset({"target"})
    counted = "target_tokens"

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._also_known_as = _ALSO_KNOWN_AS.get(config.task.type, {})
        self.metrics = self.settings.metrics or _DEFAULT_METRICS[config.task.type]
        most = config.data.sequence_length
        self._target_limit = self.settings.max_target_tokens or max(most // 2, 1)
        self._source_limit = most - self._target_limit
        if self._source_limit < 1:
            raise UserError(
                f"task.max_target_tokens ({self._target_limit}) leaves nothing of data.sequence_length ({most}) for "
                "sources"
            )
        self._language_id: int | None = None
        source, target = self._encoders()
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self._source = _Framed(source, end)
        self._target = _Framed(target, end)

    def objective(self, model: Any, attention: str, device: torch.device) -> SequenceToSequenceObjective:
        from trainer.seq2seq import SequenceToSequenceObjective

        self.configure_generation(model.generation_config)
        return SequenceToSequenceObjective(model, self, device)

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        also = self._also_known_as
        named = {also.get(name, name): column for name, column in source_columns.items()}
        for other, name in also.items():
            if name not in named and name not in record and other in record:
                named[name] = other
        return named_columns(self.config.task.type, self.needed("source", "target"), (), named, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        results: list[Sample | list[Sample] | str] = []
        good: list[tuple[int, str, list[str]]] = []
        for found in records:  # columns that a template names are still called as there
            record = {self._also_known_as.get(name, name): value for name, value in found.items()}
            target = record["target"] if self.labelled else ""  # its end is then the one target
            references = [target] if isinstance(target, str) else target
            if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
                results.append(f"target is {type(target).__name__}, expected a text or a list of texts")
                continue
            good.append((len(results), record["source"], references))
            results.append("")
        sources = self._source([self.settings.source_prefix + source for _, source, _ in good], self._source_limit)
        targets = self._target([references[0] for _, _, references in good], self._target_limit)
        for (place, source, references), (given, cut), (learned, cut_too) in zip(good, sources, targets, strict=True):
            results[place] = Sample(
                np.array([*given, *learned], dtype=np.int32),
                np.arange(len(given) + len(learned)) >= len(given),
                reference={"source": source, "references": references},
                truncated=cut or cut_too,
            )
        return results

    def configure(self, model_config: Any) -> None:
        if not getattr(model_config, "is_encoder_decoder", False):
            raise UserError(
                f"{self.config.task.type} needs an encoder-decoder model (t5, bart, mbart, marian, ...), and "
                f"{model_config.model_type} is none: fine-tune it with the task causal-lm and a data template"
            )
        if model_config.model_type == "encoder-decoder":  # of two models: the second may be described as it is alone
            model_config.decoder.is_decoder = model_config.decoder.add_cross_attention = True
        if model_config.pad_token_id is None:
            model_config.pad_token_id = self.tokenizer.pad_id
        if getattr(model_config, "eos_token_id", None) is None:
            model_config.eos_token_id = self.tokenizer.eos_id
        if model_config.pad_token_id is None:
            raise DataError(f"{self.tokenizer.origin} has no padding token, which {self.config.task.type} needs")
        if getattr(model_config, "decoder_start_token_id", None) is None:
            model_config.decoder_start_token_id = model_config.pad_token_id  # as T5 begins

    def written(self, sample: Sample, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What an evaluation needs of a sample and the token ids that were generated for it."""
        return {**sample.reference, "texts": [text.strip() for text in self.decoded(texts)]}

    def _encoders(self) -> tuple[Encode, Encode]:
        """Token ids of sources and of targets with the tokenizer's special ones: they differ by language."""
        fast, settings = self.tokenizer.backend, self.settings
        if fast is not None and settings.target_language is None:

            def encode(texts: list[str]) -> list[list[int]]:
                return [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=True)]

            return encode, encode
        import transformers

        languages = {"src_lang": settings.source_language, "tgt_lang": settings.target_language}
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            self.tokenizer.origin,
            trust_remote_code=self.config.model.trust_remote_code,
            **({} if settings.target_language is None else languages),
        )
        for language in (settings.source_language, settings.target_language):
            if language is not None and language not in tokenizer.get_vocab():
                codes = list(getattr(tokenizer, "additional_special_tokens", []))[:8]
                known = f"; it has {', '.join(codes)}, ..." if codes else ""
                raise DataError(f"{self.tokenizer.origin} knows no language {language!r}{known}")
        if settings.target_language is not None:
            self._language_id = int(tokenizer.convert_tokens_to_ids(settings.target_language))
        return (
            lambda texts: list(tokenizer(texts)["input_ids"]) if texts else [],
            lambda texts: list(tokenizer(text_target=texts)["input_ids"]) if texts else [],
        )

    def configure_generation(self, generation: Any) -> None:
        """Texts begin with the target's language code where the tokenizer puts it first; else decoders start by it."""
        if self._language_id is None:
            return
        if self._language_id in self._target.head:
            generation.forced_bos_token_id = self._language_id
        else:
            generation.decoder_start_token_id = self._language_id


class _Framed:
    """Token ids of texts, cut between the special tokens that begin and end them."""

    def __init__(self, encode: Encode, end: list[int]) -> None:
        self._encode = encode
        # an empty text is what the tokenizer adds to every text; which of it comes first, another text tells
        nothing, text = encode(["", "a"])
        self.head = text[: _shared(text, nothing)]
        tail = text[len(text) - _shared(text[::-1], nothing[::-1]) :]
        self._tail_length, self._end = len(tail), [] if set(end) <= set(tail) else end

    def __call__(self, texts: list[str], limit: int) -> list[tuple[list[int], bool]]:
        """(ids, whether tokens were cut) of each text."""
        results = []
        for ids in self._encode(texts):
            inner = ids[: len(ids) - self._tail_length]
            tail = [*ids[len(inner) :], *self._end]
            room = max(limit - len(tail), 0)
            results.append(([*inner[:room], *tail][:limit], len(inner) > room))
        return results


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first items two lists have in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
