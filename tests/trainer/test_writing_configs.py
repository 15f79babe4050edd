"""The starter configs are whole, and docs/generation.md names every setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.config.generation import CodeExecutionConfig, GenerationConfig
from trainer.config.loading import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.json")), ids=lambda path: path.stem)
def test_starter_configs_load(path: Path) -> None:
    assert load_config(path).task.type == json.loads(path.read_text())["task"]["type"]


def test_the_page_names_every_setting() -> None:
    page = (ROOT / "docs/generation.md").read_text()
    for field in [*GenerationConfig.model_fields, *CodeExecutionConfig.model_fields]:
        if field not in ("enabled", "pass_at", "at_once"):
            assert f"`{field}`" in page, field
