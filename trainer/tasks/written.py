"""What tasks share whose answers are texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from trainer.config.generation import WritingTask
from trainer.config.schema import LaunchConfig
from trainer.tasks.base import BaseTask, Predictions
from trainer.text_metrics import text_scores
from trainer.tokenizer import Tokenizer


class WrittenTask(BaseTask):
    """A task whose answers are generated texts, scored against references.

    What is predicted of a sample is {"source", "references", "texts"}.

    Attributes:
        settings: the config's `task` section, with `generation`.
        metrics: names of scores.
    """

    metrics: Sequence[Any]

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.settings: Any = config.task
        self.predicts = cast("WritingTask", config.task).generation is not None

    def decoded(self, texts: Sequence[Sequence[int]]) -> list[str]:
        """Generated token ids as texts, up to the first of `generation.stop`."""
        stops = self.settings.generation.stop if self.settings.generation else ()
        return [cut_at(self.tokenizer.decode(ids), stops) for ids in texts]

    @property
    def scored(self) -> tuple[str, ...]:
        return tuple(self.metrics) if self.settings.generation else ()

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        found = [written for _, written in predictions]
        texts, references = [one["texts"][0] for one in found], [one["references"] for one in found]
        scores, self.signatures = text_scores(self.metrics, texts, references, self.settings)
        self.shown = found[: self.settings.generation.shown] if self.settings.generation else []
        return scores

    def answer(self, found: Sequence[Any]) -> dict[str, Any]:
        """The text, and all texts where several are drawn."""
        texts = found[0]["texts"]
        return {"text": texts[0], **({"texts": texts} if len(texts) > 1 else {})}


def cut_at(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of ``stops``."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
