"""The starter configs of tasks that write text are whole, and docs/generation.md names every setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config.generation import CodeExecutionConfig, GenerationConfig
from trainer.config.loading import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["translation", "summarization", "code"])
def test_starter_configs_load(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.json")
    values = json.loads((ROOT / f"configs/{name}.json").read_text())
    assert config.task.type == values["task"]["type"]


def test_the_page_names_every_setting() -> None:
    page = (ROOT / "docs/generation.md").read_text()
    for field in [*GenerationConfig.model_fields, *CodeExecutionConfig.model_fields]:
        if field not in ("enabled", "pass_at", "at_once"):
            assert f"`{field}`" in page, field
