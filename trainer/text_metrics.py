"""Scores of generated texts against references, by the libraries that papers use. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from trainer.config.generation import WritingTask

References = Sequence[Sequence[str]]  # of each text, one or more


def text_scores(
    metrics: Sequence[str], texts: Sequence[str], references: References, task: WritingTask
) -> tuple[dict[str, float], dict[str, str]]:
    """(score by metric, signature by metric of sacreBLEU's); nothing for no texts.

    BLEU, chrF and TER are sacreBLEU's, of the corpus, 0 to 100 (TER: and above); ROUGE is the mean F1 of rouge-score,
    0 to 1, each text against the best of its references; `exact_match` and `final_answer` are shares, 0 to 1.
    """
    scores: dict[str, float] = {}
    signatures: dict[str, str] = {}
    if not texts:
        return scores, signatures
    rouge = [name for name in metrics if name.startswith("rouge")]
    for name in metrics:
        if name in ("bleu", "chrf", "ter"):
            scores[name], signatures[name] = _sacrebleu(name, texts, references, task.bleu_tokenizer)
        elif name == "exact_match":
            scores[name] = fmean(t.strip() in {r.strip() for r in of} for t, of in zip(texts, references, strict=True))
        elif name == "final_answer":
            scores[name] = fmean(
                final_answer(task.answer_pattern, text) in {final_answer(task.answer_pattern, r) for r in of} - {None}
                for text, of in zip(texts, references, strict=True)
            )
    if rouge:
        scores |= _rouge(rouge, texts, references, task.rouge_stemmer)
    return scores, signatures


def _sacrebleu(name: str, texts: Sequence[str], references: References, tokenizer: str) -> tuple[float, str]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    metric: Any = BLEU(tokenize=tokenizer) if name == "bleu" else CHRF() if name == "chrf" else TER()
    most = max(map(len, references))
    streams = [[of[i] if i < len(of) else None for of in references] for i in range(most)]
    score = float(metric.corpus_score(list(texts), streams).score)
    return score, str(metric.get_signature())


def _rouge(names: Sequence[str], texts: Sequence[str], references: References, stemmer: bool) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    scorer = RougeScorer(list(names), use_stemmer=stemmer)
    found = [scorer.score_multi(list(of), text) for text, of in zip(texts, references, strict=True)]
    return {name: math.fsum(float(one[name].fmeasure) for one in found) / len(found) for name in names}


def final_answer(pattern: str, text: str) -> str | None:
    """What the last match of ``pattern`` captures; numbers without commas, signs of currency and a full stop."""
    matches = re.findall(pattern, text)
    if not matches:
        return None
    answer = matches[-1] if isinstance(matches[-1], str) else matches[-1][0]
    return answer.replace(",", "").strip("$ \n").rstrip(".")


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of ``k`` programs passes, from so many samples of which some passed.

    The unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021. Raises ValueError for k > n.
    """
    if not 0 <= passed <= samples or not 0 < k <= samples:
        raise ValueError(f"pass@{k} of {passed} passed among {samples} is not defined")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
