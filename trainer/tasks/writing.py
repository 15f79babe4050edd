"""causal-lm whose evaluation lets the model write: the answers to prompts, scored as texts or run as programs.

What is generated from is a sample up to its last stretch of targets: a prompt, a conversation before its last answer;
of plain text the first half. Programs come in the layouts of HumanEval (`prompt`, `canonical_solution`, `test`,
`entry_point`) and MBPP (`text`, `code`, `test_list`, `test_setup_code`), known by their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.sample import Sample
from trainer.tasks.base import Predictions
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.written import WrittenTask
from trainer.text_metrics import pass_at_k
from trainer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trainer.lm_generation import WritingLoss

_LAYOUTS = (
    {"prompt": "prompt", "completion": "canonical_solution", "tests": "test", "entry_point": "entry_point"},
    {"prompt": "text", "completion": "code", "tests": "test_list", "setup": "test_setup_code"},
)
_CODE_COLUMNS = frozenset({"tests", "entry_point", "setup"})


class WritingCausalLM(WrittenTask, CausalLM):
    """Next-token prediction, with generation at evaluation."""

    structured = CausalLM.structured | {"tests"}
    optional = CausalLM.optional | _CODE_COLUMNS
    label_columns = frozenset({"completion"})

    def __init__(self, config: LaunchConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.code = self.settings.code_execution
        self.metrics = self.settings.metrics or (() if self.code.enabled else ("exact_match",))

    def loss(self, *arguments: Any) -> WritingLoss:
        from trainer.lm_generation import WritingLoss

        return WritingLoss(self, *arguments)

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        if self.code.enabled and not source_columns:
            for layout in _LAYOUTS:
                if all(column in record for column in layout.values()):
                    source_columns = dict(layout)
        tests = {name: column for name, column in source_columns.items() if name in _CODE_COLUMNS}
        others = {name: column for name, column in source_columns.items() if name not in _CODE_COLUMNS}
        prompt = others.get("prompt", "prompt")
        if not self.labelled and prompt in record and not {"text", "messages"} & others.keys():
            return {"prompt": prompt, **tests}
        return {**super().columns(others, record), **tests}

    def encode(self, records: Sequence[dict[str, Any]]) -> Sequence[Sample | list[Sample] | str]:
        shown = [self._prompted(record) for record in records]
        plain = [{name: value for name, value in record.items() if name not in _CODE_COLUMNS} for record in shown]
        results: list[Sample | list[Sample] | str] = []
        for record, sample in zip(shown, super().encode(plain), strict=True):
            if problem := self._untested(record):
                sample = problem
            elif isinstance(sample, Sample):
                if not self.labelled and "prompt" in record:  # its end, or what would be there, is the one target
                    tokens = sample.tokens
                    tokens = tokens if self.tokenizer.eos_id is not None else np.append(tokens, tokens[-1:])
                    sample = replace(sample, tokens=tokens, targets=np.arange(len(tokens)) == len(tokens) - 1)
                code = {name: record[name] for name in _CODE_COLUMNS if record.get(name)}
                about = {"code": {**code, "prompt": record["prompt"]} if code else None, "prompted": "prompt" in record}
                sample = replace(sample, reference=about)
            results.append(sample)
        return results

    def _untested(self, record: dict[str, Any]) -> str | None:
        """Why a record's tests cannot be run; None: they can, or are not to be."""
        tests = record.get("tests")
        if not self.code.enabled or not _CODE_COLUMNS & record.keys():
            return None
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            return None
        if isinstance(tests, str) and record.get("entry_point"):
            return None
        return "tests: expected a list of texts, or a text that checks the function `entry_point`"

    def _prompted(self, record: dict[str, Any]) -> dict[str, Any]:
        if isinstance(record.get("tests"), list) and record["tests"]:
            # a problem in words: as a comment, with the first test, which gives the function's name
            record = {**record, "prompt": f'"""\n{record["prompt"]}\n{record["tests"][0]}\n"""\n'}
        if not self.labelled and "prompt" in record:
            record = {**record, "completion": ""}
        return record

    def prompt_length(self, sample: Sample) -> int:
        """How many of a sample's tokens text is generated from."""
        others = np.flatnonzero(~sample.targets[: np.flatnonzero(sample.targets)[-1]])
        length = int(others[-1]) + 1 if len(others) else 0
        return length if length > 1 or sample.reference["prompted"] else max(len(sample.tokens) // 2, 1)

    def written(self, sample: Sample, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What an evaluation needs of a sample and the token ids that were generated for it; runs programs."""
        length = self.prompt_length(sample)
        prompt, rest = sample.tokens[:length].tolist(), sample.tokens[length:][sample.targets[length:]].tolist()
        found = self.decoded(texts)
        result: dict[str, Any] = {
            "source": self.tokenizer.decode(prompt),
            "references": [self.tokenizer.decode(rest)] if self.labelled else [],
            "texts": found,
        }
        code = sample.reference["code"]
        if code and self.code.enabled:
            from trainer.sandbox import run_programs

            outcomes = run_programs([program(code, text) for text in found], self.code)
            result["passed"] = [outcome.passed for outcome in outcomes]
            result["outcomes"] = [f"{outcome.status}: {outcome.message}"[:200] for outcome in outcomes]
        return result

    @property
    def scored(self) -> tuple[str, ...]:
        passed = (f"pass@{k}" for k in self.code.pass_at if self.code.enabled)
        return ("perplexity", *super().scored, *passed, "generated")

    def scores(self, loss: float, predictions: Predictions) -> dict[str, float]:
        scores = CausalLM.scores(self, loss, predictions) | super().scores(loss, predictions)
        run: list[list[bool]] = [written["passed"] for _, written in predictions if "passed" in written]
        for k in self.code.pass_at if run else ():
            scores[f"pass@{k}"] = sum(pass_at_k(len(of), sum(of), k) for of in run) / len(run)
        return {**scores, "generated": len(predictions)}


def program(code: dict[str, Any], text: str) -> str:
    """A generated text with its tests, to be run: it passes if it comes to its end."""
    if isinstance(code["tests"], list):
        return "\n".join([text, code.get("setup") or "", *code["tests"], ""])
    return f"{code['prompt']}{text}\n{code['tests']}\ncheck({code['entry_point']})\n"
