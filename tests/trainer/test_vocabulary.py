"""A tokenizer with more tokens than the pretrained model: refused, or rows are added, alike at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import figures, launch, logs, make_run, make_workspace

from trainer.check import check
from trainer.config.loading import load_config

ROWS = 150


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.matrix)], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import transformers

    folder = make_workspace(tmp_path_factory.mktemp("model"))
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=request.param,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "weights")
    return {"path": str(folder / "weights"), "tokenizer": str(folder / "tokenizer.json"), "dtype": "float32"}


def test_rows_are_added_alike_at_any_world_size(model: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    workspace = Path(model["tokenizer"]).parent
    runs = {}
    for ranks in (1, 2):
        run = make_run(tmp_path / f"of{ranks}", workspace, ranks, {**model, "resize_embeddings": True}, max_steps=4)
        assert launch(run, ranks) == 0, logs(run)
        runs[ranks] = run
    losses = {ranks: [line[1] for line in figures(run)] for ranks, run in runs.items()}
    assert len(losses[1]) == 4
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(runs[2].export_dir)
    before = load_file(Path(model["path"]) / "model.safetensors")["model.embed_tokens.weight"]
    after = exported.get_input_embeddings().weight.detach()
    assert exported.config.vocab_size == len(after) == 320  # 259 tokens, to a multiple of 64
    assert exported.get_output_embeddings().weight.shape == after.shape
    steps = 4  # of AdamW at 3e-3: no weight moves further
    assert (after[:ROWS] - before).abs().max() < 3e-3 * (steps + 1)
    assert (after[ROWS:] - before.mean(0)).abs().max() < 3e-3 * (steps + 1)


def test_without_the_setting_it_is_refused_by_name(model: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Path(model["tokenizer"]).parent, 1, model)
    refused = check(load_config(run.config_path))
    assert refused["ok"] is False
    assert "259 ids and the model's vocab_size is 150" in refused["errors"][0]
    assert "set model.resize_embeddings to true" in refused["errors"][0]
    assert check(load_config(run.config_path, ["model.resize_embeddings=true"]))["errors"] == []
