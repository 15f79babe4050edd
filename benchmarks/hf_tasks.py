"""dsft's samples for Hugging Face's Trainer: the same tokens and labels, its own collators, heads and losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.sample import Sample
from trainer.data.stream import GlobalBatch, build_evaluation_stream, build_training_stream

IGNORED = -100  # label of a token that is not learned


def whole_labels(made: Any) -> Any:
    """Labels for a model's own loss from `trainer.forward.collate`, like its `input_ids`."""
    import torch

    labels = torch.full((made.input_ids.numel() + 1,), IGNORED)
    real = made.labels != IGNORED
    labels[made.positions[real] + 1] = made.labels[real]  # the model shifts them back by one
    return labels[:-1].view_as(made.input_ids)


def samples_of(batches: Iterable[GlobalBatch]) -> list[Sample]:
    """All samples of a stream in one process."""
    return [
        sample
        for batch in batches
        for micro_batch in batch.micro_batches
        for sequence in micro_batch.sequences
        for sample in sequence.samples
    ]


def training_batches(config: LaunchConfig, task: Any) -> Iterable[GlobalBatch]:
    """All global batches of a training by steps, each in one micro-batch."""
    return build_training_stream(
        config,
        task,
        rank=0,
        world_size=1,
        micro_batch_size=config.training.global_batch_size,
        gather=lambda array: [array],
        limit=config.training.max_steps,
    )


def samples_in_order_of_training(config: LaunchConfig, task: Any) -> list[Sample]:
    """The samples of all global batches of a training by steps, one batch after the other."""
    return samples_of(training_batches(config, task))


def samples_in_order_of_files(config: LaunchConfig, task: Any, sources: Sequence[DataSource]) -> list[Sample]:
    """Each sample of the sources once."""
    batches = build_evaluation_stream(
        config, task, rank=0, world_size=1, micro_batch_size=32, gather=lambda array: [array], sources=tuple(sources)
    )
    return samples_of(batches)


def example_of(sample: Sample, task: Any) -> dict[str, Any]:
    """What a dataset for the Trainer would hold."""
    assert sample.inputs is not None
    assert sample.labels is not None
    inputs = {name: values.tolist() for name, values in sample.inputs.items()}
    example = {"input_ids": sample.tokens.tolist(), "attention_mask": [1] * len(sample.tokens), **inputs}
    kind = task.config.task.type
    if kind == "question-answering":
        start, end = sample.labels.tolist()
        return {**example, "start_positions": start, "end_positions": end}
    if kind == "token-classification":
        labels = iter(sample.labels.tolist())
        return {**example, "labels": [next(labels) if target else IGNORED for target in sample.targets]}
    return {**example, "labels": int(sample.labels[0])}


def collator_of(task: Any, tokenizer: Any) -> Any:
    """transformers' own, padding to the longest of a batch."""
    import transformers

    if task.config.task.type == "token-classification":
        return transformers.DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    return transformers.DataCollatorWithPadding(tokenizer)


def scores_of(model: Any, task: Any, samples: Sequence[Sample], batch: int = 32) -> dict[str, float]:
    """The task's scores of a plain model's predictions."""
    import torch

    from trainer.objective import EncoderObjective

    objective = EncoderObjective(model, task, torch.device("cpu"))
    predictions: list[Any] = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            found = task.read(model(**objective.collate(part)[0]), part)
            predictions += [(sample.origin, one) for sample, one in zip(part, found, strict=True)]
    scores: dict[str, float] = task.scores(0.0, predictions)
    return scores
