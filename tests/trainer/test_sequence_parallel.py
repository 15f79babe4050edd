"""Ranks that share sequences train as one rank does, on packed data, in real ZeRO-3 runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import copy_run, figures, launch, logs, make_run

from trainer.failures import UserError
from trainer.forward import LanguageModelLoss
from trainer.rundir import RunDirectory
from trainer.sequence_parallel import _refuse

MODEL = {
    "config": {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "dtype": "float32",
}


def run_of(folder: Path, workspace: Path, ranks: int, sharing: int, model: dict[str, Any] = MODEL) -> RunDirectory:
    made = {**model, "tokenizer": str(workspace / "tokenizer.json"), "sequence_parallel": sharing}
    return make_run(folder, workspace, ranks, made, max_steps=6)


def assert_same(run: RunDirectory, other: RunDirectory, first: int = 1) -> None:
    lines = list(zip(figures(run, first), figures(other, first), strict=True))
    assert len(lines) == 7 - first
    for (step, loss, norm, *rest), (step_, loss_, norm_, *rest_) in lines:
        assert (step, *rest) == (step_, *rest_)  # learning rate, digest and targets of the batch
        assert loss == pytest.approx(loss_, rel=1e-6)
        assert norm == pytest.approx(norm_, rel=1e-5)
    scores, others = ([line["evaluation"]["loss"] for line in each.evaluation_lines()] for each in (run, other))
    assert scores == pytest.approx(others, rel=1e-6)


@pytest.fixture(scope="module")
def alone(workspace: Path) -> RunDirectory:
    run = run_of(workspace / "alone", workspace, 1, 1)
    assert launch(run, 1) == 0, logs(run)
    return run


def test_two_groups_of_two_ranks_train_as_one_rank_does(workspace: Path, alone: RunDirectory) -> None:
    run = run_of(workspace / "shared", workspace, 4, 2)
    assert launch(run, 4) == 0, logs(run)
    assert_same(run, alone)
    # each rank ran half of every row, and all of it was counted once
    for line, other in zip(run.step_lines(), alone.step_lines(), strict=True):
        assert line["tokens"] == other["tokens"]
        assert line["padded_tokens"] % 8 == (-line["tokens"]) % 8

    # the checkpoint of step 4 knows nothing of groups: one rank goes on from it
    resumed = copy_run(run, workspace / "resumed")
    (resumed.checkpoints_dir / "step-00000006" / "manifest.json").unlink()
    one = run_of(workspace / "other", workspace, 1, 1)
    for name in ("config.json", "plan.json"):
        (resumed.path / name).write_bytes((one.path / name).read_bytes())
    assert launch(resumed, 1, attempt=2) == 0, logs(resumed)
    assert "resumed from" in logs(resumed)
    assert_same(resumed, alone, first=5)


def test_what_no_rank_sees_the_whole_of_is_refused() -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    _refuse(SimpleNamespace(**heads, layer_types=["full_attention", "sliding_attention"]), 2)
    for more, message in (
        ({"layer_types": ["full_attention", "conv"]}, "layers of type conv mix tokens"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rotary embeddings of type longrope"),
        ({"num_key_value_heads": 3}, "cannot be shared evenly"),
    ):
        with pytest.raises(UserError, match=message):
            _refuse(SimpleNamespace(**heads | more), 2)


def test_a_model_that_fails_on_slices_is_a_config_to_change() -> None:
    """As gpt-oss does, whose attention sinks are not shared out; it is no failure to try again after."""
    head = torch.nn.Linear(4, 8)
    model: Any = SimpleNamespace(get_output_embeddings=lambda: head)
    parallel: Any = SimpleNamespace(size=2, shard=0, shards=2, begin=lambda _: None)
    loss = LanguageModelLoss(model, 0, "eager", torch.device("cpu"))
    loss.parallel = parallel

    def fails(**_: Any) -> Any:
        raise RuntimeError("Sizes of tensors must match")

    with pytest.raises(UserError, match=r"cannot be run by 2 ranks .*Sizes of tensors must match"):
        loss.check_shards(SimpleNamespace(probe=fails), parallel)  # type: ignore[arg-type]


@pytest.mark.matrix
@pytest.mark.parametrize(("ranks", "sharing"), [(2, 2), (4, 4), (3, 1)])
def test_other_groups(workspace: Path, alone: RunDirectory, ranks: int, sharing: int) -> None:
    run = run_of(workspace / f"shared{ranks}-{sharing}", workspace, ranks, sharing)  # 4: more than heads of keys
    assert launch(run, ranks) == 0, logs(run)
    assert_same(run, alone)


@pytest.mark.matrix
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows(workspace: Path, attention: str) -> None:
    sizes: dict[str, Any] = {**MODEL["config"], "model_type": "mistral", "sliding_window": 16}  # type: ignore[dict-item]
    model = {"config": sizes, "dtype": "float32", "attention": attention}
    runs = []
    for ranks in (1, 2):
        runs.append(run_of(workspace / f"{attention}{ranks}", workspace, ranks, ranks, model))
        assert launch(runs[-1], ranks) == 0, logs(runs[-1])
    assert_same(*runs)
