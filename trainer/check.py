"""Preflight of the data: `python -P -m trainer.check CONFIG_JSON [SAMPLES]`, run before any rank starts.

Loads the tokenizer, opens every source, encodes a part of each as training would, and looks for what fails in silence:
masks that leave nothing to learn, ids beyond the model's vocabulary. Prints one JSON line: ok, class, errors,
warnings, statistics (with so many samples a source).
Never imports torch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.encoding import OUTCOMES, SourceEncoder
from trainer.data.packing import pack
from trainer.data.prepared import prepared_documents
from trainer.data.sample import Sample
from trainer.data.sources import open_source
from trainer.failures import EXIT_DONE, EXIT_USER, DsftError
from trainer.hub import offline_if_unreachable
from trainer.planning.mixture import source_epochs
from trainer.planning.model_facts import read_config
from trainer.tasks import Task, get_task, task_tokenizer
from trainer.tokenizer import Tokenizer

_WRITTEN_OUT = {"true": "1", "false": "0"}  # what `label_text` makes of the values that these texts may stand for
_UNKNOWN = 0.01  # of the tokens: more is worth a word
_FIRST, _SPREAD = 200, 100  # records looked at: the first ones, and others over the whole source


def check(config: LaunchConfig, samples: int = 0) -> dict[str, Any]:
    """Everything that is wrong with a config's data and tokenizer, and figures of its data."""
    report: dict[str, Any] = {"ok": True, "errors": [], "warnings": [], "statistics": []}
    if problem := offline_if_unreachable(config):
        return {**report, "ok": False, "class": "user", "errors": [problem]}
    try:
        tokenizer = task_tokenizer(config)
        task = get_task(config, tokenizer)
        vocabulary = model_vocabulary(config)
    except DsftError as error:
        return {**report, "ok": False, "class": error.failure_class, "errors": [str(error)]}
    if vocabulary is not None and tokenizer.vocab_size > vocabulary and not config.model.resize_embeddings:
        raised = "raise model.config.vocab_size" if config.model.path is None else "set model.resize_embeddings to true"
        report["errors"].append(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocab_size is {vocabulary}: use the model's "
            f"own tokenizer, or {raised}"
        )
    adapter = config.model.adapter
    for needed, package, message in (
        (adapter and adapter.type == "qlora", "bitsandbytes", "adapter.type: qlora needs bitsandbytes{}, or use lora"),
        (config.model.fp8 != "none", "torchao", "fp8 needs torchao{}, or set it to none"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            report["class"] = "user"
            report["errors"].append("model." + message.format(f"; pip install {package}"))
    if tokenizer.eos_id is None and task.splits:
        report["warnings"].append("the tokenizer has no end-of-text token: the model will not learn where to stop")
    if problem := _metric_problem(config, task):
        report |= {"class": "user", "errors": [*report["errors"], problem]}
    if (labels := getattr(task, "labels", None)) and labels.names:
        report["labels"] = list(labels.names)
        report["warnings"] += [*_alike(labels.names), *_other_head(config, len(labels.names))]
    for part, sources in (("train", config.data.train), ("evaluation", config.data.evaluation)):
        for index, source in enumerate(sources):
            try:
                statistics = look_at(source, task, config, samples)
            except DsftError as error:
                report["class"] = error.failure_class
                report["errors"].append(f"data.{part}[{index}]: {error}")
                continue
            times = source_epochs(source, config.training.epochs)
            if part == "train" and times is not None and round(times * statistics["records"]) == 0:
                report["errors"].append(
                    f"data.train[{index}]: {times} epochs of {statistics['records']} records are none"
                )
            report["statistics"].append({"source": f"data.{part}[{index}]", "path": source.path, **statistics})
            report["warnings"] += [f"data.{part}[{index}]: {told}" for told in _tokens_of_note(statistics)]
            if statistics["target_tokens"] == 0:
                report["errors"].append(
                    f"data.{part}[{index}]: none of {statistics['looked_at']} records leaves a token to learn from; "
                    "check `columns`, the roles of `messages`, and data.sequence_length where prompts are long"
                )
            elif statistics["nothing_to_learn"]:
                report["warnings"].append(
                    f"data.{part}[{index}]: {statistics['nothing_to_learn']} of {statistics['looked_at']} records "
                    "leave nothing to learn and will be skipped"
                )
    if not report["errors"]:
        report["warnings"] += [*_trained_on(config), *_all_warmup(config, report["statistics"])]
    if config.data.prepared is not None and not report["errors"]:
        try:
            prepared_documents(config, [open_source(source) for source in config.data.train])
        except DsftError as error:
            report["errors"].append(str(error))
    if report["errors"]:
        report["ok"] = False
        report.setdefault("class", "data")
    return report


def _metric_problem(config: LaunchConfig, task: Task) -> str | None:
    """What is wrong with `evaluation.metric`, which nothing but the first evaluation would tell."""
    metric, names = config.evaluation.metric, {source.name for source in config.data.evaluation}
    of, slash, score = metric.rpartition("/")
    known = ("loss", *task.scored, task.counted)
    if not names or (score in known and (of in names or not slash)):
        return None
    more = f"; of one source: {', '.join(sorted(f'{name}/...' for name in names - {None}))}" if names - {None} else ""
    return f"evaluation.metric: there is no {metric!r}; the scores are {', '.join(known)}{more}"


def _alike(labels: Iterable[str]) -> list[str]:
    """Labels that a slip of the pen may have made two of."""
    found: dict[str, list[str]] = {}
    for label in labels:
        key = label.strip().casefold()
        found.setdefault(_WRITTEN_OUT.get(key, key), []).append(label)
    return [
        f"the labels {', '.join(map(repr, same))} differ in case, white space or type (true is read as 1) alone"
        for same in found.values()
        if same[1:]
    ]


def _trained_on(config: LaunchConfig) -> list[str]:
    """Files of the evaluation that are trained on as well, whatever they are called."""
    if not config.data.evaluation:
        return []
    trained = {content for source in config.data.train for _, _, content in open_source(source).fingerprint()}
    return [
        f"data.evaluation[{index}]: {name} is trained on as well: its scores say nothing about other data"
        for index, source in enumerate(config.data.evaluation)
        for name, _, content in open_source(source).fingerprint()
        if content in trained
    ]


def _all_warmup(config: LaunchConfig, statistics: Iterable[dict[str, Any]]) -> list[str]:
    """A training that ends before the learning rate has reached its peak."""
    settings, warmup = config.training, config.training.schedule.warmup_steps
    sequences = sum(item["sequences_per_epoch"] for item in statistics if item["source"].startswith("data.train"))
    steps = settings.max_steps or (settings.epochs or 0) * sequences / settings.global_batch_size
    if not 0 < steps <= warmup:
        return []
    return [
        f"training.schedule.warmup_steps is {warmup}, and the training has about {steps:.4g} steps: the learning rate "
        "does not reach its peak"
    ]


def look_at(source: DataSource, task: Task, config: LaunchConfig, shown: int = 0) -> dict[str, Any]:
    """Encode the first records of a source and some over its whole length; figures of these, and some samples."""
    data = config.data
    opened = open_source(source)
    encoder = SourceEncoder(opened, task, data.sequence_length, data.on_long, data.on_bad_record)
    spread = np.linspace(0, opened.records - 1, _SPREAD).astype(np.int64)
    numbers = np.unique(np.concatenate([np.arange(min(_FIRST, opened.records)), spread]))
    joined = task.joined
    samples, outcomes = encoder.encode(numbers, range(len(numbers)))
    flat = [sample for made in samples.values() for sample in made]
    lengths = [len(sample.tokens) for sample in flat]
    bins = len(pack(np.array(lengths), data.sequence_length) if data.packing else lengths)
    tokenizer = task.tokenizer
    unknown = None if tokenizer.unk_id == tokenizer.eos_id else tokenizer.unk_id  # GPT-2 has one token for both
    counted = np.bincount([outcome for _, outcome in outcomes], minlength=len(OUTCOMES))
    first = [(samples[at], int(numbers[at])) for at in list(samples)[:shown]]
    return {
        "records": opened.records,
        "looked_at": len(numbers),
        "mean_tokens": sum(lengths) / max(len(samples), 1),
        "longest_sample": max(lengths, default=0),
        "tokens": sum(lengths),
        "target_tokens": int(sum(sample.targets.sum() for sample in flat)),
        "unknown_tokens": sum(int((sample.tokens == unknown).sum()) for sample in flat),
        "joined_answers": task.joined - joined,
        "packing_efficiency": sum(lengths) / max(bins * data.sequence_length, 1),
        "sequences_per_epoch": round(bins / len(numbers) * opened.records),
        "length_histogram": _histogram(lengths, data.sequence_length),
        "begin_with_bos": _share(made[0].tokens[0] == tokenizer.bos_id for made in samples.values() if made),
        "end_with_eos": _share(made[-1].tokens[-1] == tokenizer.eos_id for made in samples.values() if made),
        "samples": [[_stretches(sample, tokenizer) for sample in made] for made, _ in first],
        "images": [encoder.named(number, task.paths) for _, number in first] if task.paths else [],
        "labels": [
            encoder.named(number, task.label_columns) if any(sample.labels is not None for sample in made) else {}
            for made, number in first
        ],
        **dict(zip(OUTCOMES, map(int, counted), strict=True)),
    }


def _tokens_of_note(statistics: dict[str, Any]) -> Iterable[str]:
    """What a tokenizer loses of a source."""
    share = statistics["unknown_tokens"] / max(statistics["tokens"], 1)
    if share > _UNKNOWN:
        yield (
            f"{share:.1%} of the tokens stand for text that the tokenizer does not know, which the model can neither "
            "read nor write: use a model and tokenizer that are made for such texts (model.path, model.tokenizer)"
        )
    if statistics["joined_answers"]:
        yield (
            f"{statistics['joined_answers']} answers begin within the last token of their prompt, which is not "
            "learned, and the model is asked with other tokens than it is trained on: let the chat template end "
            "prompts with a special token or a line end, and not with a space"
        )


def _share(found: Iterable[Any]) -> float:
    values = [bool(value) for value in found]
    return sum(values) / max(len(values), 1)


def _histogram(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """(at most so many tokens, samples) in eight steps up to the sequence length."""
    edges = np.unique(np.ceil(np.linspace(0, limit, 9)).astype(np.int64))
    counts, _ = np.histogram(lengths, edges + 1)  # a bin holds its upper edge
    return list(zip(edges[1:].tolist(), counts.tolist(), strict=True))


def _stretches(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, whether it is learned) in turns: a whole sample as the model sees it."""
    edges = [0, *(np.flatnonzero(np.diff(sample.targets)) + 1).tolist(), len(sample.tokens)]
    return [(tokenizer.show(sample.tokens[a:b].tolist()), bool(sample.targets[a])) for a, b in pairwise(edges)]


def _other_head(config: LaunchConfig, labels: int) -> Iterable[str]:
    """That the model's own head, if it has one, is for another number of labels."""
    values = read_config(config.model) or {}
    has_head = any(name.endswith("Classification") for name in values.get("architectures") or ())
    there = len(values.get("id2label") or "01")  # two are not written down
    if has_head and there != labels:
        yield f"model.path has a head for {there} labels: one for the {labels} of the data is made anew"


def model_vocabulary(config: LaunchConfig) -> int | None:
    """`vocab_size` of the model's config, where it is here. Raises UserError where it cannot be read."""
    values = read_config(config.model) or {}
    size = (values.get("text_config") or values).get("vocab_size")
    return size if isinstance(size, int) else None


def main() -> int:
    config = LaunchConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if config.model.fp8 == "none":  # else a processor of images imports it: seconds, and lines of its own
        sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    report = check(config, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(json.dumps(report, default=lambda value: f"a {type(value).__name__}"))  # an encoded image, a date
    return EXIT_DONE if report["ok"] else EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
