"""A tag for each word, by the model's own token-classification head: named entities, parts of speech.

A word's first sub-word carries its tag, the others are ignored; the loss is the mean cross-entropy over tagged words.
Sentences that are too long are split between words (`data.on_long: split`). A word without any sub-word (a tokenizer
may drop odd characters), or cut off by `truncate`, is not learned and counts as predicted "O" in the scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.config.tasks import TokenClassificationTask
from trainer.data.sample import Sample
from trainer.tasks.base import Predictions, named_columns
from trainer.tasks.encoder import (
    EncoderTask,
    Labels,
    cross_entropy,
    inputs_of,
    labels_of,
    set_labels,
    with_labels,
)
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

# names of columns in well-known data, in the order in which they are looked for
_LAYOUTS = (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags"), ("words", "labels"), ("tokens", "labels"))
_NO_TAG = -1
_ASKED = -2  # of a record without tags


class TokenClassification(EncoderTask):
    """Sentences as lists of words."""

    auto_class = "AutoModelForTokenClassification"
    structured = frozenset({"tokens", "tags"})
    label_columns = frozenset({"tags"})
    counted = "target_tokens"
    pieces = True

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        config = with_labels(config, "tags", [tags for _, tags in _LAYOUTS])
        super().__init__(config, tokenizer)
        self.task = task = cast("TokenClassificationTask", config.task)
        self.labels = Labels(task.labels or ())
        self.scheme = scheme_of(self.labels.names) if task.scheme == "auto" else task.scheme
        _words_apart(self.fast)

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        if not source_columns:
            layouts = (layout for layout in _LAYOUTS if all(name in record for name in self.needed(*layout)))
            source_columns = dict(zip(self.needed("tokens", "tags"), next(layouts, ()), strict=False))
        return named_columns("token-classification", self.needed("tokens", "tags"), (), source_columns, record)

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        tags = [self._tags(record) for record in records]
        good = [(r["tokens"], found) for r, found in zip(records, tags, strict=True) if not isinstance(found, str)]
        made = iter(self._encode(good))
        return [found if isinstance(found, str) else next(made) for found in tags]

    def configure(self, model_config: Any) -> None:
        set_labels(model_config, self.labels.names)
        super().configure(model_config)

    def loss(self, output: Any, samples: Sequence[Sample]) -> torch.Tensor:
        chosen = output.logits[_places(samples, output.logits.shape[1], output.logits.device)]
        return cross_entropy(chosen, labels_of(samples), self.task.label_smoothing, self.task.class_weights)

    def read(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """(gold, predicted) of each sample: ids of tags, one a word; -1 stands for no tag."""
        best = output.logits.argmax(-1).cpu().numpy()
        found = []
        for row, sample in zip(best, samples, strict=True):
            gold, words = sample.reference
            predicted = np.full(len(gold), _NO_TAG)
            predicted[words] = row[: len(sample.tokens)][sample.targets]
            found.append((gold, predicted.tolist()))
        return found

    @property
    def scored(self) -> tuple[str, ...]:
        return ("accuracy", *(() if self.scheme == "none" else ("precision", "recall", "f1")))

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        gold, predicted = self.sentences(predictions)
        if not gold:
            return {}
        pairs = [pair for g, p in zip(gold, predicted, strict=True) for pair in zip(g, p, strict=True)]
        scores = {"accuracy": sum(g == p for g, p in pairs) / max(len(pairs), 1)}
        if self.scheme != "none":
            from seqeval import scheme
            from seqeval.metrics.v1 import precision_recall_fscore_support  # the strict mode

            precision, recall, f1, _ = precision_recall_fscore_support(
                gold, predicted, average="micro", scheme=getattr(scheme, self.scheme), zero_division=0
            )
            scores |= {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
        return scores

    def sentences(self, predictions: Predictions) -> tuple[list[list[str]], list[list[str]]]:
        """(gold, predicted) tags of each record, where a word has a gold one; pieces of a record are joined."""
        gold, predicted = [], []
        for _, pieces in groupby(predictions, key=lambda item: item[0][:2]):
            pairs = [pair for _, (g, p) in pieces for pair in zip(g, p, strict=True) if pair[0] != _NO_TAG]
            gold.append([self._name(g) for g, _ in pairs])
            predicted.append([self._name(p) for _, p in pairs])
        return gold, predicted

    def read_answers(self, output: Any, samples: Sequence[Sample]) -> list[Any]:
        """Ids of tags, one a word."""
        return [predicted for _, predicted in self.read(output, samples)]

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """The names of the tags, one a word."""
        return {"tags": [self._name(tag) for piece in found for tag in piece]}

    def _name(self, tag: int) -> str:
        return "O" if tag == _NO_TAG else self.labels.names[tag]

    def _encode(self, sentences: Sequence[tuple[list[str], list[int]]]) -> list[list[Sample]]:
        results: list[list[Sample]] = []
        for (words, tags), encoding in zip(
            sentences, self.encode_texts([words for words, _ in sentences], is_pretokenized=True), strict=True
        ):
            if not encoding.overflowing or self.config.data.on_long != "split":
                results.append([_sample(encoding, tags, bool(encoding.overflowing))])
                continue
            bounds = _cuts(encoding, len(words), self._room)
            parts = [slice(start, end) for start, end in pairwise(bounds)]
            encodings = self.encode_texts([words[part] for part in parts], is_pretokenized=True)
            results.append([_sample(e, tags[part], False) for e, part in zip(encodings, parts, strict=True)])
        return results

    @property
    def _room(self) -> int:
        """Tokens of a sequence besides the special ones."""
        return int(self.config.data.sequence_length - self.fast.num_special_tokens_to_add(False))

    def _tags(self, record: dict[str, Any]) -> list[int] | str:
        words = record["tokens"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return f"tokens is {type(words).__name__}, expected a list of strings"
        if not self.labelled:
            return [_ASKED] * len(words)
        tags = record["tags"]
        if not isinstance(tags, list):
            return f"tags is {type(tags).__name__}, expected a list"
        if len(words) != len(tags):
            return f"{len(words)} tokens, but {len(tags)} tags"
        found = [_NO_TAG if tag is None or tag == _NO_TAG else self.labels.id(tag) for tag in tags]
        return next((tag for tag in found if isinstance(tag, str)), cast("list[int]", found))


def scheme_of(labels: Sequence[str]) -> str:
    """How names of tags mark entities, by their prefixes: IOBES, BILOU, IOB2, or none. Tags of IOB1 look like IOB2."""
    prefixes = {name[:1] if name[1:2] == "-" else name for name in labels}
    for scheme, letters in (("IOB2", "IOB"), ("IOBES", "IOBES"), ("BILOU", "BILOU")):
        if "B" in prefixes and prefixes <= set(letters):
            return scheme
    return "none"


def _sample(encoding: Any, tags: Sequence[int], truncated: bool) -> Sample:
    tokens, inputs = inputs_of(encoding)
    targets, words = np.zeros(len(tokens), dtype=bool), []
    last: int | None = None
    for place, word in enumerate(encoding.word_ids):
        if word is not None and word != last and tags[word] != _NO_TAG:
            words.append(word)
            targets[place] = True
        last = word
    labels = None if _ASKED in tags else np.array([tags[word] for word in words], dtype=np.int64)
    return Sample(tokens, targets, labels, inputs, (list(tags), words), truncated)


def _cuts(encoding: Any, words: int, room: int) -> list[int]:
    """Where a sentence is split, from 0 to its number of words: as many whole words a piece as there is room for."""
    sizes = Counter(word for part in (encoding, *encoding.overflowing) for word in part.word_ids if word is not None)
    bounds, filled = [0], 0
    for word in range(words):
        if filled and filled + sizes[word] > room:
            bounds.append(word)
            filled = 0
        filled += sizes[word]
    return [*bounds, words]


def _places(samples: Sequence[Sample], width: int, device: torch.device) -> torch.Tensor:
    """Bool [samples, width]: the targets."""
    import torch

    places = np.zeros((len(samples), width), dtype=bool)
    for row, sample in zip(places, samples, strict=True):
        row[: len(sample.targets)] = sample.targets
    return torch.from_numpy(places).to(device)


def _words_apart(fast: Any) -> None:
    """Byte-level tokenizers tell the words of a list apart by a space before each, as RoBERTa's do where told to."""
    from tokenizers import pre_tokenizers

    if isinstance(fast.pre_tokenizer, pre_tokenizers.ByteLevel):
        fast.pre_tokenizer.add_prefix_space = True
